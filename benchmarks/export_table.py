"""Every family in every format: exported, proved, and what cannot be exported with the reason.

    python benchmarks/export_table.py --out benchmarks/results/export_table.json

The families are the small models of ``tests/families.py`` with random weights, images of 32 × 32, pruned to uneven widths. Cells are
kept in the JSON as they are done; called again, the script goes on. At its end it prints the tables of docs/export.md, vision and text
towers: the largest relative error of an embedding against PyTorch at batch 1, 3 and 8.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import pictures, redraw
from families import FAMILIES, FORMS

from dgmr_tp import load_pruned, prune
from dgmr_tp.export.bundle import export_bundle
from dgmr_tp.export.formats import FORMATS
from dgmr_tp.export.towers import export_towers
from dgmr_tp.utils.files import write_whole

SPEAKING = [
    name
    for name in FAMILIES
    if name.startswith("open_clip") or name in ("transformers CLIPModel", "transformers SiglipModel")
]
"""Families with a text tower."""


def cell(family: str, tower: str, form: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        FAMILIES[family](Path(scratch) / "model")
        model = load_pruned(Path(scratch) / "model")
        redraw(model.module)
        keep = {site.name: site.hidden // 2 + i % 3 for i, site in enumerate(model.sites)}
        pruned = prune(model, criterion="l2", keep=keep).model
        size = pruned.image_size
        parts = export_towers(pruned, pictures(8, size=size), outputs=("embedding", "patches"), text=tower == "text")[
            -1:
        ]
        report = export_bundle(
            parts, Path(scratch) / "out", model="", preprocess={}, formats=[form], latency_batches=()
        )
        entry = report["towers"][tower]["files"][form]
    errors = entry.get("relative_error", {}).get("embedding", {})
    return {
        "status": entry["status"],
        "error": max(errors.values()) if errors and None not in errors.values() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true", help="print what is there")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    # Compiling takes half a minute a model: one family of each form of MLP.
    rows = [(family, "image", form) for form in FORMATS for family in (FORMS if form == "aotinductor" else FAMILIES)]
    rows += [(family, "text", form) for form in FORMATS if form != "aotinductor" for family in SPEAKING]
    for family, tower, form in () if args.tables else rows:
        key = f"{family} | {form}" if tower == "image" else f"{family}, text | {form}"
        if key not in kept["cells"]:
            kept["cells"][key] = cell(family, tower, form)
            kept |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
            write_whole(args.out, json.dumps(kept, indent=1) + "\n")
            print(key, kept["cells"][key], flush=True)
    reasons: dict[str, list[str]] = {}
    for names in (FAMILIES, [f"{family}, text" for family in SPEAKING]):
        print(f"| family | {' | '.join(FORMATS)} |\n|---|{'---|' * len(FORMATS)}")
        for family in names:
            row = []
            for form in FORMATS:
                found = kept["cells"].get(f"{family} | {form}")
                if found and found["status"] != "verified":
                    reasons.setdefault(found["status"], []).append(f"{family} as {form}")
                row.append(
                    "not tried" if not found else f"{found['error']:.0e}" if found["status"] == "verified" else "failed"
                )
            print(f"| {family} | {' | '.join(row)} |")
    for reason, cases in reasons.items():
        print(f"- {', '.join(cases)}: {reason}")


if __name__ == "__main__":
    main()
