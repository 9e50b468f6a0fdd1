"""Export and verify every family of encoders in every format, and record why an export fails.

    python benchmarks/export_table.py --out benchmarks/results/export_table.json

The families are the small models of ``tests/families.py`` with random weights and images of 32 × 32, pruned to uneven
widths. Results are stored as they are measured, and a second call continues. At the end the script prints the tables
of docs/export.md for image and text towers: the largest relative error of an embedding against PyTorch at batch 1, 3
and 8.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import pictures, redraw
from families import FAMILIES, FORMS

from dgmr_tp import load_pruned, prune
from dgmr_tp.export.bundle import export_bundle
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.towers import export_towers
from dgmr_tp.utils.files import atomic_write

TRANSFORMERS_CLIPS = ("transformers CLIPModel", "transformers SiglipModel")
TEXT_FAMILIES = [name for name in FAMILIES if name.startswith("open_clip") or name in TRANSFORMERS_CLIPS]
"""Families with a text tower."""


def measure(family: str, tower: str, file_format: str) -> dict[str, object]:
    """Export one tower of a family in one format. Return the status and the largest relative error."""
    with tempfile.TemporaryDirectory() as scratch:
        FAMILIES[family](Path(scratch) / "model")
        model = load_pruned(Path(scratch) / "model")
        redraw(model.module)
        keep = {site.name: site.hidden // 2 + i % 3 for i, site in enumerate(model.sites)}
        pruned = prune(model, criterion="l2", keep=keep).model
        images = pictures(8, size=pruned.image_size[0])
        towers = export_towers(pruned, images, outputs=("embedding", "patches"), text=tower == "text")[-1:]
        options = {"model": "", "preprocess": {}, "formats": [file_format], "latency_batches": ()}
        report = export_bundle(towers, Path(scratch) / "out", **options)
        entry = report["towers"][tower]["files"][file_format]
    errors = entry.get("relative_error", {}).get("embedding", {})
    error = max(errors.values()) if errors and None not in errors.values() else None
    return {"status": entry["status"], "error": error}


def table_cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not tried"
    return f"{result['error']:.0e}" if result["status"] == "verified" else "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="only print the stored results")
    args = parser.parse_args()
    results = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {"cells": {}}
    cells = []
    for name in FORMATS:
        # Compilation takes half a minute per model, so it is measured for one family of each form of MLP.
        families = FORMS if name == "aotinductor" else FAMILIES
        cells += [(family, "image", name) for family in families]
        cells += [(family, "text", name) for family in TEXT_FAMILIES if name != "aotinductor"]
    for family, tower, file_format in () if args.tables else cells:
        key = f"{family} | {file_format}" if tower == "image" else f"{family}, text | {file_format}"
        if key not in results["cells"]:
            results["cells"][key] = measure(family, tower, file_format)
            results |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
            atomic_write(args.out, json.dumps(results, indent=1) + "\n")
            print(key, results["cells"][key], flush=True)
    reasons: dict[str, list[str]] = {}
    for names in (FAMILIES, [f"{family}, text" for family in TEXT_FAMILIES]):
        print(f"| family | {' | '.join(FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
        for family in names:
            row = {name: results["cells"].get(f"{family} | {name}") for name in FORMATS}
            print(f"| {family} | {' | '.join(map(table_cell, row.values()))} |")
            for name, result in row.items():
                if result and result["status"] != "verified":
                    reasons.setdefault(result["status"], []).append(f"{family} as {name}")
    for reason, cases in reasons.items():
        print(f"- {', '.join(cases)}: {reason}")


if __name__ == "__main__":
    main()
