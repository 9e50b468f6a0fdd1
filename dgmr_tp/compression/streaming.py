"""Pruning from file to file: towers that do not fit into memory.

The weights stay on the disk, memory-mapped. One MLP at a time is looked at, decided, cut, and written; what is written is
one safetensors file, because that is what open_clip and timm open.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Unpack

import torch
import torch_pruning as tp
from torch import Tensor

from dgmr_tp.compression.criteria import DIFFERENTIATING, SEEING, make_plan
from dgmr_tp.encoders import OpenedModel, open_model
from dgmr_tp.encoders.model import staging_path
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Amount, MLPPruner, Plan, Site
from dgmr_tp.pruning.pruner import resize
from dgmr_tp.utils.files import hold, write_whole
from dgmr_tp.utils.modules import meta_copy
from dgmr_tp.utils.progress import report_progress

JOURNAL = "decided.json"
"""The plan so far, in the unfinished directory: a run that was killed goes on from there."""
TYPES = {
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
    """Prune a checkpoint into a model directory, MLP by MLP, without ever holding the dense tower. Same result as ``prune``.

    Memory: a few float64 copies of one MLP's first Linear, whatever the size of the tower. Killed and called again, it goes
    on with the MLPs that were not decided yet; ``directory`` appears whole or not at all. No recovery: it needs the tower. The
    file keeps the checkpoint's number type.

    Args:
        source, pretrained: a model directory, or a library's name and a checkpoint file (see :func:`open_model`). Weights
            that are named by a library's tag are loaded by the library, whole.
        directory: where to; must not exist.
        criterion, seed, amount: as for :func:`dgmr_tp.prune`.

    Raises:
        DgmrError: bad input; says what and what to do.
    """
    directory = Path(directory)
    aside = staging_path(directory)
    if isinstance(criterion, str) and criterion in (*SEEING, *DIFFERENTIATING):
        raise DgmrError(f"criterion {criterion} runs the tower on images, which streaming does not do")
    opened = open_model(source, pretrained, weights="disk")
    rule = criterion if isinstance(criterion, str) else type(criterion).__name__
    request = {"source": source, "pretrained": pretrained, "criterion": rule, "seed": seed, "amount": amount}
    journal = aside / JOURNAL

    def remember(plan: Plan) -> None:
        write_whole(journal, json.dumps({"request": request, "plan": plan.to_json()}))

    with hold(aside, "dgmr-tp prune is working") as lock:
        done = _read_journal(journal, request)
        plan = make_plan(opened, criterion, seed=seed, done=done, remember=remember, **amount)
        for left in aside.iterdir():  # by a run that was killed while it wrote
            if left.name not in (JOURNAL, Path(lock.name).name):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        pruned = _shadow(opened)
        resize(pruned.tower, {name: len(site.kept) for name, site in plan.sites.items()})
        shapes = {name: tensor.shape for name, tensor in pruned.module.state_dict().items()}
        _write(aside / opened.weights_name, shapes, opened.module.state_dict(), _cut(opened, plan))
        journal.unlink()
        Path(lock.name).unlink()
        pruned.finish(directory, plan, directory)
    return plan


def _read_journal(path: Path, request: dict[str, object]) -> Plan | None:
    try:
        found = json.loads(path.read_text())
        return Plan.from_json(found["plan"]) if found["request"] == json.loads(json.dumps(request)) else None
    except (OSError, ValueError, KeyError, DgmrError):  # the first time, or a damaged one
        return None


def _shadow(opened: OpenedModel) -> OpenedModel:
    """The same model on the meta device."""
    shadow = copy.copy(opened)
    shadow.module = meta_copy(opened.module)
    return shadow


def _cut(opened: OpenedModel, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the pruned model in the order of its modules; each MLP is cut, verified, and forgotten again."""
    pruner = MLPPruner(opened.tower)
    prefix = f"{opened.tower_path}." if opened.tower_path else ""
    waiting: dict[str, Site] = {f"{prefix}{site.name}.": site for site in pruner.sites if site.name in plan.sites}
    names = list(opened.module.state_dict())
    for place, name in enumerate(names):
        inside = next((path for path in waiting if name.startswith(path)), None)
        if inside is not None:
            site = waiting[inside]
            if opened.tower.get_submodule(site.consumer).in_features == site.hidden:
                pruner.apply(Plan(plan.encoder, plan.criterion, {site.name: plan.sites[site.name]}))
        owner, _, leaf = name.rpartition(".")
        yield name, getattr(opened.module.get_submodule(owner), leaf)
        if inside is not None and (place + 1 == len(names) or not names[place + 1].startswith(inside)):
            opened.module.get_submodule(inside.removesuffix(".")).to("meta")
            del waiting[inside]
            report_progress("write", len(plan.sites) - len(waiting), len(plan.sites))


def _write(
    path: Path, shapes: Mapping[str, torch.Size], types: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """A safetensors file from tensors that come one after the other: its header needs only their shapes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * types[name].element_size()
        header[name] = {"dtype": TYPES[types[name].dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert tensor.shape == shapes[name], name
            stream.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
