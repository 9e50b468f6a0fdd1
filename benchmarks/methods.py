"""Selection criteria beside each other on a real encoder: pruned, and recovered in closed form.

    CIFAR10_DIR=.../cifar10 python benchmarks/methods.py --encoder VIT.safetensors --out benchmarks/results/methods.json

The encoder: timm ``vit_tiny_patch16_224(img_size=32, patch_size=4, depth=6, num_classes=10)`` trained on CIFAR-10. Every block keeps the
same number of its 768 neurons; recovery and the criteria that look at images use the same 1,024 training images; top-1 is
measured on 4,000 test images. The seed draws the calibration images and the neurons of ``random``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from train_cifar10_clip import load_split, normalise

from dgmr_tp import prune

CRITERIA = ("random", "l2", "dgmr", "activation", "output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    root = Path(os.environ["CIFAR10_DIR"])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(args.encoder).items()})
    images, _ = load_split(root, "train")
    test, answers = (part[:4000] for part in load_split(root, "test"))

    def accuracy(tower: torch.nn.Module) -> float:
        with torch.no_grad():
            right = sum(int((tower(normalise(x)).argmax(1) == y).sum()) for x, y in zip(test.split(500), answers.split(500), strict=True))
        return 100 * right / len(test)

    rows: list[dict[str, object]] = []
    dense = accuracy(model)
    print(f"dense {dense:.1f}", flush=True)
    for keep in (192, 96, 48):
        for criterion in CRITERIA:
            for seed in range(args.seeds):
                chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:1024]
                calibration = [normalise(batch) for batch in images[chosen].split(128)]
                started = time.perf_counter()
                recovered, plan, _ = prune(model, calibration, criterion=criterion, keep=keep, seed=seed)
                seconds = time.perf_counter() - started
                cut = prune(model, plan=plan).model
                row = {"keep": keep, "criterion": criterion, "seed": seed, "pruned": accuracy(cut), "recovered": accuracy(recovered)}
                rows.append({**row, "seconds": seconds})
                print(f"{keep:>4} {criterion:<11} {seed} {row['pruned']:6.1f} → {row['recovered']:5.1f}  {seconds:5.1f} s", flush=True)
    result = {"dense": dense, "rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
