"""One object for an encoder with all that belongs to it, whichever library it comes from.

A model directory is what its library reads (``open_clip_config.json`` + ``open_clip_model.safetensors``, or timm's
``config.json`` + ``model.safetensors``) and, once pruned, ``dgmr_tp.json`` with the hidden widths and ``plan.json``. With
one width for all blocks the plain library opens it too; ``load_pruned`` opens every one.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.extras import require
from dgmr_tp.pruning import Encoder, Plan, find_sites

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo_clip"
SIDECAR = "dgmr_tp.json"


@dataclass
class OpenedModel:
    """An encoder, the model it is part of, and what is needed to feed and to save it."""

    library: str
    """``open_clip`` or ``timm``."""
    module: nn.Module
    """The whole model: a CLIP with its text tower, or the timm model."""
    encoder: Encoder
    """Its vision tower as a walk."""
    preprocess: Callable[[Any], Tensor]
    """PIL image to ``[3, height, width]``, as the model was evaluated."""
    preprocess_config: dict[str, Any]
    """The same in words: size, mean, std, interpolation, resize_mode."""
    config: dict[str, Any]
    """open_clip: its model_cfg. timm: nothing, the model carries its own."""
    tokenizer: Callable[[list[str]], Tensor] | None = None

    @property
    def image_size(self) -> int:
        """Height and width of the images that ``preprocess`` gives."""
        size = self.preprocess_config.get("size") or self.preprocess_config["input_size"]
        return size if isinstance(size, int) else size[-1]

    def copy(self) -> OpenedModel:
        """The same model with weights of its own."""
        module = copy.deepcopy(self.module)
        return OpenedModel(
            self.library,
            module,
            as_encoder(getattr(module, "visual", module), self.encoder.name),
            self.preprocess,
            self.preprocess_config,
            copy.deepcopy(self.config),
            self.tokenizer,
        )

    def save(self, directory: Path, plan: Plan | None = None) -> None:
        """Write a model directory; it must not exist yet, and appears whole or not at all.

        Args:
            directory: where to.
            plan: the plan that the encoder was pruned by, kept beside the weights.
        """
        directory = Path(directory)
        if directory.exists():
            raise DgmrError(f"{directory} exists already; name a new directory")
        aside = directory.with_name(f".{directory.name}.partial")
        aside.mkdir(parents=True, exist_ok=True)
        hidden = {site.name: site.hidden for site in find_sites(self.encoder.module)}
        if self.library == "open_clip":
            _save_open_clip(self, aside, hidden)
        else:
            _save_timm(self, aside, hidden)
        if plan is not None:
            (aside / "plan.json").write_text(plan.to_json() + "\n")
        sidecar = {"format": 1, "library": self.library, "encoder": self.encoder.name, "hidden": hidden}
        (aside / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
        os.rename(aside, directory)


def as_encoder(module: nn.Module, name: str | None = None) -> Encoder:
    """The walk of a vision tower.

    Raises:
        DgmrError: no walk is known for this class; such a model can be pruned, but not recovered.
    """
    name = name or type(module).__name__
    for library, path in (("open_clip", "dgmr_tp.encoders.open_clip_vit.OpenCLIPViT"), ("timm", "dgmr_tp.encoders.timm_vit.TimmViT")):
        if not any(cls.__module__.startswith(f"{library}.") and cls.__name__ == "VisionTransformer" for cls in type(module).__mro__):
            continue
        where, walk = path.rsplit(".", 1)
        return getattr(require(where, "encoders"), walk)(module, name)
    raise DgmrError(
        f"no walk is known for {type(module).__module__}.{type(module).__name__}: it can be pruned with MLPPruner, "
        "but recovery and distillation need one; known: open_clip's and timm's VisionTransformer"
    )


def open_model(source: str, pretrained: str | None = None) -> OpenedModel:
    """Open an encoder.

    Args:
        source: ``open_clip:NAME``, ``timm:NAME``, a model directory (also as ``local-dir:PATH``), or ``demo``, the small CLIP
            that ships with the package.
        pretrained: for a name: the library's tag, or a checkpoint file (safetensors, or a pickle of nothing but
            tensors); ``none`` for random weights. Not for directories.

    Raises:
        DgmrError: unknown name, no weights named, or a file that cannot be read; names the file and what to do.
    """
    kind, _, name = source.partition(":")
    if kind in ("open_clip", "timm") and name:
        if pretrained is None:
            raise DgmrError(f"{source}: name the weights with --pretrained (a tag or a file; 'none' for random weights)")
        return (_open_clip_by_name if kind == "open_clip" else _timm_by_name)(name, None if pretrained == "none" else pretrained)
    if pretrained is not None:
        raise DgmrError(f"--pretrained {pretrained} goes with open_clip:NAME or timm:NAME; {source} holds its own weights")
    directory = DEMO if source == "demo" else Path(source.removeprefix("local-dir:"))
    if not directory.is_dir():
        raise DgmrError(f"unknown model {source!r}: give open_clip:NAME, timm:NAME, a model directory, or demo")
    return load_pruned(directory, name="demo" if source == "demo" else None)


def load_pruned(directory: str | Path, name: str | None = None) -> OpenedModel:
    """Open a model directory, pruned or not, with whatever hidden width each block has.

    Raises:
        DgmrError: it is no model directory, or a file in it is damaged or does not fit; names the file or the key.
    """
    directory = Path(directory)
    sidecar = _read_json(directory / SIDECAR) if (directory / SIDECAR).exists() else {}
    name = name or sidecar.get("encoder") or str(directory)
    if (directory / "open_clip_config.json").exists():
        return _open_clip_from_directory(directory, name)
    if (directory / "config.json").exists():
        return _timm_from_directory(directory, name)
    raise DgmrError(f"{directory} is no model directory: it holds neither open_clip_config.json nor config.json")


def _open_clip_by_name(name: str, pretrained: str | None) -> OpenedModel:
    open_clip = require("open_clip", "encoders")
    config = open_clip.get_model_config(name)
    if config is None:
        raise DgmrError(f"unknown model open_clip:{name}{_nearest(name, open_clip.list_models())}")
    try:
        module = open_clip.create_model(name, pretrained=pretrained)
    except Exception as error:  # damaged file, unknown tag, no network: open_clip raises many kinds
        raise DgmrError(f"open_clip:{name}: cannot load pretrained {pretrained!r}: {_first_line(error)}") from error
    config = copy.deepcopy(config)
    if any(type(layer).__name__ == "QuickGELU" for layer in module.modules()):
        config["quick_gelu"] = True  # some weights ask for it, whatever the config says
    return _opened_open_clip(module, config, name, f"open_clip:{name}")


def _open_clip_from_directory(directory: Path, name: str) -> OpenedModel:
    open_clip = require("open_clip", "encoders")
    config = _read_json(directory / "open_clip_config.json")
    schema = f"local-dir:{directory.resolve()}"
    try:
        module = open_clip.create_model(schema, load_weights=False)
    except Exception as error:  # whatever a wrong config leads to inside open_clip
        raise DgmrError(f"{directory}/open_clip_config.json describes no model: {_first_line(error)}") from error
    _load_by_shape(module, directory / "open_clip_model.safetensors")
    return _opened_open_clip(module, config["model_cfg"], schema, name)


def _opened_open_clip(module: nn.Module, config: dict[str, Any], schema: str, name: str) -> OpenedModel:
    open_clip = require("open_clip", "encoders")
    preprocess_config = dict(module.visual.preprocess_cfg)
    return OpenedModel(
        "open_clip",
        module,
        as_encoder(module.visual, name),
        open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess_config), is_train=False),
        preprocess_config,
        config,
        open_clip.get_tokenizer(schema),
    )


def _save_open_clip(model: OpenedModel, directory: Path, hidden: dict[str, int]) -> None:
    config = copy.deepcopy(model.config)
    if (uniform := _uniform(hidden)) is not None:
        width = config["vision_cfg"]["width"]
        config["vision_cfg"]["mlp_ratio"] = (uniform + 0.5) / width  # int(width · ratio) must give it back
    preprocess = {key: model.preprocess_config[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.module.state_dict().items()}
    save_file(tensors, directory / "open_clip_model.safetensors", metadata={"format": "pt"})


def _timm_by_name(name: str, pretrained: str | None) -> OpenedModel:
    timm = require("timm", "encoders")
    if not timm.is_model(name):
        raise DgmrError(f"unknown model timm:{name}{_nearest(name, timm.list_models())}")
    checkpoint = pretrained if pretrained and Path(pretrained).exists() else ""
    try:
        tagged = f"{name}.{pretrained}" if pretrained and not checkpoint else name
        module = timm.create_model(tagged, pretrained=tagged != name)
        if checkpoint:
            timm.models.load_checkpoint(module, checkpoint, weights_only=True)
    except Exception as error:
        raise DgmrError(f"timm:{name}: cannot load pretrained {pretrained!r}: {_first_line(error)}") from error
    return _opened_timm(module, f"timm:{name}")


def _timm_from_directory(directory: Path, name: str) -> OpenedModel:
    timm = require("timm", "encoders")
    if "architecture" not in _read_json(directory / "config.json"):
        raise DgmrError(f"{directory}/config.json names no architecture of timm's; models of transformers cannot be opened yet")
    try:
        module = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=False)
    except Exception as error:  # whatever a wrong config leads to inside timm
        raise DgmrError(f"{directory}/config.json describes no model: {_first_line(error)}") from error
    _load_by_shape(module, directory / "model.safetensors")
    return _opened_timm(module, name)


def _opened_timm(module: nn.Module, name: str) -> OpenedModel:
    data = require("timm.data", "encoders")
    config = data.resolve_data_config({}, model=module)
    return OpenedModel("timm", module, as_encoder(module, name), data.create_transform(**config), config, {})


def _save_timm(model: OpenedModel, directory: Path, hidden: dict[str, int]) -> None:
    timm = require("timm", "encoders")
    uniform = _uniform(hidden)
    width = model.module.embed_dim
    model_args = {} if uniform is None else {"mlp_ratio": (uniform + 0.5) / width}
    timm.models.save_for_hf(model.module, directory, model_args=model_args, safe_serialization=True)


def _uniform(hidden: dict[str, int]) -> int | None:
    widths = Counter(hidden.values())
    return next(iter(widths)) if len(widths) == 1 else None


def _load_by_shape(module: nn.Module, path: Path) -> None:
    """Load ``path`` strictly after giving every Linear and norm the width that its tensors have there."""
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DgmrError(f"cannot read {path}: {_first_line(error)}; the file is missing, cut short or damaged") from error
    for name, layer in module.named_modules():
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.ndim == 0 or not isinstance(layer, nn.Linear | nn.LayerNorm) or weight.shape == layer.weight.shape:
            continue
        layer.weight = nn.Parameter(layer.weight.new_empty(weight.shape))
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        else:
            layer.normalized_shape = tuple(weight.shape)
        if layer.bias is not None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(layer.bias.new_empty(tensors[f"{name}.bias"].shape))
    expected = module.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise DgmrError(f"{path} has no tensor {key!r}, which its config asks for")
        if key not in expected:
            raise DgmrError(f"{path} holds a tensor {key!r} that its config does not know")
        if tensors[key].shape != expected[key].shape:
            raise DgmrError(f"{path}: {key!r} is {tuple(tensors[key].shape)}, its config says {tuple(expected[key].shape)}")
    module.load_state_dict(tensors)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DgmrError(f"cannot read {path}: {_first_line(error)}") from error


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
