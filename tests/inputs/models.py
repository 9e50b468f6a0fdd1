"""Names, files and directories that are given as a model or as its weights."""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file

from dgmr_tp.encoders.model import DEMO
from inputs import Case

VIT = "test_vit"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
PRUNE_VIT = f"prune -m timm:{VIT} --pretrained weights.pt --keep 8 -o out"
LEFT_ON_DISK = ("out",)


def vit(classes: int = 1000) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny ViT."""
    return dict(timm.create_model(VIT, num_classes=classes).state_dict())


def weights(change: Callable[[dict[str, torch.Tensor]], Any], classes: int = 1000) -> Callable[[Path], object]:
    """Return a function that saves the changed tensors of a tiny ViT as ``weights.pt``."""
    return lambda folder: torch.save(change(vit(classes)), folder / "weights.pt")


def content(data: bytes, name: str = "weights.pt") -> Callable[[Path], object]:
    """Return a function that writes ``data`` to a file."""
    return lambda folder: (folder / name).write_bytes(data)


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return ``tensors`` with a prefix before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def demo(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], object]:
    """Return a function that copies the demo CLIP to ``model``, with changed tensors."""

    def make(folder: Path) -> None:
        shutil.copytree(DEMO, folder / "model")
        file = folder / "model" / "open_clip_model.safetensors"
        save_file(change(load_file(file)), file)

    return make


def transformers_directory(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a function that saves a small DINOv2 to ``model`` and changes its weights file."""

    def make(folder: Path) -> None:
        FAMILIES["transformers DINOv2"](folder / "model")
        change(folder / "model" / "model.safetensors")

    return make


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that copies the demo CLIP to ``model``, with a changed config."""

    def make(folder: Path) -> None:
        shutil.copytree(DEMO, folder / "model")
        file = folder / "model" / "open_clip_config.json"
        content = json.loads(file.read_text("utf-8"))
        change(content)
        file.write_text(json.dumps(content), "utf-8")

    return make


def torchscript(folder: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "weights.pt")


def tarred(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    with tarfile.open(folder / "weights.pt", "w") as archive:
        archive.add(folder / "a.txt", "a.txt")


def training_file(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return a checkpoint as DINO's training writes it."""
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    head = {"head.mlp.0.weight": torch.zeros(4, 4)}
    return {
        "student": prefixed("module.", {**prefixed("backbone.", backbone), **head}),
        "teacher": prefixed("module.", {**prefixed("backbone.", backbone), **head}),
        "optimizer": {"state": {}, "lr": np.float64(0.1)},
        "args": argparse.Namespace(out=Path("runs"), arch="vit_tiny"),
        "epoch": 3,
    }


def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (100 * t).to(torch.int8) if name.endswith("fc1.weight") else t for name, t in tensors.items()}


def not_finite(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name].view(-1)[0] = torch.nan
        return tensors

    return change


CASES = [
    Case("unknown model name", "inspect open_clip:ViT-Z-99", says="unknown model open_clip:ViT-Z-99"),
    Case("unknown tag in a timm name", f"inspect timm:{VIT}.nosuch", says=f"timm:{VIT} has no weights 'nosuch'"),
    Case("unknown tag of open_clip", "prune -m open_clip:ViT-B-32 --pretrained nosuch -o out", says="Its tags are:"),
    Case("two tags", f"prune -m timm:{VIT}.a --pretrained r160_in1k -o out", says="Give one of them"),
    Case("TorchScript archive", PRUNE_VIT, torchscript, says="is a TorchScript archive, which contains code"),
    Case("Git LFS pointer", PRUNE_VIT, content(LFS_POINTER), says="git lfs pull"),
    Case("web page", PRUNE_VIT, content(b"\n<!DOCTYPE html><html>404</html>"), says="is a web page"),
    Case("gzip archive", PRUNE_VIT, content(b"\x1f\x8b\x08\x00abc"), says="is a compressed archive"),
    Case("zip without a checkpoint", PRUNE_VIT, content(b"PK\x05\x06" + bytes(18)), says="is a zip archive"),
    Case("tar archive", PRUNE_VIT, tarred, says="is a tar archive"),
    Case("JSON", PRUNE_VIT, content(b'{"a": 1}'), says="is a text file in JSON"),
    Case("Keras file", PRUNE_VIT, content(b"\x89HDF\r\n\x1a\n"), says="is an HDF5 file"),
    Case("empty file", PRUNE_VIT, content(b""), says="is empty"),
    Case("missing file", PRUNE_VIT, says="cannot read weights.pt: No such file or directory"),
    Case("no tensors", PRUNE_VIT, weights(lambda tensors: {"epoch": 3}), says="is not a checkpoint"),
    Case(
        "index without a map",
        PRUNE_VIT.replace(".pt", ".index.json"),
        content(b"{}", "weights.index.json"),
        says="It must be the index of a sharded checkpoint",
    ),
    Case("int8 without scales", PRUNE_VIT, weights(quantized), says="as int8, which means nothing without its scales"),
    Case(
        "float8 without scales",
        PRUNE_VIT,
        weights(lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}),
        says="as float8_e4m3fn, which means nothing",
    ),
    Case(
        "NaN in a weight outside the MLPs",
        PRUNE_VIT,
        weights(not_finite("blocks.1.attn.qkv.weight")),
        says="contain NaN or infinity in 'blocks.1.attn.qkv.weight'",
    ),
    Case(
        "NaN in a model directory",
        "prune -m model --mlp-ratio 1 -o out",
        demo(not_finite("visual.proj")),
        says="contain NaN or infinity in 'visual.proj'",
    ),
    Case(
        "NaN in a model directory, streaming",
        "prune --stream -m model --mlp-ratio 1 -o out",
        demo(not_finite("visual.proj")),
        says="contain NaN or infinity in 'visual.proj'",
    ),
    Case(
        "torch.compile's names",
        PRUNE_VIT,
        weights(lambda tensors: prefixed("_orig_mod.", tensors)),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "chain of prefixes",
        PRUNE_VIT,
        weights(lambda tensors: {"state_dict": prefixed("module._orig_mod.", tensors)}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "Lightning's names with a loss",
        PRUNE_VIT,
        weights(lambda tensors: {"state_dict": {**prefixed("model.", tensors), "criterion.weight": torch.ones(2)}}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "file of a DINO training",
        PRUNE_VIT,
        weights(training_file),
        0,
        "took 'teacher', a moving average of the weights",
        LEFT_ON_DISK,
    ),
    Case("file without a head", PRUNE_VIT, weights(lambda tensors: tensors, classes=0), 0, "has no head", LEFT_ON_DISK),
    Case(
        "file of a MAE pretraining",
        PRUNE_VIT,
        weights(lambda t: {**t, "mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 8)}, 0),
        0,
        "such as decoder_embed.weight",
        LEFT_ON_DISK,
    ),
    Case(
        "other parameters next to the encoder",
        PRUNE_VIT,
        weights(lambda tensors: {**tensors, "blocks.0.adapter.weight": torch.ones(2)}),
        says="holds a tensor 'blocks.0.adapter.weight' that the model does not have",
    ),
    Case(
        "checkpoint of sigmoid training",
        "prune -m model --mlp-ratio 1 -o out",
        demo(lambda tensors: {**tensors, "logit_bias": torch.tensor([-10.0])}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "checkpoint of sigmoid training, streaming",
        "prune --stream -m model --mlp-ratio 1 -o out",
        demo(lambda tensors: {**tensors, "logit_bias": torch.tensor([-10.0])}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "folder without weights",
        f"prune -m timm:{VIT} --pretrained empty -o out",
        lambda folder: (folder / "empty").mkdir(),
        says="empty holds no weights",
    ),
    Case(
        "moving average without tensors",
        PRUNE_VIT,
        weights(lambda tensors: {"model": tensors, "ema": {"decay": 0.99}}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "moving average with names of its own",
        PRUNE_VIT,
        weights(
            lambda tensors: {
                **prefixed("model.", tensors),
                **{f"model_ema.{name.replace('.', '')}": tensor for name, tensor in tensors.items()},
            }
        ),
        0,
        "took the tensors of 'model.'; left model_ema",
        LEFT_ON_DISK,
    ),
    Case(
        "student alone",
        PRUNE_VIT,
        weights(lambda tensors: {"student": prefixed("module.backbone.", tensors)}),
        0,
        leaves=LEFT_ON_DISK,
    ),
    Case(
        "missing file in a folder",
        "prune -m timm:test_vit --pretrained nowhere/weights.ckpt --keep 8 -o out",
        says="cannot read nowhere/weights.ckpt: No such file or directory",
    ),
    Case(
        "LFS pointer in a transformers directory",
        "prune -m model --keep 8 -o out",
        transformers_directory(lambda file: file.write_bytes(LFS_POINTER)),
        says="model.safetensors is a Git LFS pointer",
    ),
    Case(
        "int8 in a transformers directory",
        "prune -m model --keep 8 -o out",
        transformers_directory(
            lambda file: save_file({n: t.to(torch.int8) for n, t in load_file(file).items()}, file, {"format": "pt"})
        ),
        says="as I8, which means nothing without its scales",
    ),
    Case(
        "LFS pointer as a config",
        "inspect model",
        transformers_directory(lambda file: file.with_name("config.json").write_bytes(LFS_POINTER)),
        says="It is a Git LFS pointer; run git lfs pull.",
    ),
    Case(
        "list as a config",
        "inspect model",
        transformers_directory(lambda file: file.with_name("config.json").write_text("[]")),
        says="config.json is not a JSON object",
    ),
    Case(
        "standard deviation of zero",
        "prune -m model --keep 8 -o out",
        config(lambda content: content["preprocess_cfg"].update(std=[0, 0, 0])),
        says="and std [0, 0, 0], which are no finite numbers for each channel",
    ),
    Case(
        "words as a mean",
        "inspect model",
        config(lambda content: content["preprocess_cfg"].update(mean=["0.5", None, []])),
        says="has mean ['0.5', None, []]",
    ),
    Case(
        "a mean for one channel and a standard deviation for three",
        "inspect model",
        config(lambda content: content["preprocess_cfg"].update(mean=[0.5])),
        says="Correct its config",
    ),
    Case(
        "patch size of zero",
        "inspect model",
        config(lambda content: content["model_cfg"]["vision_cfg"].update(patch_size=0)),
        says="does not describe a model: integer division or modulo by zero. Correct it, or fetch it again.",
    ),
]
