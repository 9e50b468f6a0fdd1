"""How much of the cut in FLOPs becomes speed on a GPU: ViT-g/14's shape, dense and pruned to hidden = width in turn.

    python benchmarks/export_gpu.py --out benchmarks/results/export_gpu.json

Random weights, float16, batches 8 and 32: torch.compile, AOTInductor, and onnxruntime with CUDA and with TensorRT where this
onnxruntime has them (the others are left out, and the JSON says so). On a CPU it runs too (``--device cpu --model ViT-B-32``), to try
the script.
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
from dgmr_tp.utils.files import write_whole

PROVIDERS = {"cuda": ("CUDAExecutionProvider", "TensorrtExecutionProvider"), "cpu": ("CPUExecutionProvider",)}


def compiled(part: ExportTower, device: str, scratch: Path) -> Callable[[Tensor], object]:
    return torch.compile(part.module, dynamic=True)


def packaged(part: ExportTower, device: str, scratch: Path) -> Callable[[Tensor], object]:
    program_file.write_compiled(part, scratch / "model.aoti.pt2")
    return torch._inductor.aoti_load_package(str(scratch / "model.aoti.pt2"))


def by_onnxruntime(provider: str) -> Callable[[ExportTower, str, Path], Callable[[Tensor], object]]:
    def build(part: ExportTower, device: str, scratch: Path) -> Callable[[Tensor], object]:
        plain = replace(part, module=part.module.float().cpu(), examples=part.examples.float().cpu())
        onnx_file.write(plain, scratch / "model.onnx")
        onnx_file.to_float16(scratch / "model.onnx", scratch / "model.fp16.onnx")
        session = onnxruntime.InferenceSession(str(scratch / "model.fp16.onnx"), providers=[provider])

        def run(images: Tensor) -> object:
            given, bound = images.float().contiguous(), session.io_binding()
            bound.bind_input(part.input_name, device, 0, np.float32, tuple(given.shape), given.data_ptr())
            bound.bind_output(part.output_names[0], device)
            session.run_with_iobinding(bound)
            return bound

        return run

    return build


def timed(run: Callable[[Tensor], object], images: Tensor) -> None:
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
    kind = torch.float16 if args.device == "cuda" else torch.float32
    dense = open_model(f"open_clip:{args.model}", "none")
    models = {"original": dense, "pruned": prune(dense, criterion="random", mlp_ratio=1).model}
    ideal = flops(dense.tower, dense.image_size) / flops(models["pruned"].tower, dense.image_size)
    images = torch.randn(32, 3, dense.image_size, dense.image_size, device=args.device, dtype=kind)
    ways: dict[str, Callable] = {"torch.compile": compiled, "AOTInductor": packaged}
    there = [name for name in PROVIDERS[args.device] if name in onnxruntime.get_available_providers()]
    ways |= {f"onnxruntime {name}": by_onnxruntime(name) for name in there}
    rows: dict[str, dict] = {}
    for name, build in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            runs = {}
            for which, model in models.items():
                part = vision_export_tower(model.adapter, images[:2])
                part = replace(part, module=part.module.to(args.device, kind))
                (Path(scratch) / which).mkdir()
                runs[which] = build(part, args.device, Path(scratch) / which)

            for batch in (8, 32):
                found = latencies({which: partial(timed, run, images[:batch]) for which, run in runs.items()})
                faster = found["original"]["median"] / found["pruned"]["median"]
                rows[f"{name}, batch {batch}"] = {"faster": faster, "ideal": ideal, "share": faster / ideal, **found}
                print(f"| {name} | {batch} | {ideal:.2f} | {faster:.2f} | {faster / ideal:.2f} |", flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    left_out = sorted(set(PROVIDERS[args.device]) - set(there))
    kept = {
        "device": device,
        "model": args.model,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "left_out": left_out,
    }
    write_whole(args.out, json.dumps({**kept, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
