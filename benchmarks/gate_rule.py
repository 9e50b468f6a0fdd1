"""Compare the weight rows that DGMR can use in a gated MLP: those of the gate, of the value, or of both.

    CIFAR10_DIR=.../cifar10 python benchmarks/gate_rule.py --out benchmarks/results/gate_rule.json

The script trains a small SwiGLU ViT on CIFAR-10 (timm, width 192, 6 blocks, 512 neurons, 8×8 patches). It prunes the
ViT with each rule and recovers it on 1,024 training images. It then measures the top-1 accuracy on 4,000 test images
and the mean held-out error of the MLPs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import timm
import torch
import torch_pruning as tp
from timm.layers import SwiGLUPacked
from train_cifar10_clip import load_split, normalize, train

from dgmr_tp import prune
from dgmr_tp.pruning.importance import producer_rows, selection_scores
from dgmr_tp.pruning.selection import select_diverse_rows

ARCHITECTURE = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 6,
    "num_classes": 10,
    "mlp_layer": SwiGLUPacked,
    "mlp_ratio": 16 / 3,
}


class Rule(tp.importance.Importance):
    """DGMR on the rows that ``rows(gate, value)`` returns, with one row per neuron."""

    def __init__(self, rows) -> None:
        self.rows = rows

    def __call__(self, group: tp.Group, **_: object) -> torch.Tensor:
        gate, value = producer_rows(group).chunk(2, dim=1)
        scores = selection_scores(select_diverse_rows(self.rows(gate, value).numpy()))
        return scores.repeat(2)


RULES = {
    "pair: gate and value side by side (ours)": Rule(lambda gate, value: torch.cat([gate, value], 1)),
    "pair, each half scaled to the same mean norm": Rule(
        lambda gate, value: torch.cat([gate / gate.norm(), value / value.norm()], 1)
    ),
    "gate alone": Rule(lambda gate, value: gate),
    "value alone": Rule(lambda gate, value: value),
    "value, scaled by the norm of its gate": Rule(lambda gate, value: value * gate.norm(dim=1, keepdim=True)),
    "L2 of all rows (torch-pruning)": "l2",
    "random": "random",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_split(Path(os.environ["CIFAR10_DIR"]), "train")
    model = timm.create_model("vit_tiny_patch16_224", **ARCHITECTURE)
    train(model, images, labels, args.epochs)
    test, labels_test = (part[:4000] for part in load_split(Path(os.environ["CIFAR10_DIR"]), "test"))

    def accuracy(tower: torch.nn.Module) -> float:
        with torch.no_grad():
            correct = sum(
                int((tower(normalize(x)).argmax(1) == y).sum())
                for x, y in zip(test.split(500), labels_test.split(500), strict=True)
            )
        return 100 * correct / len(test)

    calibration = [normalize(batch) for batch in images[:1024].split(128)]
    rows = []
    for keep in (256, 128, 64):
        for name, rule in RULES.items():
            pruned = prune(model, criterion=rule, keep=keep).model
            recovered, _, table = prune(model, calibration, criterion=rule, keep=keep)
            error = sum(row.recovered_error for row in table) / len(table)
            before, after = accuracy(pruned), accuracy(recovered)
            rows.append({"keep": keep, "rule": name, "pruned": before, "recovered": after, "error": error})
            print(f"{keep:>4} of 512  {name:<48} {before:5.1f} → {after:5.1f}  error {error:.4f}", flush=True)
    result = {
        "dense": accuracy(model),
        "epochs": args.epochs,
        "rows": rows,
        "torch": torch.__version__,
        "machine": platform.processor(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(f"dense {result['dense']:.1f}")


if __name__ == "__main__":
    main()
