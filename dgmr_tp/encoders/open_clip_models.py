"""Open open_clip models by name or directory, and save them so that ``open_clip.create_model`` opens them again.

Imported by ``dgmr_tp.encoders.model`` for the library ``open_clip``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, set_model_preprocess_cfg
from open_clip.transform import merge_preprocess_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dgmr_tp.encoders.checkpoint import Weights, build_device, load_by_shape
from dgmr_tp.encoders.checkpoint_file import read_tensors
from dgmr_tp.encoders.hub import is_file_name, local_file
from dgmr_tp.encoders.model import OpenedModel, read_json, suggest_names
from dgmr_tp.encoders.timm_models import config_arguments, to_timm_keys
from dgmr_tp.encoders.widths import ratio_for
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import Site
from dgmr_tp.pruning.sites import sites_inside
from dgmr_tp.utils.files import atomic_write

logger = logging.getLogger(__name__)
WEIGHTS_NAME = "open_clip_model.safetensors"
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
"""Names of the weights file in open_clip's repositories."""
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""Preprocessing that a checkpoint depends on, except the image size."""
INIT_LOGIT_BIAS = -10.0
"""SigLIP's initial bias. The value in the weights replaces it."""
QUICK_GELU_SUFFIX = "-quickgelu"
TRUNK_FOLDER = "trunk"
"""Folder of a model directory with the timm config of the trunk, for trunks that no timm name describes."""


def by_name(name: str, pretrained: str | None, weights: Weights, image_size: int | None) -> OpenedModel:
    """Open ``open_clip:name``; see :func:`dgmr_tp.encoders.open_model`. ``pretrained`` None means random weights."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise DgmrError(f"unknown model open_clip:{name}.{suggest_names(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag, file = _tag_and_file(pretrained, tags)
    if tag and tag not in tags:
        raise DgmrError(f"open_clip:{name} has no weights {tag!r}. Its tags are: {', '.join(tags) or 'none'}.")
    config = copy.deepcopy(config)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if tag:  # whatever the config says
        config["quick_gelu"] = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    try:
        module = _create(
            name,
            weights if file or weights == "none" else "memory",
            pretrained=None if weights == "none" else tag,
            force_image_size=image_size,
            quick_gelu=config.get("quick_gelu", False),
        )
    except Exception as error:  # no network: open_clip raises exceptions of many types
        raise DgmrError(f"open_clip:{name}: cannot load pretrained {tag!r}: {first_line(error)}") from error
    dtype = torch.float32
    if file and weights != "none":
        dtype = _load_release(module, file, tower_only=tag is not None)
    if file and not tag:
        _apply_common_preprocessing(module, name, tags)
        _report_activation(name, config)
    return _opened(module, config, name, f"open_clip:{name}", weights, dtype)


def _tag_and_file(pretrained: str | None, tags: Sequence[str]) -> tuple[str | None, str | None]:
    """Split ``TAG``, ``FILE`` or ``TAG+FILE``, whose file contains the vision tower alone."""
    if pretrained is None:
        return None, None
    whole, (tag, _, file) = _clean_tag(pretrained), pretrained.partition("+")
    if whole in tags:
        return whole, None
    if file and _clean_tag(tag) in tags:
        return _clean_tag(tag), file
    return (None, pretrained) if is_file_name(pretrained) else (pretrained, None)


def _clean_tag(tag: str) -> str:
    """Return a tag in open_clip's spelling."""
    return tag.lower().replace("-", "_")


def _apply_common_preprocessing(module: nn.Module, name: str, tags: Sequence[str]) -> None:
    """Set the preprocessing that all tags of a model have in common, for weights that are named by their file."""
    default = dict(module.visual.preprocess_cfg)
    settings = [
        {key: cfg[key] for key in PREPROCESS_KEYS if key in cfg}
        for cfg in (open_clip.get_pretrained_cfg(name, tag) for tag in tags)
    ]
    if settings and all(setting == settings[0] for setting in settings):
        set_model_preprocess_cfg(module, merge_preprocess_dict(default, settings[0]))
    elif settings:
        used = {key: default[key] for key in PREPROCESS_KEYS}
        logger.warning(
            "the weights of open_clip:%s differ in their preprocessing, and a file does not say its own. Used: %s. If "
            "that is wrong, give a model directory with an open_clip_config.json.",
            name,
            used,
        )


def _report_activation(name: str, config: dict[str, Any]) -> None:
    """Log which activation function weights from a file get, if the model exists with both."""
    twin = name.removesuffix(QUICK_GELU_SUFFIX) if name.endswith(QUICK_GELU_SUFFIX) else f"{name}{QUICK_GELU_SUFFIX}"
    if twin in open_clip.list_models():
        logger.warning(
            "open_clip:%s computes %s, and a file does not say what its weights were trained with. For the other "
            "activation function use open_clip:%s.",
            name,
            "QuickGELU" if config.get("quick_gelu") else "GELU",
            twin,
        )


def _load_release(module: nn.Module, file: str, *, tower_only: bool) -> torch.dtype:
    """Load a published checkpoint with open_clip's keys, OpenAI's, EVA-CLIP's, or those of a bare vision tower.

    Args:
        module: the model to load into.
        file: path or hub name of the checkpoint.
        tower_only: load the vision tower of the file and keep all other weights.

    Returns:
        The dtype of the file. float32 if it contains the vision tower alone.

    Raises:
        DgmrError: the file does not fit, or it contains the vision tower alone and ``tower_only`` is False.
    """
    tensors = read_tensors(local_file(file))
    if any(
        name.startswith(("visual.", "text", "transformer.resblocks.")) and "logit_scale" in tensors for name in tensors
    ):
        return load_by_shape(module, _to_open_clip_keys(tensors, module, file), file)
    if tower_only:
        tower = {f"visual.{name.removeprefix('visual.')}": tensor for name, tensor in tensors.items()}
        if not hasattr(module.visual, "trunk"):
            resize_pos_embed(tower, module)
        load_by_shape(module.visual, _to_tower_keys(tower, module.visual, file), file)
        return torch.float32
    raise DgmrError(f"{file} holds the vision tower alone. Name the text tower's weights too: --pretrained TAG+{file}")


def _to_open_clip_keys(tensors: dict[str, Tensor], module: nn.Module, file: str) -> dict[str, Tensor]:
    tensors = convert_state_dict(module, dict(tensors))
    if "positional_embedding" in tensors and not hasattr(module, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    if not hasattr(module.visual, "trunk"):
        resize_pos_embed(tensors, module)
    tower = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    tower = _to_tower_keys(tower, module.visual, file)
    if "logit_bias" in others and module.logit_bias is None:  # trained with the sigmoid loss
        module.logit_bias = nn.Parameter(others["logit_bias"].reshape(module.logit_scale.shape).float())
    for name in ("logit_scale", "logit_bias"):
        if name in others:
            others[name] = others[name].reshape(getattr(module, name).shape)
    return {**others, **{f"visual.{name}": tensor for name, tensor in tower.items()}}


def _to_tower_keys(tower: dict[str, Tensor], visual: nn.Module, file: str) -> dict[str, Tensor]:
    tower = {name.removeprefix("visual."): tensor for name, tensor in tower.items()}
    if not hasattr(visual, "trunk"):
        return tower
    trunk = {name.removeprefix("trunk."): tensor for name, tensor in tower.items() if name.startswith("trunk.")}
    if not trunk:
        return {f"trunk.{name}": tensor for name, tensor in to_timm_keys(tower, visual.trunk, file).items()}
    outside = {name: tensor for name, tensor in tower.items() if not name.startswith("trunk.")}
    expected = visual.trunk.state_dict()
    if any("pos" in name and name in expected and trunk[name].shape != expected[name].shape for name in trunk):
        trunk = to_timm_keys(trunk, visual.trunk, file)  # interpolates the positions
    return {**outside, **{f"trunk.{name}": tensor for name, tensor in trunk.items()}}


def from_directory(directory: Path, name: str, weights: Weights) -> OpenedModel:
    """Open a model directory; see :func:`dgmr_tp.encoders.load_pruned`."""
    config = read_json(directory / "open_clip_config.json")
    schema = f"local-dir:{directory.resolve()}"
    try:
        module = _build(directory, config, weights)
    except Exception as error:  # a wrong config fails inside open_clip with many types
        raise DgmrError(
            f"{directory}/open_clip_config.json does not describe a model: {first_line(error)}. "
            "Correct it, or fetch it again."
        ) from error
    dtype = torch.float32
    if weights != "none":
        path = next(
            (directory / file for file in WEIGHTS_NAMES if (directory / file).exists()), directory / WEIGHTS_NAME
        )
        dtype = load_by_shape(module, _to_open_clip_keys(read_tensors(path), module, str(path)), path)
    return _opened(module, config["model_cfg"], schema, name, weights, dtype)


def _create(name: str, weights: Weights, **options: Any) -> nn.Module:
    with build_device(weights), _without_warnings():
        # open_clip also moves the model to ``device``, whose default is the CPU
        return open_clip.create_model(
            name, device="cpu" if weights == "memory" else "meta", pretrained_text=False, **options
        )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide open_clip's messages that the weights are random. They are loaded afterwards."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _build(directory: Path, config: dict[str, Any], weights: Weights) -> nn.Module:
    trunk = config["model_cfg"]["vision_cfg"].get("timm_model_name", "")
    if not trunk.startswith("local-dir:") or not (directory / TRUNK_FOLDER).is_dir():
        return _create(f"local-dir:{directory.resolve()}", weights, load_weights=False)
    with TemporaryDirectory() as scratch:  # the directory may have been moved after it was written
        relocated = _with_trunk(config, directory / TRUNK_FOLDER)
        (Path(scratch) / "open_clip_config.json").write_text(json.dumps(relocated), "utf-8")
        return _create(f"local-dir:{scratch}", weights, load_weights=False)


def _with_trunk(config: dict[str, Any], trunk: Path) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{trunk.resolve()}"
    return config


def relocate(directory: Path) -> bool:
    """Write the directory's current path into its config, where open_clip needs it.

    Returns:
        False if the config contains no path.

    Raises:
        DgmrError: it is not a model directory of open_clip.
    """
    path = directory / "open_clip_config.json"
    config = read_json(path)
    if not (directory / TRUNK_FOLDER).is_dir():
        return False
    atomic_write(path, json.dumps(_with_trunk(config, directory / TRUNK_FOLDER), indent=1) + "\n")
    return True


def _opened(
    module: nn.Module, config: dict[str, Any], schema: str, name: str, weights: Weights, dtype: torch.dtype
) -> OpenedModel:
    preprocess_config = dict(module.visual.preprocess_cfg)
    if config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("trust_remote_code"):
        raise DgmrError(
            f"open_clip_config.json of {name} has tokenizer_kwargs.trust_remote_code, which would run code. Remove "
            "that key."
        )
    try:
        transform = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**preprocess_config), is_train=False
        )
    except Exception as error:  # a value that torchvision does not take
        raise DgmrError(
            f"{name}: its preprocess_cfg {preprocess_config} is not one of open_clip's: "
            f"{first_line(error)}. Correct open_clip_config.json."
        ) from error
    try:  # shapes alone need no tokenizer, and it may need a download
        tokenizer = open_clip.get_tokenizer(schema) if weights != "none" else None
    except Exception as error:  # no network, or a directory without the tokenizer's files
        raise DgmrError(f"{name}: cannot load its tokenizer: {first_line(error)}") from error
    return OpenedModel(
        "open_clip",
        module,
        "visual",
        name,
        transform,
        preprocess_config,
        config,
        tokenizer,
        dtype=dtype,
    )


def save_config(model: OpenedModel, directory: Path, final: Path, sites: Sequence[Site]) -> str | None:
    """Write the config.

    Args:
        model: the model.
        directory: the staging directory.
        final: path of the finished directory.
        sites: all sites of ``model.module``.

    Returns:
        Python expression by which open_clip opens ``{path}``, or None if the config cannot express the hidden widths.
    """
    config = copy.deepcopy(model.config)
    if model.module.logit_bias is not None:  # without this key, open_clip builds a model that has none
        config.setdefault("init_logit_bias", INIT_LOGIT_BIAS)
    vision = config["vision_cfg"]
    expressible = True
    if "timm_model_name" in vision:
        vision["timm_model_name"], expressible = _save_trunk(model, directory, final, sites)
    elif (ratio := ratio_for(sites_inside(sites, model.tower_path))) is not None:
        vision["mlp_ratio"] = ratio
    else:
        expressible = False
    expressible = _set_text_ratio(model, config["text_cfg"], sites) and expressible
    preprocess = {key: model.preprocess_config[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n", "utf-8"
    )
    return "open_clip.create_model('local-dir:{path}')" if expressible else None


def _set_text_ratio(model: OpenedModel, text: dict[str, Any], sites: Sequence[Site]) -> bool:
    """Set the text tower's hidden width in its config ``text``, in case it was pruned too.

    Returns False if open_clip's config cannot express the widths outside the vision tower.
    """
    outside = [site for site in sites if not site.name.startswith("visual.")]
    text_sites = [site for site in outside if site.name.startswith(("text.", "transformer."))]
    decoder_sites = [site for site in outside if site not in text_sites]
    decoder_ratio = model.config.get("multimodal_cfg", {}).get("mlp_ratio", 4.0)
    if any(site.hidden != int(site.width * decoder_ratio) for site in decoder_sites):
        return False
    text_ratio = text.get("mlp_ratio", 4.0)
    if all(site.hidden == int(site.width * text_ratio) for site in text_sites) or "hf_model_name" in text:
        return True
    ratio = ratio_for(text_sites)
    if ratio is not None:
        text["mlp_ratio"] = ratio
    return ratio is not None


def _save_trunk(model: OpenedModel, directory: Path, final: Path, sites: Sequence[Site]) -> tuple[str, bool]:
    """Save a config of the timm trunk if no timm name describes it, because open_clip passes no hidden width to timm.

    Returns the ``timm_model_name`` of the open_clip config, and whether it expresses the hidden widths.
    """
    trunk, name = model.tower.trunk, model.config["vision_cfg"]["timm_model_name"]
    arguments = config_arguments(trunk, sites_inside(sites, f"{model.tower_path}.trunk"))
    # open_clip builds a trunk at the image size of its name, whatever size it was resized to.
    native_size = tuple(trunk.pretrained_cfg.get("input_size", ()))[1:]
    has_native_size = native_size in ((), tuple(trunk.patch_embed.img_size or ()))
    if not arguments and has_native_size and not name.startswith("local-dir:"):
        return name, arguments is not None
    (directory / TRUNK_FOLDER).mkdir()
    save_config_for_hf(trunk, directory / TRUNK_FOLDER / "config.json", model_args=arguments)
    return f"local-dir:{(final / TRUNK_FOLDER).resolve()}", arguments is not None
