"""An encoder with everything that belongs to it, whatever library it comes from: opened, saved and described here.

A model directory contains what its library reads: ``open_clip_config.json`` and ``open_clip_model.safetensors``, or
timm's or transformers' ``config.json`` and ``model.safetensors``. It also contains ``dgmr_tp.json`` with the hidden
widths, ``README.md`` with the code that opens it, and after pruning ``plan.json``. ``load_pruned`` opens all of them.
The stock library opens a directory if its config can express the hidden widths.

:data:`ADAPTERS` is the one place where a new family of towers is registered.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dgmr_tp.encoders.checkpoint import Weights
from dgmr_tp.encoders.hub import HUB, local_folder
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Plan, Site, TowerAdapter, find_sites
from dgmr_tp.pruning.plan import weight_sha256
from dgmr_tp.pruning.sites import sites_inside
from dgmr_tp.utils.compute import DTYPES, ComputeConfig, dtype_name, on_device
from dgmr_tp.utils.files import check_room, staging_directory
from dgmr_tp.utils.lazy_imports import require

logger = logging.getLogger(__name__)
DEMO = Path(__file__).resolve().parent.parent / "data" / "demo_clip"
"""Model directory of the small CLIP that ships with the package."""
NAMED_LIBRARIES = ("open_clip", "timm")
"""Libraries whose models open by name, as ``LIBRARY:NAME``."""
SIDECAR_NAME = "dgmr_tp.json"
"""File of a model directory with the library, the encoder's name and the hidden widths."""
TOKENIZER_FILE_PREFIXES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
"""Prefixes of the names of a tokenizer's files."""

V = TypeVar("V")


@dataclass
class OpenedModel:
    """An encoder, the model that contains it, and what is needed to feed and to save it."""

    library: str
    """``open_clip``, ``timm`` or ``transformers``. Empty for a bare tower (:func:`wrap_tower`)."""
    module: nn.Module
    """The whole model: a CLIP with its text tower, or the vision model alone. In float32, unless it is on disk."""
    tower_path: str
    """Path of the vision tower in ``module``, such as ``visual``. Empty if the tower is ``module``."""
    name: str
    """The model and its library, such as ``open_clip:ViT-g-14``."""
    preprocess: Callable[[Any], Tensor]
    """Maps a PIL image to ``[3, height, width]``, with the preprocessing of the model's evaluation."""
    preprocess_config: dict[str, Any]
    """Description of ``preprocess``: size, mean, std, and the library's other settings. Empty if it is unknown."""
    config: dict[str, Any] = field(default_factory=dict)
    """open_clip's model_cfg. Models of the other libraries contain their config."""
    tokenizer: Callable[[list[str]], Tensor] | None = None
    """Maps texts to token ids ``[n, length]``."""
    dtype: torch.dtype = torch.float32
    """Dtype of the checkpoint, in which :meth:`save` writes the weights."""
    device: torch.device | None = None
    """Device on which images run through the tower (:meth:`running`). None: where the tower is."""
    precision: torch.dtype = torch.float32
    """:attr:`TowerAdapter.precision` of the adapter."""
    source: Path | None = None
    """The model directory that was opened. :meth:`save` copies its tokenizer files."""

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
        adapter = adapt(self.tower, self.name, **outside)
        adapter.precision = self.precision
        return adapter

    def running(self) -> AbstractContextManager[None]:
        """Return a context in which the model is on :attr:`device`."""
        return on_device(self.module, self.device)

    @property
    def has_adapter(self) -> bool:
        """True if :attr:`adapter` exists. Without one, a tower can be pruned but not recovered or distilled."""
        if not has_adapter(self.tower):
            return False
        try:
            return self.adapter is not None
        except DgmrError:
            return False

    @cached_property
    def sites(self) -> list[Site]:
        """MLP sites of the tower, found once. With an adapter, only those inside the residual blocks.

        They describe the tower at the first access. Prune a :meth:`copy` to keep them valid.

        Raises:
            DgmrError: the tower has no MLP that can be pruned.
        """
        if not self.has_adapter:
            return find_sites(self.tower)
        if not self.adapter.sites:
            raise DgmrError(
                f"no block of {self.name} holds an MLP that can be cut by itself. Check whether the MLP shares its "
                "projection with attention; such a block is not supported."
            )
        return self.adapter.sites

    @cached_property
    def weight_hashes(self) -> dict[str, str]:
        """:func:`~dgmr_tp.pruning.plan.weight_sha256` by site name, computed once. Valid as long as :attr:`sites`."""
        return {site.name: weight_sha256(self.tower, site) for site in self.sites}

    @property
    def text(self) -> nn.Module | None:
        """The text tower with ``encode_text(tokens, normalize=False)``, without the vision tower.

        None if there is none.
        """
        if not hasattr(self.module, "encode_text") and not hasattr(self.module, "get_text_features"):
            return None
        vision_modules = (self.tower_path.partition(".")[0], "visual_projection")
        text_only = copy.copy(self.module)
        text_only._modules = {name: child for name, child in self.module._modules.items() if name not in vision_modules}
        return text_only if hasattr(text_only, "encode_text") else _loader(self.library).TextTower(text_only)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that ``preprocess`` returns.

        None if the preprocessing is unknown.
        """
        if not self.preprocess_config:
            return None
        size = self.preprocess_config.get("size") or self.preprocess_config["input_size"]
        height, width = (size, size) if isinstance(size, int) else size[-2:]
        return int(height), int(width)

    @property
    def weights_name(self) -> str:
        """Name of the weights file in a model directory of this library."""
        return _loader(self.library).WEIGHTS_NAME

    def with_compute(self, config: ComputeConfig) -> OpenedModel:
        """Return the same model for running as ``config`` says. The module is shared, and stays where it is.

        Raises:
            DgmrError: the device does not exist.
        """
        dtype = DTYPES[config.save_dtype] if config.save_dtype else self.dtype
        return replace(self, device=config.choose_device(), precision=config.choose_dtype(), dtype=dtype)

    def copy(self) -> OpenedModel:
        """Return the same model with its own weights. Sites, hashes and adapter are computed anew."""
        return replace(self, module=copy.deepcopy(self.module), config=copy.deepcopy(self.config))

    def save(
        self,
        directory: Path,
        plan: Plan | None = None,
        *,
        final: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a model directory atomically.

        Args:
            directory: a path that does not exist yet.
            plan: the plan that the encoder was pruned by. It is stored next to the weights.
            final: the path that the directory will be moved to, if any. Its README and its config name that path.
            dtype: of the weights in the file. Default: :attr:`dtype`. Weights that float16 cannot represent are
                written in float32, with a warning.

        Raises:
            DgmrError: ``directory`` exists or cannot be written, or the model is a bare tower.
        """
        directory = Path(directory)
        loader = _loader(self.library)
        with staging_directory(directory) as staging:
            state = self.module.state_dict()
            tensors = _in_dtype(state, dtype or self.dtype)
            if not all(map(_is_finite, tensors.values())):
                name = dtype_name(dtype or self.dtype)
                logger.warning("%s has weights out of the range of %s. They are saved in float32.", self.name, name)
                tensors = _in_dtype(state, torch.float32)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            check_room(staging.parent, size, f"the model {self.name}")
            if hasattr(loader, "save_weights"):
                loader.save_weights(self, staging, tensors)
            else:
                save_file(tensors, staging / loader.WEIGHTS_NAME, metadata={"format": "pt"})
            self.finish(staging, plan, final or directory)

    def finish(self, staging: Path, plan: Plan | None, final: Path) -> None:
        """Add everything but the weights to a directory that contains the weights already.

        Args:
            staging: the directory.
            plan: as for :meth:`save`.
            final: the path that the directory will be moved to.
        """
        module_sites = find_sites(self.module)
        stock_code = _loader(self.library).save_config(self, staging, final, module_sites)
        if hasattr(self.tokenizer, "save_pretrained"):  # open_clip reads a Hugging Face tokenizer from the directory
            self.tokenizer.save_pretrained(str(staging))
        if self.source is not None:
            for file in self.source.glob("*"):
                if file.name.startswith(TOKENIZER_FILE_PREFIXES) and not (staging / file.name).exists():
                    shutil.copyfile(file, staging / file.name)
        if plan is not None:
            (staging / "plan.json").write_text(plan.to_json() + "\n", "utf-8")
        hidden = {site.name: site.hidden for site in sites_inside(module_sites, self.tower_path)}
        dtype = dtype_name(self.dtype)
        sidecar = {"format": 1, "library": self.library, "encoder": self.name, "dtype": dtype, "hidden": hidden}
        (staging / SIDECAR_NAME).write_text(json.dumps(sidecar, indent=1) + "\n", "utf-8")
        has_trunk = (staging / "trunk").is_dir()
        readme = _readme(self, final, stock_code, hidden, has_trunk)
        (staging / "README.md").write_text(readme, "utf-8", errors="surrogateescape")
        for file in staging.rglob("*"):  # safetensors writes files that only their owner can read
            file.chmod(0o755 if file.is_dir() else 0o644)


def _loader(library: str) -> Any:
    """Import the module that opens and saves the models of ``library``."""
    if not library:
        raise DgmrError(
            "a bare tower belongs to no library that could write its config. Save its state_dict, or open the encoder "
            "with open_model."
        )
    return require(f"dgmr_tp.encoders.{library}_models", "encoders")


def _readme(
    model: OpenedModel, directory: Path, stock_code: str | None, hidden: dict[str, int], has_trunk: bool
) -> str:
    """Return the text of a model directory's README.

    Args:
        model: the model of the directory.
        directory: its final path.
        stock_code: Python expression by which the stock library opens ``{path}``, or None if it cannot.
        hidden: hidden widths by site name.
        has_trunk: True if the config contains the absolute path of a timm trunk.
    """
    widths = sorted(set(hidden.values()))
    lines = [
        f"# {model.name}, hidden width {widths[0] if len(widths) == 1 else f'{widths[0]} to {widths[-1]}'}",
        "",
        "Opens with dgmr-tp:",
        "",
        "```python",
        "import dgmr_tp",
        "",
        f"model = dgmr_tp.load_pruned({str(directory)!r})  # model.module, model.preprocess, model.adapter",
        "```",
        "",
    ]
    if stock_code is None:
        lines.append(
            f"{model.library} alone does not open it. It has no such tower, or its config cannot express these hidden "
            "widths."
        )
    else:
        lines += [
            f"Opens with {model.library} alone, without dgmr-tp:",
            "",
            "```python",
            f"import {model.library}",
            "",
            f"model = {stock_code.format(path=directory)}",
            "```",
        ]
        if has_trunk:
            lines += [
                "",
                "For this, its config contains the directory's absolute path. Run `dgmr-tp relocate DIRECTORY` after "
                "a move.",
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
"""Adapters by the tower's class: ``library.Class`` to ``module.Class`` in ``dgmr_tp.encoders``.

The keys are names, so that only the library in use is imported. Subclasses use the adapter of their parent class.
"""


def find_by_class(registry: Mapping[str, V], module: nn.Module) -> V | None:
    """Return the entry of the first class of ``module``'s MRO that ``registry`` names, or None.

    Args:
        registry: keys are ``library.Class``, such as ``timm.Eva``.
        module: the module whose class is looked up.
    """
    for cls in type(module).__mro__:
        key = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        if key in registry:
            return registry[key]
    return None


def has_adapter(module: nn.Module) -> bool:
    """Return whether :data:`ADAPTERS` names the class of ``module`` or one of its parent classes."""
    return find_by_class(ADAPTERS, module) is not None


def adapt(tower: nn.Module, name: str | None = None, **outside: nn.Module) -> TowerAdapter:
    """Return the adapter of a vision tower.

    Args:
        tower: the vision module.
        name: name of the encoder in messages and plans. Default: the class name of ``tower``.
        outside: modules outside the tower that its adapter takes, such as ``projection``.

    Raises:
        DgmrError: no adapter is known for this class. The message says whether the tower can be pruned.
    """
    path = find_by_class(ADAPTERS, tower)
    if path is None:
        problem, remedy = "it cannot be recovered or distilled", "Prune it with MLPPruner, or use"
        try:
            find_sites(tower)
        except DgmrError:
            problem, remedy = f"{problem}, and it has no MLP that can be pruned", "Use"
        raise DgmrError(
            f"no adapter is known for {type(tower).__module__}.{type(tower).__name__}, so {problem}. {remedy} one of "
            f"{', '.join(ADAPTERS)}."
        )
    module_name, class_name = path.split(".")
    adapter_class = getattr(require(f"dgmr_tp.encoders.{module_name}", "encoders"), class_name)
    return adapter_class(tower, name or type(tower).__name__, **outside)


def wrap_tower(tower: nn.Module) -> OpenedModel:
    """Return a bare vision module as an :class:`OpenedModel` without preprocessing, library and text tower.

    It takes preprocessed batches. :meth:`OpenedModel.save` raises DgmrError.
    """

    def preprocess(image: Any) -> Tensor:
        raise DgmrError(
            "a folder of images needs the encoder's preprocessing, which a bare tower does not have. Open the encoder "
            "with open_model, or pass preprocessed batches."
        )

    return OpenedModel("", tower, "", type(tower).__name__, preprocess, {})


def is_library_name(source: str) -> bool:
    """Return whether ``source`` names a library's model: ``open_clip:NAME`` or ``timm:NAME``."""
    library, _, name = source.partition(":")
    return library in NAMED_LIBRARIES and bool(name)


def is_model_name(source: str) -> bool:
    """Return whether ``source`` names a model independently of the working directory. Otherwise it is a path."""
    return is_library_name(source) or source.startswith(HUB) or source == "demo"


def open_model(
    source: str, pretrained: str | None = None, *, image_size: int | None = None, weights: Weights = "memory"
) -> OpenedModel:
    """Open an encoder.

    Args:
        source: ``open_clip:NAME``, ``timm:NAME``, ``timm:NAME.TAG``, a model directory of any of the three libraries
            (also as ``local-dir:PATH`` or ``hf-hub:org/repo``), or ``demo``, the small CLIP that ships with the
            package.
        pretrained: for a NAME: the library's tag, or a published checkpoint file (``.safetensors``, the ``.index.json``
            of shards, a ``.pt``, ``.pth`` or ``.bin`` that contains only tensors, or ``hf-hub:org/repo/file``). The
            checkpoint may have other hidden widths. ``none`` means random weights. open_clip also takes ``TAG+FILE``:
            all weights of the tag, with the vision tower of the file. Not for directories.
        image_size: for a NAME: height and width of the images in pixels. Positions are interpolated. Default: the
            library's.
        weights: ``memory``; ``disk``, memory-mapped, which can be pruned from file to file but not run; or ``none``,
            shapes on the meta device, for which only the config is read.

    Raises:
        DgmrError: the name is unknown, no weights are named, or a file cannot be read; names the file and the remedy.
    """
    library, _, name = source.partition(":")
    if is_library_name(source):
        if library == "timm" and pretrained is None:  # timm:NAME.TAG names its weights
            name, _, tag = name.partition(".")
            pretrained = tag or None
        if pretrained is None and weights != "none":
            raise DgmrError(
                f"{source} needs weights. Name them with --pretrained (a tag or a file, or 'none' for random weights)."
            )
        given = None if pretrained == "none" else pretrained
        return _checked(_loader(library).by_name(name, given, weights, image_size), weights)
    if image_size is not None:
        raise DgmrError(
            f"image_size {image_size} cannot change {source}, which has its own. Use it with open_clip:NAME or "
            "timm:NAME."
        )
    if pretrained is not None:
        raise DgmrError(
            f"{source} holds its own weights. Use --pretrained {pretrained} with open_clip:NAME or timm:NAME only."
        )
    directory = DEMO if source == "demo" else local_folder(source.removeprefix("local-dir:"), weights=weights != "none")
    if not directory.is_dir():
        raise DgmrError(
            f"unknown model {source!r}. Give open_clip:NAME, timm:NAME, a model directory, hf-hub:ORG/REPO, or demo."
        )
    return load_pruned(directory, name=source if source == "demo" or source.startswith(HUB) else None, weights=weights)


def load_pruned(directory: str | Path, name: str | None = None, *, weights: Weights = "memory") -> OpenedModel:
    """Open a model directory or ``hf-hub:org/repo``, pruned or not, with any hidden width per block.

    Args:
        directory: a model directory of any of the three libraries.
        name: name in plans and reports. Default: the encoder that the directory was made from.
        weights: as for :func:`open_model`.

    Raises:
        DgmrError: it is not a model directory, or a file in it is damaged or does not fit; names the file or the key.
    """
    directory = local_folder(str(directory), weights=weights != "none")
    sidecar = read_json(directory / SIDECAR_NAME) if (directory / SIDECAR_NAME).exists() else {}
    name = name or sidecar.get("encoder") or str(directory)
    if (directory / "open_clip_config.json").exists():
        opened = _loader("open_clip").from_directory(directory, name, weights)
    elif not (directory / "config.json").exists():
        raise DgmrError(
            f"{directory} is not a model directory: it has neither open_clip_config.json nor config.json. Name one "
            "that has."
        )
    elif "architecture" in read_json(directory / "config.json"):
        opened = _loader("timm").from_directory(directory, name, weights)
    else:
        opened = _loader("transformers").from_directory(directory, name, weights, sidecar.get("hidden"))
    dtype = DTYPES.get(sidecar.get("dtype", ""), opened.dtype)
    return _checked(replace(opened, source=directory, dtype=dtype), weights)


def _checked(model: OpenedModel, weights: Weights) -> OpenedModel:
    """Return ``model``.

    Raises:
        DgmrError: a weight is not finite, or the preprocessing does not normalize.
    """
    mean, std = (_as_list(model.preprocess_config.get(key, 1.0)) for key in ("mean", "std"))
    are_numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in (*mean, *std))
    if not are_numbers or len(mean) != len(std) or min(std, default=0) <= 0:
        raise DgmrError(
            f"the preprocessing of {model.name} has mean {mean} and std {std}, which are no finite numbers for each "
            "channel, with std above 0. Correct its config."
        )
    tensors = {} if weights == "none" else model.module.state_dict()
    for name, tensor in tensors.items():
        if not tensor.is_meta and not _is_finite(tensor):
            raise DgmrError(
                f"the weights of {model.name} contain NaN or infinity in {name!r}, so every embedding would be wrong. "
                "Take another checkpoint, such as one saved before the training diverged."
            )
    if weights == "memory":
        model.module.float()
    return model


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors on the CPU, with all floating-point ones except single numbers in ``dtype``."""
    tensors = {}
    for name, tensor in state.items():
        is_cast = tensor.is_floating_point() and tensor.numel() > 1  # not the logarithmic scale of a CLIP
        tensors[name] = tensor.detach().to("cpu", dtype if is_cast else tensor.dtype).contiguous()
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite. Minimum and maximum need no copy of a large tensor."""
    return (
        not tensor.is_floating_point()
        or not tensor.numel()
        or all(bool(bound.isfinite()) for bound in tensor.aminmax())
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        DgmrError: it cannot be read, or it is not JSON; names the file.
    """
    text = ""
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except OSError as error:
        raise DgmrError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    except ValueError as error:
        is_pointer = text.startswith("version https://git-lfs")
        remedy = "It is a Git LFS pointer; run git lfs pull." if is_pointer else "It must be JSON; fetch it again."
        raise DgmrError(f"cannot read {path}: {first_line(error)}. {remedy}") from error
    if not isinstance(content, dict):
        raise DgmrError(f"{path} is not a JSON object. Fetch or write the file again.")
    return content


def suggest_names(name: str, names: list[str]) -> str:
    """Return `` Did you mean …?`` with the entries of ``names`` that resemble ``name``, or an empty string."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""
