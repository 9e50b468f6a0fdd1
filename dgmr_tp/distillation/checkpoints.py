"""Checkpoints that are whole or not there: written by DeepSpeed, sealed with checksums, read at any number of processes."""

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
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import OutOfMemoryError, Tensor, distributed

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.distributed import all_gather_dict, broadcast_from_main, get_rank, get_world_size, is_main_process
from dgmr_tp.utils.files import sha256, write_whole

SEAL = "whole.json"
"""Written last, when every process has written its part: what the checkpoint is and the SHA-256 of its files."""
AVERAGE = "average.safetensors"
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """What the seal of a checkpoint says."""

    step: int
    """Steps behind it: with the seed, all that the order of the images needs."""
    processes: int
    zero_stage: int
    files: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Images that did not decode so far, and why."""
    shard: int = 0
    """Of a stream: the shards before this position were read to their end."""

    @property
    def tag(self) -> str:
        return f"step{self.step:08d}"


def save(
    engine: Any, directory: Path, checkpoint: Checkpoint, average: Iterable[tuple[str, Tensor]], keep: int
) -> None:
    """Write and seal a checkpoint; all but the newest ``keep`` are dropped. Every process has to call it.

    Raises:
        DgmrError: it cannot be written; the ones before it stay.
    """
    folder = directory / checkpoint.tag
    with writing(folder):
        # DeepSpeed's own barriers are inside: a process that fails leaves, and the launcher ends the others.
        engine.save_checkpoint(str(directory), tag=checkpoint.tag, save_latest=False)
        if whole := {name: value.cpu() for name, value in average if is_main_process()}:
            save_file(whole, folder / AVERAGE)
        distributed.barrier()
    files = _checksums(folder)
    with writing(folder):
        if is_main_process():
            write_whole(folder / SEAL, json.dumps(asdict(checkpoint) | {"files": files}))
        distributed.barrier()
    if is_main_process():
        sealed = sorted(path.parent for path in directory.glob(f"step*/{SEAL}"))
        for old in [path for path in directory.glob("step*") if path not in sealed[-keep:]]:
            shutil.rmtree(old)


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are what its seal says, and the names of newer ones that are not. Every process has to call it."""
    damaged: list[str] = []
    seals = broadcast_from_main(
        lambda: sorted(((path.parent.name, _read(path)) for path in directory.glob(f"step*/{SEAL}")), reverse=True)
    )
    for name, found in seals:
        if found and _checksums(directory / name, found.files) == found.files:
            return found, damaged
        damaged.append(name)
    return None, damaged


def _read(seal: Path) -> Checkpoint | None:
    try:
        return Checkpoint(**json.loads(seal.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def average_of(directory: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The moving average that was saved with it; empty where there was none."""
    path = directory / checkpoint.tag / AVERAGE
    return load_file(path) if path.exists() else {}


@contextmanager
def for_processes(directory: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, bool]]:
    """The tag to load, and whether it is a universal checkpoint: ZeRO's shards of another number of processes are converted by
    DeepSpeed's own converter for the time of the context. Every process has to call it.

    Raises:
        DgmrError: the conversion failed.
    """
    if checkpoint.processes == get_world_size() or checkpoint.zero_stage == 0:
        yield checkpoint.tag, False
        return
    name: str = broadcast_from_main(
        lambda: f"universal-{checkpoint.tag}-{os.getpid()}"
    )  # an earlier attempt may still be writing its own
    converted = directory / name

    def convert() -> str | None:
        folders = ["--input_folder", str(directory / checkpoint.tag), "--output_folder", str(converted)]
        program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
        done = subprocess.run(program, capture_output=True, text=True)
        return (
            (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1] if done.returncode else None
        )

    if problem := broadcast_from_main(convert):
        raise DgmrError(
            f"the checkpoint {directory / checkpoint.tag} of {checkpoint.processes} processes cannot be converted for "
            f"{get_world_size()}: {problem}; go on with {checkpoint.processes} processes"
        )
    yield name, True
    distributed.barrier()
    if is_main_process():
        shutil.rmtree(converted, ignore_errors=True)
        (directory / "latest_universal").unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch's writer raises RuntimeError where the disk is full
        if isinstance(error, OutOfMemoryError) or is_about_another_process(error):
            raise
        problem = str(error).splitlines()[0]
        raise DgmrError(
            f"cannot write the checkpoint {folder}: {problem}; make room; the one before it is kept, run again to go on"
        ) from error


def is_about_another_process(error: Exception) -> bool:
    """Whether a collective failed because of one that is gone. Not every version of torch has an exception of its own for it."""
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def _checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of the files below ``folder`` but the seal, or of ``names``; the processes share the work."""
    rank, world = get_rank(), get_world_size()
    if names is None:
        names = broadcast_from_main(
            lambda: [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        )
    mine = [name for name in sorted(names)[rank::world] if name != SEAL]
    return all_gather_dict({name: sha256(folder / name) if (folder / name).is_file() else "missing" for name in mine})
