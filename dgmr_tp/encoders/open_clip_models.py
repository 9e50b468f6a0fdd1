"""open_clip: opening by name or directory, saving so that ``open_clip.create_model`` opens it again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from dgmr_tp.encoders.checkpoint import Weights, empty, load_by_shape, read_tensors
from dgmr_tp.encoders.hub import is_file_name, local_file
from dgmr_tp.encoders.model import OpenedModel, nearest, read_json
from dgmr_tp.encoders.timm_models import in_timms_names, said_in_config
from dgmr_tp.encoders.widths import ratio_for
from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.pruning import find_sites
from dgmr_tp.utils.files import write_whole

BUFFERS = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
    "text.attn_mask",
    "text.transformer.embeddings.position_ids",
)
"""What older checkpoints hold beside their weights."""
WEIGHTS = "open_clip_model.safetensors"
RELEASED = (WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt")
"""How the weights are called in repositories of open_clip's."""
TRUNK = "trunk"
"""Folder in a model directory with the timm config of the trunk, where its widths are not those of a timm name."""


def by_name(name: str, pretrained: str | None, weights: Weights, image_size: int | None) -> OpenedModel:
    config = open_clip.get_model_config(name)
    if config is None:
        raise DgmrError(f"unknown model open_clip:{name}{nearest(name, open_clip.list_models())}")
    tag, file = _tag_and_file(pretrained if weights != "none" else None)
    known = open_clip.list_pretrained_tags_by_model(name)
    if weights == "none" and pretrained and not is_file_name(pretrained) and pretrained not in known:
        raise DgmrError(f"open_clip:{name} has no weights {pretrained!r}; there are: {', '.join(known) or 'none'}")
    try:
        module = _create(
            name, weights if file or weights == "none" else "memory", pretrained=tag, force_image_size=image_size
        )
    except Exception as error:  # unknown tag, no network: open_clip raises many kinds
        raise DgmrError(f"open_clip:{name}: cannot load pretrained {tag!r}: {first_line(error)}") from error
    if file:
        _load_release(module, file, tower_only=tag is not None)
    config = copy.deepcopy(config)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    if any(type(layer).__name__ == "QuickGELU" for layer in module.modules()):
        config["quick_gelu"] = True  # some weights ask for it, whatever the config says
    return _opened(module, config, name, f"open_clip:{name}", weights)


def _tag_and_file(pretrained: str | None) -> tuple[str | None, str | None]:
    """``TAG``, ``FILE``, or ``TAG+FILE`` for a file with the vision tower alone."""
    if pretrained is None or not is_file_name(pretrained):
        return pretrained, None
    tag, _, file = pretrained.partition("+")
    return (tag, file) if file and not Path(pretrained).exists() else (None, pretrained)


def _load_release(module: nn.Module, file: str, *, tower_only: bool) -> None:
    """Load a checkpoint as it was published: open_clip's own keys, OpenAI's, EVA-CLIP's, or a bare vision tower's."""
    tensors = read_tensors(local_file(file))
    if any(
        name.startswith(("visual.", "text", "transformer.resblocks.")) and "logit_scale" in tensors for name in tensors
    ):
        load_by_shape(module, _in_open_clips_names(tensors, module, file), file)
    elif tower_only:
        tower = {f"visual.{name.removeprefix('visual.')}": tensor for name, tensor in tensors.items()}
        if not hasattr(module.visual, "trunk"):
            resize_pos_embed(tower, module)
        load_by_shape(module.visual, _tower_in_open_clips_names(tower, module.visual, file), file)
    else:
        raise DgmrError(
            f"{file} holds the vision tower alone; name the text tower's weights too: --pretrained TAG+{file}"
        )


def _in_open_clips_names(tensors: dict[str, Tensor], module: nn.Module, file: str) -> dict[str, Tensor]:
    tensors = convert_state_dict(module, dict(tensors))
    if "positional_embedding" in tensors and not hasattr(module, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    if not hasattr(module.visual, "trunk"):
        resize_pos_embed(tensors, module)
    tower = {name.removeprefix("visual."): tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    others = {
        name: tensor for name, tensor in tensors.items() if not name.startswith("visual.") and name not in BUFFERS
    }
    tower = _tower_in_open_clips_names(tower, module.visual, file)
    for name in ("logit_scale", "logit_bias"):
        if name in others:
            others[name] = others[name].reshape(getattr(module, name).shape)
    return {**others, **{f"visual.{name}": tensor for name, tensor in tower.items()}}


def _tower_in_open_clips_names(tower: dict[str, Tensor], visual: nn.Module, file: str) -> dict[str, Tensor]:
    tower = {name.removeprefix("visual."): tensor for name, tensor in tower.items()}
    if not hasattr(visual, "trunk") or any(name.startswith("trunk.") for name in tower):
        return tower
    return {f"trunk.{name}": tensor for name, tensor in in_timms_names(tower, visual.trunk, file).items()}


def from_directory(directory: Path, name: str, weights: Weights) -> OpenedModel:
    config = read_json(directory / "open_clip_config.json")
    schema = f"local-dir:{directory.resolve()}"
    try:
        module = _built(directory, config, weights)
    except Exception as error:  # whatever a wrong config leads to inside open_clip
        raise DgmrError(f"{directory}/open_clip_config.json describes no model: {first_line(error)}") from error
    if weights != "none":
        path = next((directory / file for file in RELEASED if (directory / file).exists()), directory / WEIGHTS)
        load_by_shape(module, _in_open_clips_names(read_tensors(path), module, str(path)), path)
    return _opened(module, config["model_cfg"], schema, name, weights)


def _create(name: str, weights: Weights, **options: Any) -> nn.Module:
    with empty(weights):  # open_clip moves the model to its device, cpu if none is named
        return open_clip.create_model(
            name, device="cpu" if weights == "memory" else "meta", pretrained_text=False, **options
        )


def _built(directory: Path, config: dict[str, Any], weights: Weights) -> nn.Module:
    trunk = config["model_cfg"]["vision_cfg"].get("timm_model_name", "")
    if not trunk.startswith("local-dir:") or not (directory / TRUNK).is_dir():
        return _create(f"local-dir:{directory.resolve()}", weights, load_weights=False)
    with TemporaryDirectory() as scratch:  # the directory may have been moved since
        relocated = _with_trunk(config, directory / TRUNK)
        (Path(scratch) / "open_clip_config.json").write_text(json.dumps(relocated))
        return _create(f"local-dir:{scratch}", weights, load_weights=False)


def _with_trunk(config: dict[str, Any], trunk: Path) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{trunk.resolve()}"
    return config


def relocate(directory: Path) -> bool:
    """Write the directory's present path into its config, where open_clip needs it; whether there was anything to write.

    Raises:
        DgmrError: it is no model directory of open_clip's.
    """
    path = directory / "open_clip_config.json"
    config = read_json(path)
    if not (directory / TRUNK).is_dir():
        return False
    write_whole(path, json.dumps(_with_trunk(config, directory / TRUNK), indent=1) + "\n")
    return True


def _opened(module: nn.Module, config: dict[str, Any], schema: str, name: str, weights: Weights) -> OpenedModel:
    preprocess_config = dict(module.visual.preprocess_cfg)
    if config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("trust_remote_code"):
        raise DgmrError(
            f"{name}: its open_clip_config.json has tokenizer_kwargs.trust_remote_code, which would run code; remove it there"
        )
    try:  # shapes alone need no tokenizer, which may have to come from the hub
        tokenizer = open_clip.get_tokenizer(schema) if weights != "none" else None
    except Exception as error:  # no network, or a directory without the tokenizer's files
        raise DgmrError(f"{name}: cannot load its tokenizer: {first_line(error)}") from error
    return OpenedModel(
        "open_clip",
        module,
        "visual",
        name,
        open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**preprocess_config), is_train=False),
        preprocess_config,
        config,
        tokenizer,
    )


def save_config(model: OpenedModel, directory: Path, final: Path) -> str | None:
    config = copy.deepcopy(model.config)
    vision = config["vision_cfg"]
    opens = True
    if "timm_model_name" in vision:
        vision["timm_model_name"], opens = _save_trunk(model, directory, final)
    elif (ratio := ratio_for(find_sites(model.tower))) is not None:
        vision["mlp_ratio"] = ratio
    else:
        opens = False
    opens = _say_text(model, config["text_cfg"]) and opens
    preprocess = {key: model.preprocess_config[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n"
    )
    return "open_clip.create_model('local-dir:{path}')" if opens else None


def _say_text(model: OpenedModel, text: dict[str, Any]) -> bool:
    """Put the text tower's hidden width into its config, where it was pruned too; whether open_clip can read it there."""
    others = [site for site in find_sites(model.module) if not site.name.startswith("visual.")]
    sites = [site for site in others if site.name.startswith(("text.", "transformer."))]
    decoder = model.config.get("multimodal_cfg", {}).get("mlp_ratio", 4.0)
    if any(site.hidden != int(site.width * decoder) for site in others if site not in sites):
        return False
    if all(site.hidden == int(site.width * text.get("mlp_ratio", 4.0)) for site in sites) or "hf_model_name" in text:
        return True
    ratio = ratio_for(sites)
    if ratio is not None:
        text["mlp_ratio"] = ratio
    return ratio is not None


def _save_trunk(model: OpenedModel, directory: Path, final: Path) -> tuple[str, bool]:
    """The ``timm_model_name`` that says the trunk's widths, and whether it does: open_clip hands no width on to timm."""
    trunk, name = model.tower.trunk, model.config["vision_cfg"]["timm_model_name"]
    arguments = said_in_config(trunk)
    # open_clip builds a trunk at the size of its name, whatever size it was resized to since.
    native = tuple(trunk.pretrained_cfg.get("input_size", ()))[1:] in ((), tuple(trunk.patch_embed.img_size or ()))
    if not arguments and native and not name.startswith("local-dir:"):
        return name, arguments is not None
    (directory / TRUNK).mkdir()
    save_config_for_hf(trunk, directory / TRUNK / "config.json", model_args=arguments)
    return f"local-dir:{(final / TRUNK).resolve()}", arguments is not None
