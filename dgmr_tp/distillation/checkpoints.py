"""Atomic DeepSpeed checkpoints, verified by SHA-256 and loadable at a different world size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import OutOfMemoryError, Tensor, distributed

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_dict, broadcast_from_main, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.files import atomic_write, sha256, to_json

MANIFEST = "manifest.json"
"""Written last, after every process has written its files: the :class:`Checkpoint` with the SHA-256 of each file."""
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Manifest of a checkpoint."""

    step: int
    """Finished steps. With the seed, it determines which images come next."""
    processes: int
    """World size that wrote it."""
    zero_stage: int
    peak_learning_rate: float | None = None
    """Peak of the schedule. A training that resumes does not search for it again."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file, by its path in the checkpoint's folder."""
    broken: dict[str, str] = field(default_factory=dict)
    """Images that did not decode so far, and the errors."""
    shard: int = 0
    """For a stream: all shards before this position were read to their end."""

    @property
    def tag(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step{self.step:08d}"


def save(
    engine: Any, directory: Path, checkpoint: Checkpoint, average: Iterable[tuple[str, Tensor]], keep: int
) -> None:
    """Write a checkpoint and its manifest, then delete all but the newest ``keep``. Every process must call it.

    Args:
        engine: DeepSpeed's engine.
        directory: folder of all checkpoints.
        checkpoint: the manifest, without ``files``.
        average: the moving average by parameter name; empty without one.
        keep: number of checkpoints that stay.

    Raises:
        DgmrError: it cannot be written. The earlier checkpoints stay.
    """
    folder = directory / checkpoint.tag
    with report_write_errors(folder):
        # The barriers are DeepSpeed's and ours: a process that fails exits, and the launcher ends the others.
        engine.save_checkpoint(str(directory), tag=checkpoint.tag, save_latest=False)
        if tensors := {name: value.cpu() for name, value in average if is_main_process()}:
            save_file(tensors, folder / AVERAGE)
        distributed.barrier()
    files = _checksums(folder)
    with report_write_errors(folder):
        if is_main_process():
            atomic_write(folder / MANIFEST, to_json(asdict(checkpoint) | {"files": files}))
        distributed.barrier()
    if is_main_process():
        complete = sorted(path.parent for path in directory.glob(f"step*/{MANIFEST}"))
        for old in [path for path in directory.glob("step*") if path not in complete[-keep:]]:
            shutil.rmtree(old)


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files match its manifest, and the tags of newer, damaged ones.

    Every process must call it.
    """
    damaged: list[str] = []
    manifests = broadcast_from_main(
        lambda: sorted(((path.parent.name, _read(path)) for path in directory.glob(f"step*/{MANIFEST}")), reverse=True)
    )
    for tag, checkpoint in manifests:
        if checkpoint and _checksums(directory / tag, checkpoint.files) == checkpoint.files:
            return checkpoint, damaged
        damaged.append(tag)
    return None, damaged


def _read(manifest: Path) -> Checkpoint | None:
    try:
        return Checkpoint(**json.loads(manifest.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def load_average(directory: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the moving average of a checkpoint, by parameter name; empty if it has none."""
    path = directory / checkpoint.tag / AVERAGE
    return load_file(path) if path.exists() else {}


@contextmanager
def prepare_for_loading(directory: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Give the tag to load, and whether it is a universal checkpoint. Every process must call it.

    ZeRO shards of another world size are converted by DeepSpeed's own converter into a universal checkpoint, which is
    deleted at the end of the context.

    Raises:
        DgmrError: the conversion failed.
    """
    if checkpoint.processes == get_world_size() or checkpoint.zero_stage == 0:
        yield checkpoint.tag, False
        return
    # The process id: an earlier attempt may still be writing its own folder.
    tag: str = broadcast_from_main(lambda: f"universal-{checkpoint.tag}-{os.getpid()}")
    converted = directory / tag

    def convert() -> str | None:
        folders = ["--input_folder", str(directory / checkpoint.tag), "--output_folder", str(converted)]
        program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
        result = subprocess.run(program, capture_output=True, encoding="utf-8", errors="replace")
        if not result.returncode:
            return None
        return (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]

    if problem := broadcast_from_main(convert):
        raise DgmrError(
            f"the checkpoint {directory / checkpoint.tag} of {checkpoint.processes} processes cannot be converted for "
            f"{get_world_size()} processes: {problem}. Resume with {checkpoint.processes} processes."
        )
    yield tag, True
    distributed.barrier()
    if is_main_process():
        shutil.rmtree(converted, ignore_errors=True)
        (directory / "latest_universal").unlink(missing_ok=True)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing ``path`` into a DgmrError. Errors about memory or another process pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError when the disk is full
        if isinstance(error, OutOfMemoryError) or is_about_another_process(error):
            raise
        problem = str(error).splitlines()[0]
        raise DgmrError(
            f"cannot write the checkpoint {path}: {problem}. Free disk space and run again to resume from the earlier "
            "checkpoint."
        ) from error


def is_about_another_process(error: Exception) -> bool:
    """Return whether a collective failed because another process is gone.

    Some versions of torch have no exception class for it, so the text is searched too.
    """
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def _checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of the files below ``folder`` (default: all but the manifest). Processes share the work."""
    if names is None:
        names = broadcast_from_main(
            lambda: [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        )
    own_names = [name for name in sorted(names)[get_rank() :: get_world_size()] if name != MANIFEST]
    return all_gather_dict(
        {name: sha256(folder / name) if (folder / name).is_file() else "missing" for name in own_names}
    )
