"""Collectives over the processes of a launch.

Without a process group, each works in a single process and returns its input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def join_processes() -> None:
    """Initialize the process group of a ``torchrun`` launch: NCCL on GPUs, gloo elsewhere. No-op without a launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, which writes files and prints."""
    return get_rank() == 0


def own_share(items: Sequence[T]) -> list[tuple[int, T]]:
    """Return every ``world_size``-th item, starting at this process's rank, with its index in ``items``."""
    return list(enumerate(items))[get_rank() :: get_world_size()]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all processes. The result is on the device of ``tensor``."""
    if not distributed.is_initialized():
        return tensor
    summed = tensor.to("cuda") if distributed.get_backend() == "nccl" else tensor.cpu().clone()
    distributed.all_reduce(summed)
    return summed.to(tensor.device)


def all_gather_rows(part: Tensor) -> Tensor:
    """Concatenate the rows of all processes in rank order. The number of rows may differ between processes."""
    if not distributed.is_initialized():
        return part
    sizes = [torch.zeros((), dtype=torch.long, device=part.device) for _ in range(get_world_size())]
    distributed.all_gather(sizes, torch.tensor(len(part), device=part.device))
    longest = int(max(sizes))
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    return torch.cat([rows[: int(size)] for rows, size in zip(gathered, sizes, strict=True)])


def all_gather_dict(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Merge the dictionaries of all processes, sorted by key."""
    if not distributed.is_initialized():
        return entries
    parts: list[dict[Any, Any]] = [{}] * get_world_size()
    distributed.all_gather_object(parts, entries)
    return dict(sorted(entry for part in parts for entry in part.items()))


def broadcast_from_main(compute: Callable[[], T]) -> T:
    """Call ``compute`` on rank 0 and return its result in every process.

    Use it for directory listings: on a network file system they may differ between machines.
    """
    if not distributed.is_initialized():
        return compute()
    result: list[Any] = [compute() if is_main_process() else None]
    distributed.broadcast_object_list(result)
    return result[0]
