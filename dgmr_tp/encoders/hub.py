"""Names of files and folders: local paths, and ``hf-hub:org/repo`` or ``hf-hub:org/repo/sub/file.pth`` wherever a path is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgmr_tp.encoders.checkpoint import first_line
from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require

HUB = "hf-hub:"
ENDINGS = (".safetensors", ".index.json", ".bin", ".pt", ".pth")


def is_file_name(name: str) -> bool:
    """Whether ``name`` means a checkpoint file, not a library's tag."""
    return name.endswith(ENDINGS) or Path(name).exists()


def local_file(name: str) -> Path:
    """A local path as it is; of a hub name the file, downloaded if it is not in the cache."""
    if not name.startswith(HUB):
        return Path(name)
    organisation, repository, file = name.removeprefix(HUB).split("/", 2)
    return Path(_from_hub(name, "hf_hub_download", f"{organisation}/{repository}", filename=file))


def local_folder(name: str) -> Path:
    """A local path as it is; of a hub name the repository's folder, downloaded if it is not in the cache."""
    if not name.startswith(HUB):
        return Path(name)
    return Path(_from_hub(name, "snapshot_download", name.removeprefix(HUB), ignore_patterns=["*.py", "*.msgpack", "*.h5"]))


def _from_hub(name: str, function: str, repository: str, **options: Any) -> str:
    try:
        return getattr(require("huggingface_hub", "encoders"), function)(repository, **options)
    except Exception as error:  # no network, no such repository, no such file
        raise DgmrError(f"cannot get {name} from the Hugging Face hub: {first_line(error)}") from error
