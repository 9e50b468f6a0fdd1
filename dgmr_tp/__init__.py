"""Prune the MLPs of large vision transformers, recover them in closed form, distill, evaluate and export them.

::

    model, plan, table = dgmr_tp.prune("open_clip:ViT-g-14", "IMAGES", pretrained="laion2b_s34b_b88k", mlp_ratio=1)

Importing the package does not import torch. Each public name is imported at its first use.
"""

import importlib
from typing import Any

from dgmr_tp.errors import DgmrError

__version__ = "0.1.0"
__all__ = ["DGMRImportance", "DgmrError", "MLPPruner", "Plan", "load_pruned", "open_model", "prune", "prune_streaming"]

_MODULES = {
    "DGMRImportance": "dgmr_tp.pruning",
    "MLPPruner": "dgmr_tp.pruning",
    "Plan": "dgmr_tp.pruning",
    "load_pruned": "dgmr_tp.encoders",
    "open_model": "dgmr_tp.encoders",
    "prune": "dgmr_tp.compression.prune",
    "prune_streaming": "dgmr_tp.compression.streaming",
}
"""Module of each public name that is imported at its first use."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dgmr_tp' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
