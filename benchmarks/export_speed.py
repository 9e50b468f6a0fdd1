"""Measure how much of the reduction in FLOPs becomes speed in onnxruntime on a CPU, for ViT-B/16 and ViT-L/14.

    python benchmarks/export_speed.py --out benchmarks/results/export_speed.json

The weights are random, because speed does not depend on them. For every hidden width, the ONNX files of the pruned and
of the dense tower are called in turn in one process, at batch 8. The ratio of the median times is divided by the ratio
of the FLOPs. Widths next to a multiple of 8 or 64 show whether the runtime needs aligned widths. Results are stored as
they are measured, and a second call continues.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import onnxruntime
import torch

from dgmr_tp import open_model, prune
from dgmr_tp.export import onnx_file
from dgmr_tp.export.latency import latencies
from dgmr_tp.export.towers import vision_export_tower
from dgmr_tp.pruning.cost import flops
from dgmr_tp.utils.files import atomic_write

HIDDEN_WIDTHS = {"ViT-B-16": (768, 770, 761, 1536), "ViT-L-14": (1024, 1026, 1017)}
BATCH_SIZE, REPEATS = 8, {"ViT-B-16": 9, "ViT-L-14": 5}


def measure(name: str, widths: tuple[int, ...], repeats: int) -> dict[str, dict[str, float]]:
    """Return the speed-up, the ratio of the FLOPs and the median time for every hidden width."""
    dense, rows = open_model(f"open_clip:{name}", "none"), {}
    images = torch.randn(BATCH_SIZE, 3, *dense.image_size)
    dense_flops = flops(dense.tower, dense.image_size)
    with tempfile.TemporaryDirectory() as scratch:
        runs = {}
        for width in (None, *widths):
            keep = {site.name: width for site in dense.sites} if width else None
            model = prune(dense, criterion="random", keep=keep).model if width else dense
            path = Path(scratch) / f"{width}.onnx"
            onnx_file.write(vision_export_tower(model.adapter, images[:2]), path)
            runs[width] = onnx_file.read(path, os.cpu_count()), flops(model.tower, model.image_size)
        for width in widths:
            calls = {str(key): lambda run=runs[key][0]: run(images) for key in (None, width)}
            times = latencies(calls, repeats)
            speedup = times["None"]["median"] / times[str(width)]["median"]
            ideal = dense_flops / runs[width][1]
            rows[str(width)] = {
                "faster": speedup,
                "ideal": ideal,
                "share": speedup / ideal,
                "ms": times[str(width)]["median"],
            }
            print(name, width, rows[str(width)], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="only print the stored results")
    args = parser.parse_args()
    results = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"shapes": {}}
    for name, widths in {} if args.tables else HIDDEN_WIDTHS.items():
        if name not in results["shapes"]:
            results["shapes"][name] = measure(name, widths, REPEATS[name])
            results |= {
                "threads": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
                "onnxruntime": onnxruntime.__version__,
            }
            atomic_write(args.out, json.dumps(results, indent=1) + "\n")
    print("| shape | hidden width | FLOPs ratio | faster | share of the ideal |\n|---|---|---|---|---|")
    for name, rows in results["shapes"].items():
        for width, row in rows.items():
            print(f"| {name} | {width} | {row['ideal']:.2f} | {row['faster']:.2f} | {row['share']:.2f} |")


if __name__ == "__main__":
    main()
