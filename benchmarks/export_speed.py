"""How much of the cut in FLOPs becomes speed: ViT-B/16 and ViT-L/14 shapes in onnxruntime on a CPU, dense and pruned in turn.

    python benchmarks/export_speed.py --out benchmarks/results/export_speed.json

Random weights (speed does not depend on them). For every hidden width: the ONNX file of the pruned tower and that of the dense one are
called in turn in one process, batch 8, and the ratio of the medians is divided by the ratio of the FLOPs. Widths beside a multiple of 8
or 64 show whether the runtime minds. Cells are kept as they are done.
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
from dgmr_tp.utils.files import write_whole

SHAPES = {"ViT-B-16": (768, 770, 761, 1536), "ViT-L-14": (1024, 1026, 1017)}
BATCH, REPEATS = 8, {"ViT-B-16": 9, "ViT-L-14": 5}


def measure(name: str, widths: tuple[int, ...], repeats: int) -> dict[str, dict[str, float]]:
    dense, rows = open_model(f"open_clip:{name}", "none"), {}
    images = torch.randn(BATCH, 3, dense.image_size, dense.image_size)
    work = flops(dense.tower, dense.image_size)
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
            found = latencies(calls, repeats)
            faster, ideal = found["None"]["median"] / found[str(width)]["median"], work / runs[width][1]
            rows[str(width)] = {
                "faster": faster,
                "ideal": ideal,
                "share": faster / ideal,
                "ms": found[str(width)]["median"],
            }
            print(name, width, rows[str(width)], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="print what is there")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.exists() else {"shapes": {}}
    for name, widths in {} if args.tables else SHAPES.items():
        if name not in kept["shapes"]:
            kept["shapes"][name] = measure(name, widths, REPEATS[name])
            kept |= {
                "threads": os.cpu_count(),
                "machine": platform.processor() or platform.machine(),
                "onnxruntime": onnxruntime.__version__,
            }
            write_whole(args.out, json.dumps(kept, indent=1) + "\n")
    print("| shape | hidden width | FLOPs ratio | faster | share of the ideal |\n|---|---|---|---|---|")
    for name, rows in kept["shapes"].items():
        for width, row in rows.items():
            print(f"| {name} | {width} | {row['ideal']:.2f} | {row['faster']:.2f} | {row['share']:.2f} |")


if __name__ == "__main__":
    main()
