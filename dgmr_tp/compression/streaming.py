"""Prune from file to file: towers that do not fit into memory.

The weights stay on disk, memory-mapped. One MLP at a time is scored, cut, and written to one safetensors file, which
open_clip and timm read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
import torch_pruning as tp
from torch import Tensor

from dgmr_tp.compression.criteria import needs_images
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Amount, MLPPruner, Plan, Site
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.utils.files import atomic_write, check_output, check_room, read_json, staging_directory, to_json
from dgmr_tp.utils.modules import meta_copy
from dgmr_tp.utils.progress import report_progress

JOURNAL = "decided.json"
"""The decisions so far, in the staging directory. A killed run resumes from it."""
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def prune_streaming(
    source: str,
    directory: str | Path,
    pretrained: str | None = None,
    *,
    criterion: str | tp.importance.Importance = "dgmr",
    seed: int = 0,
    **amount: Unpack[Amount],
) -> Plan:
    """Prune a checkpoint into a model directory, MLP by MLP, without holding the dense tower. Same result as ``prune``.

    Memory: a few float64 copies of one MLP's first Linear, for a tower of any size. A killed call resumes with the MLPs
    that were not decided yet, and ``directory`` appears only when it is complete. There is no recovery, which needs the
    tower in memory. The file keeps the checkpoint's dtype.

    Args:
        source, pretrained: a model directory, or a library's name and a checkpoint file (see :func:`open_model`).
            Weights named by a library's tag are loaded by the library, all at once.
        directory: the directory to write; it must not exist.
        criterion, seed, amount: as for :func:`dgmr_tp.prune`.

    Raises:
        DgmrError: bad input; the message says what to do.
    """
    directory = Path(directory)
    check_output(directory)
    if needs_images(criterion):
        raise DgmrError(
            f"criterion {criterion} runs the tower on images, which streaming does not do. Use one that reads "
            "weights only."
        )
    opened = open_model(source, pretrained, weights="disk")
    rule = criterion if isinstance(criterion, str) else type(criterion).__name__
    request = {"source": source, "pretrained": pretrained, "criterion": rule, "seed": seed, "amount": amount}
    with staging_directory(directory, "dgmr-tp prune is working", resumable=(JOURNAL,)) as staging:
        journal = staging / JOURNAL

        def remember(plan: Plan) -> None:
            atomic_write(journal, to_json({"request": request, "plan": plan.to_json()}))

        previous = _read_journal(journal, request)
        plan = make_plan(opened, criterion, seed=seed, previous=previous, on_decision=remember, **amount)
        pruned = replace(opened, module=meta_copy(opened.module))
        resize(pruned.tower, {name: len(site.kept) for name, site in plan.sites.items()})
        shapes = {name: tensor.shape for name, tensor in pruned.module.state_dict().items()}
        state = opened.module.state_dict()
        size = sum(shape.numel() * state[name].element_size() for name, shape in shapes.items())
        check_room(staging.parent, size, f"the model {opened.name}")
        _write(staging / opened.weights_name, shapes, state, _pruned_tensors(opened, plan))
        journal.unlink()
        pruned.finish(staging, plan, directory)
    return plan


def _read_journal(path: Path, request: dict[str, object]) -> Plan | None:
    """Return the decisions of an interrupted call for the same request; None without one or if the file is damaged."""
    try:
        journal = read_json(path, lambda content: (content["request"], content["plan"]), remedy="It is ignored.")
        return Plan.from_json(journal[1]) if journal[0] == json.loads(json.dumps(request)) else None
    except DgmrError:
        return None


def _pruned_tensors(opened: OpenedModel, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the pruned model in the order of its modules. Each MLP is cut, verified and released."""
    pruner = MLPPruner(opened.tower, sites=opened.sites, weight_hashes=opened.weight_hashes)
    prefix = f"{opened.tower_path}." if opened.tower_path else ""
    waiting: dict[str, Site] = {f"{prefix}{site.name}.": site for site in opened.sites if site.name in plan.sites}
    names = list(opened.module.state_dict())
    for position, name in enumerate(names):
        mlp_path = next((path for path in waiting if name.startswith(path)), None)
        if mlp_path is not None:
            site = waiting[mlp_path]
            if opened.tower.get_submodule(site.consumer).in_features == site.hidden:
                pruner.apply(Plan(plan.encoder, plan.criterion, {site.name: plan.sites[site.name]}))
        owner, _, leaf = name.rpartition(".")
        yield name, getattr(opened.module.get_submodule(owner), leaf)
        if mlp_path is not None and (position + 1 == len(names) or not names[position + 1].startswith(mlp_path)):
            opened.module.get_submodule(mlp_path.removesuffix(".")).to("meta")
            del waiting[mlp_path]
            report_progress("write", len(plan.sites) - len(waiting), len(plan.sites))


def _write(
    path: Path, shapes: Mapping[str, torch.Size], types: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file from tensors that arrive one by one. Its header needs only their shapes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * types[name].element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[types[name].dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert tensor.shape == shapes[name], name
            stream.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
