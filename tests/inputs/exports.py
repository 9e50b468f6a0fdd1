"""Models and images of shapes that an export, a comparison, or a recovery must take or refuse."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from families import VIT

from dgmr_tp import open_model
from dgmr_tp.data.scenes import write_classification
from inputs import Case, pictures


def rectangular(folder: Path) -> None:
    """Write a timm model directory whose images are 64 pixels high and 32 wide."""
    module = timm.create_model("vit_small_patch14_dinov2", **{**VIT, "img_size": (64, 32)})
    module.pretrained_cfg["input_size"] = (3, 64, 32)
    timm.models.save_for_hf(module, folder / "rectangular", safe_serialization=True)
    pictures(folder / "images", [f"{i}.png" for i in range(12)])


def onnx_mean(path, dtype, shape, *, inputs=1, keepdims=0):
    """Write an ONNX file that returns the mean of every channel, as tools other than ours write files."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    names = [f"pixels{i}" for i in range(inputs)]
    nodes = [helper.make_node("Cast", [name], [f"{name} float"], to=float32) for name in names]
    nodes.append(helper.make_node("Sum", [f"{name} float" for name in names], ["sum"]))
    nodes.append(helper.make_node("ReduceMean", ["sum", "axes"], ["mean"], keepdims=keepdims))
    nodes.append(helper.make_node("Cast", ["mean"], ["output"], to=dtype))
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in names]
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    output = helper.make_tensor_value_info("output", dtype, None)
    graph = helper.make_graph(nodes, "mean", values, [output], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@functools.cache
def _overflowing() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    demo = open_model("demo")
    with torch.no_grad():
        demo.tower.ln_post.weight.fill_(1e30)
        demo.tower.proj.fill_(1e30)
    demo.save(folder / "clip")
    pictures(folder / "images", [f"{label}/{i}.png" for label in "ab" for i in range(60)])
    write_classification(folder / "scenes", 20, seed=3)
    return folder, scratch


def overflowing(folder: Path) -> None:
    """Write a CLIP whose weights are finite and whose image embeddings are not, and labeled images."""
    shutil.copytree(_overflowing()[0], folder, dirs_exist_ok=True)


def fixed_batch(folder: Path) -> None:
    """Write an ONNX file that takes one image at a time, and images."""
    onnx_mean(folder / "old.onnx", onnx.TensorProto.FLOAT16, [1, 3, 64, 64])
    pictures(folder / "images", [f"{i}.png" for i in range(100)])


OVERFLOW = "are not finite. Check the weights and the preprocessing, or compute in float32."
OVERFLOWS = {
    "zero-shot": "eval clip --dataset wds/scenes --root scenes -o out",
    "k-NN": "eval clip --knn-train images --knn-test images -o out",
    "compare": "compare demo clip --images images -o out",
    "recovery": "prune --model clip --criterion l2 --recover images -o out",
    "criterion output": "rank --model clip --images images --calibration-images 20 -o out.safetensors",
    "quality target": "prune --model clip --min-cosine 0.9 --held-out 50 --recover images -o out",
    "export": "export clip -o out --formats torchscript",
}

CASES = [
    *(Case(f"embeddings overflow, {name}", command, overflowing, says=OVERFLOW) for name, command in OVERFLOWS.items()),
    Case(
        "ONNX file with batch 1 and float16 inputs",
        "compare old.onnx old.onnx --text demo --images images -o out",
        fixed_batch,
        0,
        "keep the index",
        ("out",),
    ),
    Case(
        "ONNX file with two inputs",
        "compare two.onnx demo --text demo --images images -o out",
        lambda folder: onnx_mean(folder / "two.onnx", onnx.TensorProto.FLOAT, [1, 3, 64, 64], inputs=2),
        says="cannot open two.onnx: it has 2 inputs (pixels0, pixels1), and an encoder has one.",
    ),
    Case(
        "ResNet",
        "export resnet -o out",
        lambda folder: timm.models.save_for_hf(timm.create_model("resnet10t"), folder / "resnet"),
        says="so it cannot be recovered or distilled, and it has no MLP that can be pruned. Use one of",
    ),
    Case(
        "fifteen calibration images",
        "prune --model demo --keep 8 --recover images -o out",
        lambda folder: pictures(folder / "images", [f"{i}.png" for i in range(15)]),
        0,
        "transformer.resblocks.5.mlp 512 8 4.9",
        ("out",),
    ),
    Case(
        "nine calibration images",
        "prune --model demo --keep 8 --recover images -o out",
        lambda folder: pictures(folder / "images", [f"{i}.png" for i in range(9)]),
        says="recovery needs at least 10 calibration images and got 9. Give more images.",
    ),
    Case(
        "rectangular model, inspect",
        "inspect rectangular",
        rectangular,
        code=0,
        says="blocks.1.mlp 48 192 27.4% rectangular: 0.07 M parameters, 0.00 GFLOPs per image",
    ),
    Case(
        "rectangular model, plan",
        "plan --model rectangular --budget flops=0.8 -o p.json",
        rectangular,
        0,
        "(-20.1%)",
        ("p.json",),
    ),
    Case(
        "rectangular model, recovery",
        "prune --model rectangular --mlp-ratio 1 --recover images -o out",
        rectangular,
        0,
        "blocks.1.mlp 192 48",
        ("out",),
    ),
]
