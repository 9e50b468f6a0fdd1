"""One object for an encoder with all that belongs to it, whichever library it comes from.

A model directory is what its library reads (``open_clip_config.json`` + ``open_clip_model.safetensors``, or timm's or
transformers' ``config.json`` + ``model.safetensors``) with ``dgmr_tp.json``, which holds the hidden widths, ``README.md``,
which says how to open it, and once pruned ``plan.json``. ``load_pruned`` opens every one; the plain library opens it too
wherever its config can say the widths.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dgmr_tp.encoders.checkpoint import Weights
from dgmr_tp.encoders.hub import HUB, local_folder
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Plan, TowerAdapter, find_sites
from dgmr_tp.utils.lazy_imports import require

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo_clip"
SIDECAR = "dgmr_tp.json"
TEXT_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
"""How the names of a tokenizer's files begin."""


@dataclass
class OpenedModel:
    """An encoder, the model it is part of, and what is needed to feed and to save it."""

    library: str
    """``open_clip``, ``timm`` or ``transformers``."""
    module: nn.Module
    """The whole model: a CLIP with its text tower, or the vision model alone."""
    tower_path: str
    """Where in ``module`` the vision tower stands, such as ``visual``; empty where it is the module itself."""
    name: str
    """What it is and where it came from, such as ``open_clip:ViT-g-14``."""
    preprocess: Callable[[Any], Tensor]
    """PIL image to ``[3, height, width]``, as the model was evaluated."""
    preprocess_config: dict[str, Any]
    """The same in words: size, mean, std, and what else the library says."""
    config: dict[str, Any] = field(default_factory=dict)
    """open_clip: its model_cfg. The models of the other libraries carry their own."""
    tokenizer: Callable[[list[str]], Tensor] | None = None
    """Texts to token ids ``[n, length]``."""
    source: Path | None = None
    """The model directory it was read from, whose tokenizer files come along."""

    @property
    def tower(self) -> nn.Module:
        """The vision module."""
        return self.module.get_submodule(self.tower_path)

    @cached_property
    def adapter(self) -> TowerAdapter:
        """The adapter that runs the tower block by block.

        Raises:
            DgmrError: no adapter is known for the tower's class.
        """
        outside = {"projection": self.module.visual_projection} if hasattr(self.module, "visual_projection") else {}
        return adapt(self.tower, self.name, **outside)

    @property
    def text(self) -> nn.Module | None:
        """The text tower, without the vision tower: has ``encode_text(tokens, normalize=False)``. None, if there is none."""
        if not hasattr(self.module, "encode_text") and not hasattr(self.module, "get_text_features"):
            return None
        alone = copy.copy(self.module)
        alone._modules = {
            name: child
            for name, child in self.module._modules.items()
            if name not in (self.tower_path.partition(".")[0], "visual_projection")
        }
        return alone if hasattr(alone, "encode_text") else _room(self.library).TextTower(alone)

    @property
    def image_size(self) -> int:
        """Height and width of the images that ``preprocess`` gives."""
        size = self.preprocess_config.get("size") or self.preprocess_config["input_size"]
        return size if isinstance(size, int) else size[-1]

    def copy(self) -> OpenedModel:
        """The same model with weights of its own."""
        return replace(self, module=copy.deepcopy(self.module), config=copy.deepcopy(self.config))

    def save(self, directory: Path, plan: Plan | None = None, *, final: Path | None = None) -> None:
        """Write a model directory; it must not exist yet, and appears whole or not at all.

        Args:
            directory: where to.
            plan: the plan that the encoder was pruned by, kept beside the weights.
            final: where the directory will be moved to, if it will; its README and its config name that place.
        """
        directory = Path(directory)
        aside = unfinished(directory)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        room = _room(self.library)
        if hasattr(room, "save_weights"):
            room.save_weights(self, aside)
        else:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.module.state_dict().items()}
            save_file(tensors, aside / room.WEIGHTS, metadata={"format": "pt"})
        self.finish(directory, plan, final or directory)

    def finish(self, directory: Path, plan: Plan | None, final: Path) -> None:
        """Complete the unfinished directory, which holds the weights, and give it its name."""
        aside = unfinished(directory)
        opens = _room(self.library).save_config(self, aside, final)
        if hasattr(self.tokenizer, "save_pretrained"):  # open_clip looks for a Hugging Face tokenizer in the directory
            self.tokenizer.save_pretrained(str(aside))
        if self.source is not None:
            for file in self.source.glob("*"):
                if file.name.startswith(TEXT_FILES) and not (aside / file.name).exists():
                    shutil.copyfile(file, aside / file.name)
        if plan is not None:
            (aside / "plan.json").write_text(plan.to_json() + "\n")
        hidden = {site.name: site.hidden for site in find_sites(self.tower)}
        sidecar = {"format": 1, "library": self.library, "encoder": self.name, "hidden": hidden}
        (aside / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        (aside / "README.md").write_text(_readme(self, final, opens, hidden, moved=(aside / "trunk").is_dir()))
        for file in aside.rglob("*"):  # safetensors keeps its files from other users; a server is another user
            file.chmod(0o755 if file.is_dir() else 0o644)
        os.rename(aside, directory)

    @property
    def weights_name(self) -> str:
        """The file of a model directory that holds the weights."""
        return _room(self.library).WEIGHTS


def unfinished(directory: Path) -> Path:
    """Where a model directory is written before it gets its name.

    Raises:
        DgmrError: there is something by that name.
    """
    if directory.exists():
        raise DgmrError(f"{directory} exists already; name a new directory")
    return directory.with_name(f".{directory.name}.partial")


def _room(library: str) -> Any:
    """The module that opens and saves a library's models."""
    return require(f"dgmr_tp.encoders.{library}_models", "encoders")


def _readme(model: OpenedModel, directory: Path, opens: str | None, hidden: dict[str, int], moved: bool) -> str:
    widths = sorted(set(hidden.values()))
    lines = [
        f"# {model.name}, hidden width {widths[0] if len(widths) == 1 else f'{widths[0]} to {widths[-1]}'}",
        "",
        "Opens with dgmr-tp:",
        "",
        "```python",
        f"import dgmr_tp\n\nmodel = dgmr_tp.load_pruned({str(directory)!r})  # model.module, model.preprocess, model.adapter",
        "```",
        "",
    ]
    if opens is None:
        lines.append(
            f"{model.library} alone does not open it: it does not know this tower, or its configuration cannot say these hidden widths."
        )
    else:
        lines += [
            f"and with {model.library} alone, dgmr-tp not installed:",
            "",
            "```python",
            f"import {model.library}\n\nmodel = {opens.format(path=directory)}",
            "```",
        ]
        if moved:
            lines += [
                "",
                "For this its config holds the directory's absolute path; after a move run `dgmr-tp relocate DIRECTORY`.",
            ]
    return "\n".join(lines) + "\n"


ADAPTERS = {
    "open_clip.VisionTransformer": "open_clip_vit.OpenCLIPViT",
    "open_clip.TimmModel": "open_clip_timm.OpenCLIPTimm",
    "timm.VisionTransformer": "timm_vit.TimmViT",
    "timm.Eva": "timm_eva.TimmEva",
    "timm.SwinTransformer": "timm_swin.TimmSwin",
    "timm.SwinTransformerV2": "timm_swin.TimmSwin",
    "transformers.CLIPVisionModel": "transformers_vit.TransformersViT",
    "transformers.SiglipVisionModel": "transformers_vit.TransformersViT",
    "transformers.Dinov2Model": "transformers_vit.TransformersViT",
    "transformers.InternVLVisionModel": "transformers_vit.TransformersViT",
}
"""Library and class of a tower, and where its walk stands; looked up by name, so that only the library in use is loaded."""


def has_adapter(module: nn.Module) -> bool:
    """Whether :func:`adapt` knows the class of ``module``."""
    return _adapter_path(module) is not None


def _adapter_path(module: nn.Module) -> str | None:
    known = (ADAPTERS.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}") for cls in type(module).__mro__)
    return next((walk for walk in known if walk), None)


def adapt(module: nn.Module, name: str | None = None, **outside: nn.Module) -> TowerAdapter:
    """The walk of a vision tower; ``outside`` is what its walk takes beside it.

    Raises:
        DgmrError: no walk is known for this class; such a model can be pruned, but not recovered.
    """
    walk = _adapter_path(module)
    if walk is None:
        raise DgmrError(
            f"no walk is known for {type(module).__module__}.{type(module).__name__}: it can be pruned with MLPPruner, "
            f"but recovery and distillation need one; known: {', '.join(ADAPTERS)}"
        )
    where, cls = walk.split(".")
    return getattr(require(f"dgmr_tp.encoders.{where}", "encoders"), cls)(
        module, name or type(module).__name__, **outside
    )


def open_model(
    source: str, pretrained: str | None = None, *, image_size: int | None = None, weights: Weights = "memory"
) -> OpenedModel:
    """Open an encoder.

    Args:
        source: ``open_clip:NAME``, ``timm:NAME``, a model directory of any of the three libraries (also as ``local-dir:PATH``
            or ``hf-hub:org/repo``), or ``demo``, the small CLIP that ships with the package.
        pretrained: for a name: the library's tag, or a checkpoint file as it was published (``.safetensors``, the
            ``.index.json`` of shards, or a ``.pt``, ``.pth`` or ``.bin`` of nothing but tensors; ``hf-hub:org/repo/file`` too),
            with hidden widths of its own or not; ``none`` for random weights. For open_clip also ``TAG+FILE``: everything by the
            tag, then the vision tower of the file. Not for directories.
        image_size: for a name: height and width of the images, where they are not to be the library's; positions are
            interpolated.
        weights: ``memory``; ``disk``: memory-mapped, enough to prune from file to file, not to run; ``none``: on the meta
            device, for its shapes alone, and nothing is read but the configuration.

    Raises:
        DgmrError: unknown name, no weights named, or a file that cannot be read; names the file and what to do.
    """
    kind, _, name = source.partition(":")
    if kind in ("open_clip", "timm") and name:
        if pretrained is None and weights != "none":
            raise DgmrError(
                f"{source}: name the weights with --pretrained (a tag or a file; 'none' for random weights)"
            )
        return _room(kind).by_name(name, None if pretrained == "none" else pretrained, weights, image_size)
    if image_size is not None:
        raise DgmrError(f"image_size {image_size} goes with open_clip:NAME or timm:NAME; {source} has its own")
    if pretrained is not None:
        raise DgmrError(
            f"--pretrained {pretrained} goes with open_clip:NAME or timm:NAME; {source} holds its own weights"
        )
    directory = DEMO if source == "demo" else local_folder(source.removeprefix("local-dir:"), weights=weights != "none")
    if not directory.is_dir():
        raise DgmrError(
            f"unknown model {source!r}: give open_clip:NAME, timm:NAME, a model directory, hf-hub:ORG/REPO, or demo"
        )
    return load_pruned(directory, name=source if source == "demo" or source.startswith(HUB) else None, weights=weights)


def load_pruned(directory: str | Path, name: str | None = None, *, weights: Weights = "memory") -> OpenedModel:
    """Open a model directory (or ``hf-hub:org/repo``), pruned or not, with whatever hidden width each block has.

    Args:
        directory: of any of the three libraries.
        name: what it is called in plans and reports. Default: the encoder that it was made from.
        weights: as for :func:`open_model`.

    Raises:
        DgmrError: it is no model directory, or a file in it is damaged or does not fit; names the file or the key.
    """
    directory = local_folder(str(directory), weights=weights != "none")
    sidecar = read_json(directory / SIDECAR) if (directory / SIDECAR).exists() else {}
    name = name or sidecar.get("encoder") or str(directory)
    if (directory / "open_clip_config.json").exists():
        opened = _room("open_clip").from_directory(directory, name, weights)
    elif not (directory / "config.json").exists():
        raise DgmrError(f"{directory} is no model directory: it holds neither open_clip_config.json nor config.json")
    elif "architecture" in read_json(directory / "config.json"):
        opened = _room("timm").from_directory(directory, name, weights)
    else:
        opened = _room("transformers").from_directory(directory, name, weights, sidecar.get("hidden"))
    return replace(opened, source=directory)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DgmrError(f"cannot read {path}: {first_line(error)}") from error


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
