"""Prune the MLPs of large vision transformers, recover them in closed form, distil, measure, export.

::

    model, plan, table = dgmr_tp.prune("open_clip:ViT-g-14", "IMAGES", pretrained="laion2b_s34b_b88k", mlp_ratio=1)

Importing the package loads torch, torch-pruning and scipy; everything else when it is used.
"""

from typing import Any

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import DGMRImportance, MLPPruner, Plan

__version__ = "0.1.0"
__all__ = ["DGMRImportance", "DgmrError", "MLPPruner", "Plan", "load_pruned", "open_model", "prune", "prune_streaming"]


def __getattr__(name: str) -> Any:
    if name in ("load_pruned", "open_model"):
        import dgmr_tp.encoders

        return getattr(dgmr_tp.encoders, name)
    if name == "prune":
        import dgmr_tp.oneshot

        return dgmr_tp.oneshot.prune
    if name == "prune_streaming":
        import dgmr_tp.streaming

        return dgmr_tp.streaming.prune_streaming
    raise AttributeError(f"module 'dgmr_tp' has no attribute {name!r}")
