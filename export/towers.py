"""Turn the towers of an opened model into modules for export. Knows no file format and no layout."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.formats import OUTPUTS
from dgmr_tp.pruning import TowerAdapter
from dgmr_tp.pruning.adapter import last_state

EXAMPLE_TEXTS = (
    "a cat",
    "a photo of two people on a beach at night",
    "the small print of an old newspaper, out of focus",
)
"""Inputs for the verification of a text tower's files."""


def export_towers(
    model: OpenedModel,
    images: Tensor,
    *,
    outputs: Sequence[str] = ("embedding",),
    normalized: bool = False,
    text: bool = False,
) -> list[ExportTower]:
    """Return the image tower of a model and, on request, its text tower.

    Args:
        model: the model. Its towers are copied.
        images, outputs, normalized: see :func:`vision_export_tower`.
        text: add the text tower.

    Raises:
        DgmrError: an output is unknown, or the model has no text tower.
    """
    towers = [vision_export_tower(model.adapter, images, outputs=outputs, normalized=normalized)]
    if text:
        if model.tokenizer is None or model.text is None:
            raise DgmrError(
                f"{model.name} has no text tower to export, or no tokenizer. Export a CLIP model, or leave out the "
                "text tower."
            )
        towers.append(text_export_tower(model.text, model.tokenizer(list(EXAMPLE_TEXTS)), normalized=normalized))
    return towers


def vision_export_tower(
    adapter: TowerAdapter, images: Tensor, *, outputs: Sequence[str] = ("embedding",), normalized: bool = False
) -> ExportTower:
    """Return a copy of an image tower for export.

    It maps images ``[batch, 3, size, size]`` to ``embedding`` ``[batch, width]`` and ``patches``
    ``[batch, patches, width]``.

    Args:
        adapter: the adapter of the tower.
        images: preprocessed examples, ``[n, 3, size, size]``, n ≥ 2.
        outputs: names in :data:`OUTPUTS`. ``embedding`` is required. ``patches`` are the patch tokens after the final
            norm.
        normalized: normalize the embedding to length 1.

    Raises:
        DgmrError: an output is unknown, or the embedding is missing.
    """
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise DgmrError(f"unknown output {unknown[0]!r}. Use {', '.join(OUTPUTS)}.")
    if "embedding" not in outputs:
        raise DgmrError("the outputs lack the embedding. Add it; patches can only be exported together with it.")
    ordered = tuple(name for name in OUTPUTS if name in outputs)
    module = _prepare(_ImageTower(adapter, ordered, normalized))
    return ExportTower("image", module, images, "image", ordered, normalized)


def text_export_tower(tower: nn.Module, tokens: Tensor, *, normalized: bool = False) -> ExportTower:
    """Return a copy of a CLIP's text tower for export.

    It maps ``text`` ``[batch, length]`` to ``embedding`` ``[batch, width]``.

    Args:
        tower: a module with ``encode_text``.
        tokens: token ids of at least two example texts, ``[n, length]``.
        normalized: normalize the embedding to length 1.
    """
    module = _prepare(_TextTower(tower, normalized))
    return ExportTower("text", module, tokens, "text", normalized=normalized, file_stem="text")


class _ImageTower(nn.Module):
    def __init__(self, adapter: TowerAdapter, output_names: tuple[str, ...], normalized: bool) -> None:
        super().__init__()
        self.tower, self.projection, self.adapter = adapter.tower, adapter.projection, adapter
        self.output_names, self.normalized = output_names, normalized

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        state = last_state(self.adapter, images)
        outputs = []
        for name in self.output_names:
            if name == "patches":
                outputs.append(self.adapter.features(self.adapter.norm(state))[1])
            else:
                embedding = self.adapter.embed(state)
                outputs.append(F.normalize(embedding, dim=-1) if self.normalized else embedding)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _TextTower(nn.Module):
    def __init__(self, tower: nn.Module, normalized: bool) -> None:
        super().__init__()
        self.tower, self.normalized = tower, normalized

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tower.encode_text(tokens, normalize=self.normalized)


def _prepare(module: nn.Module) -> nn.Module:
    """Return a float32 copy on the CPU in eval mode, without gradients."""
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
