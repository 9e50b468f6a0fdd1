"""Names of files and folders: local paths, and ``hf-hub:org/repo`` or ``hf-hub:org/repo/sub/file.pth`` wherever a path is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.utils.lazy_imports import require

HUB = "hf-hub:"
IGNORED = ("*.py", "*.msgpack", "*.h5", "*.onnx")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
ENDINGS = (".safetensors", ".index.json", ".bin", ".pt", ".pth")


def is_file_name(name: str) -> bool:
    """Whether ``name`` means a checkpoint file, not a library's tag."""
    return name.endswith(ENDINGS) or Path(name).exists()


def local_file(name: str) -> Path:
    """A local path as it is; of a hub name the file, downloaded if it is not in the cache."""
    if not name.startswith(HUB):
        return Path(name)
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise DgmrError(f"{name} names no file; write it as hf-hub:ORG/REPO/FILE")
    repository = "/".join(parts[:2])
    path = Path(_from_hub(name, "hf_hub_download", repository, filename=parts[2]))
    if path.name.endswith(".index.json"):
        folder = parts[2].rpartition("/")[0]
        for shard in set(json.loads(path.read_text())["weight_map"].values()):
            _from_hub(name, "hf_hub_download", repository, filename=f"{folder}/{shard}".lstrip("/"))
    return path


def local_folder(name: str, *, weights: bool = True) -> Path:
    """A local path as it is; of a hub name the repository's folder, downloaded if it is not in the cache, weights or not."""
    if not name.startswith(HUB):
        return Path(name)
    return Path(
        _from_hub(
            name, "snapshot_download", name.removeprefix(HUB), ignore_patterns=[*IGNORED, *(() if weights else WEIGHTS)]
        )
    )


def _from_hub(name: str, function: str, repository: str, **options: Any) -> str:
    try:
        return getattr(require("huggingface_hub", "encoders"), function)(repository, **options)
    except Exception as error:  # no network, no such repository, no such file
        raise DgmrError(f"cannot get {name} from the Hugging Face hub: {first_line(error)}") from error
