"""Measure how much of the reduction in FLOPs becomes speed on a GPU, for ViT-g/14 pruned to hidden = width.

    python benchmarks/export_gpu.py --out benchmarks/results/export_gpu.json

The weights are random. The dense and the pruned tower run in turn in float16, at batches 8 and 32, under torch.compile,
AOTInductor, and onnxruntime with CUDA and TensorRT. Providers that this onnxruntime lacks are listed in the JSON as
``left_out``. To try the script on a CPU, pass ``--device cpu --model ViT-B-32``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from dgmr_tp import open_model, prune
from dgmr_tp.export import onnx_file, program_file
from dgmr_tp.export.export_tower import ExportTower
from dgmr_tp.export.latency import latencies
from dgmr_tp.export.towers import vision_export_tower
from dgmr_tp.pruning.cost import flops
from dgmr_tp.utils.files import atomic_write

PROVIDERS = {"cuda": ("CUDAExecutionProvider", "TensorrtExecutionProvider"), "cpu": ("CPUExecutionProvider",)}


Runner = Callable[[Tensor], object]


def torch_compile(tower: ExportTower, device: str, scratch: Path) -> Runner:
    return torch.compile(tower.module, dynamic=True)


def aotinductor(tower: ExportTower, device: str, scratch: Path) -> Runner:
    program_file.write_compiled(tower, scratch / "model.aoti.pt2")
    return torch._inductor.aoti_load_package(str(scratch / "model.aoti.pt2"))


def with_onnxruntime(provider: str) -> Callable[[ExportTower, str, Path], Runner]:
    """Return a function that builds a runner of the float16 ONNX file under an execution provider."""

    def build(tower: ExportTower, device: str, scratch: Path) -> Runner:
        float32 = replace(tower, module=tower.module.float().cpu(), examples=tower.examples.float().cpu())
        onnx_file.write(float32, scratch / "model.onnx")
        onnx_file.to_float16(scratch / "model.onnx", scratch / "model.fp16.onnx")
        session = onnxruntime.InferenceSession(str(scratch / "model.fp16.onnx"), providers=[provider])

        def run(images: Tensor) -> object:
            inputs, binding = images.float().contiguous(), session.io_binding()
            binding.bind_input(tower.input_name, device, 0, np.float32, tuple(inputs.shape), inputs.data_ptr())
            binding.bind_output(tower.output_names[0], device)
            session.run_with_iobinding(binding)
            return binding

        return run

    return build


def run_and_wait(run: Runner, images: Tensor) -> None:
    run(images)
    if images.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="ViT-g-14")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    dense = open_model(f"open_clip:{args.model}", "none")
    models = {"dense": dense, "pruned": prune(dense, criterion="random", mlp_ratio=1).model}
    ideal = flops(dense.tower, dense.image_size) / flops(models["pruned"].tower, dense.image_size)
    images = torch.randn(32, 3, *dense.image_size, device=args.device, dtype=dtype)
    builders: dict[str, Callable] = {"torch.compile": torch_compile, "AOTInductor": aotinductor}
    providers = [name for name in PROVIDERS[args.device] if name in onnxruntime.get_available_providers()]
    builders |= {f"onnxruntime {name}": with_onnxruntime(name) for name in providers}
    rows: dict[str, dict] = {}
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "model": args.model,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "left_out": sorted(set(PROVIDERS[args.device]) - set(providers)),
        "rows": rows,
    }
    for name, build in builders.items():
        with tempfile.TemporaryDirectory() as scratch:
            runs = {}
            for label, model in models.items():
                tower = vision_export_tower(model.adapter, images[:2])
                tower = replace(tower, module=tower.module.to(args.device, dtype))
                (Path(scratch) / label).mkdir()
                runs[label] = build(tower, args.device, Path(scratch) / label)

            for batch in (8, 32):
                times = latencies({label: partial(run_and_wait, run, images[:batch]) for label, run in runs.items()})
                speedup = times["dense"]["median"] / times["pruned"]["median"]
                rows[f"{name}, batch {batch}"] = {"faster": speedup, "ideal": ideal, "share": speedup / ideal, **times}
                atomic_write(args.out, json.dumps(result, indent=1) + "\n")
                print(f"| {name} | {batch} | {ideal:.2f} | {speedup:.2f} | {speedup / ideal:.2f} |", flush=True)


if __name__ == "__main__":
    main()
