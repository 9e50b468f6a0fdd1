"""Resolve names of files and folders: local paths, ``hf-hub:org/repo`` and ``hf-hub:org/repo/sub/file.pth``.

Returns local paths, after a download if the Hugging Face cache does not contain them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgmr_tp.encoders.checkpoint import weights_file
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.lazy_imports import require

HUB = "hf-hub:"
"""Prefix of names on the Hugging Face hub."""
IGNORE_PATTERNS = ("*.py", "*.msgpack", "*.h5", "*.onnx")
"""Files of a repository that are not downloaded: code, and weights of other frameworks."""
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
"""Files that are not downloaded if only the config is needed."""
CHECKPOINT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth")
"""Suffixes of checkpoint files."""


def is_file_name(name: str) -> bool:
    """Return whether ``name``, which is not a known tag, means a checkpoint: a file, or a folder that contains one."""
    return name.endswith(CHECKPOINT_SUFFIXES) or "/" in name or Path(name).expanduser().exists()


def local_file(name: str) -> Path:
    """Return the path of a checkpoint file. A hub name is downloaded to the cache, with its shards if it is an index.

    A local folder stands for the checkpoint in it.

    Raises:
        DgmrError: a hub name contains no file, a folder contains no checkpoint, or the download fails.
    """
    if not name.startswith(HUB):
        path = Path(name).expanduser()
        return weights_file(path) if path.is_dir() else path
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise DgmrError(f"{name} names no file. Write it as hf-hub:ORG/REPO/FILE.")
    repository = "/".join(parts[:2])
    path = Path(_from_hub(name, "hf_hub_download", repository, filename=parts[2]))
    if path.name.endswith(".index.json"):
        folder = parts[2].rpartition("/")[0]
        for shard in set(json.loads(path.read_text("utf-8"))["weight_map"].values()):
            _from_hub(name, "hf_hub_download", repository, filename=f"{folder}/{shard}".lstrip("/"))
    return path


def local_folder(name: str, *, weights: bool = True) -> Path:
    """Return the path of a folder. A repository of the hub is downloaded to the cache.

    Args:
        name: a path, or ``hf-hub:org/repo``.
        weights: download the weights too.

    Raises:
        DgmrError: the download fails.
    """
    if not name.startswith(HUB):
        return Path(name)
    ignore_patterns = [*IGNORE_PATTERNS, *(() if weights else WEIGHT_PATTERNS)]
    return Path(_from_hub(name, "snapshot_download", name.removeprefix(HUB), ignore_patterns=ignore_patterns))


def _from_hub(name: str, function: str, repository: str, **options: Any) -> str:
    try:
        return getattr(require("huggingface_hub", "encoders"), function)(repository, **options)
    except Exception as error:  # no network, no such repository, no such file
        raise DgmrError(f"cannot get {name} from the Hugging Face hub: {first_line(error)}") from error
