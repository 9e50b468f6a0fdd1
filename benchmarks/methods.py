"""All selection methods beside each other: pruned, and recovered in closed form, at equal numbers of parameters.

    CIFAR10_DIR=.../cifar10 python benchmarks/methods.py --encoder VIT.safetensors --out benchmarks/results/methods.json

Encoders: ``demo``, the demo CLIP on generated scenes; ``cifar``, timm ``vit_tiny_patch16_224(img_size=32, patch_size=4, depth=6)``
trained on CIFAR-10; ``swiglu`` and ``swin``, small ones trained here for a few epochs (kept beside ``--out``). ``--only`` chooses.

Every method and recovery look at the same 1,024 unlabelled training images, drawn by the seed, as are the neurons of ``random``.
AMP's search runs at several thresholds; the other methods then get as many parameters as it kept. Measured on 2,000 test images: the
accuracy of the *original* head (zero-shot for ``demo``), the cosine to the dense embedding and, for the first seed, k-NN over 2,000
training images (k = 20, T = 0.07). At an eighth, four methods are distilled as well: 1,000 steps of 64 unlabelled images, measured after
100 and after 1,000 of the same run. AMP's search is repeated with fewer images, to see how few it needs.

Cells are kept in the JSON as they are done; called again, the script goes on. At its end it prints the tables and draws
``methods.svg`` beside the JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from train_cifar10_clip import load_split, normalise, train

from dgmr_tp import prune
from dgmr_tp.compression.amp_search import SearchConfig, search
from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.planning import make_plan
from dgmr_tp.compression.rankings import rank
from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES, Scene
from dgmr_tp.distillation.engine import parameter_groups
from dgmr_tp.distillation.losses import DistillationLoss, FeatureTap
from dgmr_tp.encoders import adapt, open_model, wrap_tower
from dgmr_tp.pruning import Plan
from dgmr_tp.pruning.cost import parameters
from dgmr_tp.pruning.output_selection import NUM_SENSITIVITY_IMAGES
from dgmr_tp.utils.files import atomic_write
from dgmr_tp.utils.knn import nearest_classes

UNIFORM = ("random", "l1", "l2", "taylor", "amp", "dgmr", "activation", "output")
FITTED = "output, fitted widths"
MATCHED = ("random", "l2", "taylor", "amp", "dgmr")
SEARCHES = {"amp search": (1e-2,), "amp search, two-sided": (5e-3, 2e-2, 8e-2)}
FEWER = {"amp search, two-sided": (2e-2, (64, 256))}
"""A threshold, and with how few images the search is tried."""
DISTILLED = ("random", "amp", "dgmr", FITTED)
STEPS = (100, 1000)
IMAGES, TESTED = 1024, 2000


@dataclass
class Subject:
    """An encoder and what it is measured on."""

    tower: nn.Module
    head: Callable[[Tensor], Tensor]
    """From embeddings to class scores."""
    train: Tensor
    """Preprocessed images: the first 2,000 are the k-NN's bank, calibration comes from the others."""
    labels: Tensor
    test: Tensor
    answers: Tensor

    def calibration(self, seed: int) -> list[Tensor]:
        order = TESTED + torch.randperm(len(self.train) - TESTED, generator=torch.Generator().manual_seed(seed))
        return list(self.train[order[:IMAGES]].split(128))


def demo() -> Subject:
    opened = open_model("demo")
    clip = opened.module.eval()
    with torch.no_grad():
        prompts = [
            clip.encode_text(opened.tokenizer([t.format(c=name) for t in TEMPLATES]), normalize=True).mean(0)
            for name in CLASSNAMES
        ]
    texts = F.normalize(torch.stack(prompts), dim=-1)
    scenes = {
        seed: [Scene.draw(seed, i) for i in range(count)] for seed, count in ((201, TESTED + 4096), (202, TESTED))
    }
    pictures = {
        seed: torch.stack([opened.preprocess(Image.fromarray(scene.image())) for scene in drawn])
        for seed, drawn in scenes.items()
    }
    labels = {seed: torch.tensor([scene.label for scene in drawn]) for seed, drawn in scenes.items()}
    return Subject(
        clip.visual, lambda z: F.normalize(z, dim=-1) @ texts.T, pictures[201], labels[201], pictures[202], labels[202]
    )


def on_cifar(model: nn.Module) -> Subject:
    root = Path(os.environ["CIFAR10_DIR"])
    (images, labels), (test, answers) = load_split(root, "train"), load_split(root, "test")
    head, limit = model.get_classifier(), TESTED + 8192
    model.reset_classifier(0)
    pictures = normalise(images[:limit]), labels[:limit], normalise(test[:TESTED]), answers[:TESTED]
    return Subject(model.eval(), head, *pictures)


def cifar(encoder: Path) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(encoder).items()})
    return model


def trained(name: str, build: Callable[[], nn.Module], folder: Path, epochs: int) -> nn.Module:
    """A model trained on CIFAR-10 here, or on an earlier call."""
    torch.manual_seed(0)
    model, file = build(), folder / f"{name}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    images, labels = load_split(Path(os.environ["CIFAR10_DIR"]), "train")
    train(model, images, labels, epochs)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), file)
    return model


def swiglu() -> nn.Module:
    options = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 6,
        "num_classes": 10,
        "mlp_layer": SwiGLUPacked,
        "mlp_ratio": 16 / 3,
    }
    return timm.create_model("vit_tiny_patch16_224", **options)


def swin() -> nn.Module:
    return timm.models.SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=64,
        depths=(2, 4),
        num_heads=(2, 4),
        num_classes=10,
        drop_path_rate=0.0,
    )


@torch.no_grad()
def embeddings(tower: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([tower(batch) for batch in images.split(250)])


def measured(subject: Subject, tower: nn.Module, dense: Tensor, neighbours: bool = False) -> dict[str, float]:
    found = embeddings(tower, subject.test)
    with torch.no_grad():
        right = (subject.head(found).argmax(1) == subject.answers).float().mean()
    result = {"head": 100 * float(right), "cosine": float(F.cosine_similarity(found, dense).mean())}
    if neighbours:
        voted = nearest_classes(embeddings(tower, subject.train[:TESTED]), subject.labels[:TESTED], found)
        result["knn"] = 100 * float((voted == subject.answers).float().mean())
    return result


def cell(
    subject: Subject, plan: Plan, calibration: list[Tensor], dense: Tensor, seconds: float, seed: int
) -> dict[str, object]:
    """What a plan gives, before and after recovery."""
    cut = prune(subject.tower, plan=plan).model
    recovered = prune(subject.tower, calibration, plan=plan).model
    return {
        "parameters": parameters(cut),
        "widths": [len(site.kept) for site in plan.sites.values()],
        "pruned": measured(subject, cut, dense),
        "recovered": measured(subject, recovered, dense, neighbours=seed == 0),
        "seconds": seconds,
    }


def distilling(
    tower: nn.Module, model: nn.Module, batches: Iterable[Tensor], *, steps: int, peak: float, weight_decay: float
) -> Iterator[int]:
    """Train ``model`` in place towards ``tower`` by the product's loss, warm-up of 20 steps, cosine; gives each step that is done."""
    teacher, student, objective = FeatureTap(adapt(tower)), FeatureTap(adapt(model)), DistillationLoss()
    optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), lr=peak, betas=(0.9, 0.95))
    shape = lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for step, images in enumerate(batches, start=1):
        with torch.no_grad():
            target = teacher(images)
        objective.total(objective(student(images), target)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step


def distilled(subject: Subject, plan: Plan, calibration: list[Tensor], dense: Tensor) -> dict[str, object]:
    """Recovered, then distilled by the product's loss: AdamW, warm-up, cosine, peak learning rate 2.5e-4, 64 images a step."""
    torch.manual_seed(0)
    model = copy.deepcopy(prune(subject.tower, calibration, plan=plan).model).requires_grad_(True)
    pool, result = subject.train[TESTED:], {}
    batches = (pool[torch.randint(len(pool), (64,))] for _ in range(STEPS[-1]))
    for step in distilling(subject.tower, model, batches, steps=STEPS[-1], peak=2.5e-4, weight_decay=0.05):
        if step in STEPS:
            result[str(step)] = measured(subject, model.eval(), dense, neighbours=True)
    return {"widths": [len(site.kept) for site in plan.sites.values()], "distilled": result}


def run(
    name: str, subject: Subject, store: Store, sizes: dict[str, int], chosen: list[str], searches: bool, limit: int
) -> None:
    """All cells of one encoder up to the seed ``limit``; ``sizes``: share kept, and how many seeds."""
    model = wrap_tower(subject.tower)
    dense, sites = embeddings(subject.tower, subject.test), model.sites
    store.cell(
        name,
        "dense",
        "1",
        0,
        lambda: {"parameters": parameters(subject.tower), **measured(subject, subject.tower, dense, True)},
    )

    def everything(size: str, seed: int, amount: dict, total: dict, methods: tuple[str, ...] = UNIFORM) -> None:
        calibration = subject.calibration(seed)
        for method in (method for method in methods if method in chosen):

            def make(method: str = method) -> dict[str, object]:
                started = time.perf_counter()
                plan = make_plan(model, method, CalibrationImages(calibration), seed=seed, **amount)
                return cell(subject, plan, calibration, dense, time.perf_counter() - started, seed)

            store.cell(name, method, size, seed, make)

        def fitted() -> dict[str, object]:
            started = time.perf_counter()
            if (name, seed) not in store.rankings:
                store.rankings[name, seed] = rank(model, "output", CalibrationImages(calibration))
            plan = store.rankings[name, seed].plan(model, **total)
            return cell(subject, plan, calibration, dense, time.perf_counter() - started, seed)

        if FITTED in chosen:
            store.cell(name, FITTED, size, seed, fitted)

    for size, seeds in sizes.items():
        share = Fraction(size)
        keep = {site.name: int(share * site.hidden) for site in sites}
        count = parameters(prune(subject.tower, criterion="l2", keep=keep).model)
        for seed in range(min(seeds, limit)):
            everything(size, seed, {"keep": keep}, {"budget": {"params": count}})
    calibration = subject.calibration(0)

    def amp_search(method: str, threshold: float, images: int = IMAGES) -> dict[str, object]:
        started, seen = time.perf_counter(), list(torch.cat(calibration)[:images].split(128))
        options = {"two_sided": "two-sided" in method, "candidates": min(512, images)}
        config = SearchConfig.model_validate(options)
        result = search(model, CalibrationImages(seen), threshold=threshold, config=config)
        done = cell(subject, result.plan, calibration, dense, time.perf_counter() - started, 0)
        return {**done, "image_blocks": result.image_blocks, "entropy": result.entropy}

    for method, thresholds in SEARCHES.items() if searches else ():
        for threshold in thresholds:
            size = f"ΔE {threshold:g}{' two-sided' if 'two-sided' in method else ''}"
            store.cell(name, method, size, 0, partial(amp_search, method, threshold))
            budget = {"budget": {"params": store.cells[f"{name} | {method} | {size} | 0"]["parameters"]}}
            everything(size, 0, budget, budget, MATCHED)
    for method, (threshold, counts) in FEWER.items() if searches else ():
        for count in counts:
            store.cell(
                name,
                f"{method}, {count} images",
                f"ΔE {threshold:g} two-sided",
                0,
                partial(amp_search, method, threshold, count),
            )
    for method in DISTILLED if searches else ():

        def train_on(method: str = method) -> dict[str, object]:
            count = store.cells[f"{name} | {FITTED} | 1/8 | 0"]["parameters"]
            if method == FITTED:
                plan = rank(model, "output", CalibrationImages(calibration)).plan(model, budget={"params": count})
            else:
                plan = make_plan(
                    model, method, CalibrationImages(calibration), keep={s.name: s.hidden // 8 for s in sites}
                )
            return distilled(subject, plan, calibration, dense)

        store.cell(name, method, "1/8 distilled", 0, train_on)


class Store:
    """Cells in a JSON file, each computed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict] = json.loads(path.read_text())["cells"] if path.exists() else {}
        self.rankings: dict = {}

    def cell(self, encoder: str, method: str, size: str, seed: int, make: Callable[[], dict]) -> None:
        key = f"{encoder} | {method} | {size} | {seed}"
        if key in self.cells:
            return
        self.cells[key] = make()
        setting = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "images": IMAGES,
        }
        atomic_write(self.path, json.dumps({**setting, "cells": self.cells}, indent=1) + "\n")
        row = self.cells[key]
        shown = f"{row['pruned']['head']:5.1f} → {row['recovered']['head']:5.1f}" if "pruned" in row else ""
        print(f"{key:<60} {shown}", flush=True)

    def tables(self) -> None:
        """One table per encoder and size: mean over the seeds, and their spread where there are several."""
        groups: dict[tuple[str, str], dict[str, list[dict]]] = {}
        for key, row in self.cells.items():
            encoder, method, size, _ = key.split(" | ")
            groups.setdefault((encoder, size), {}).setdefault(method, []).append(row)
        for (encoder, size), methods in groups.items():
            if size == "1":
                [row] = methods["dense"]
                print(
                    f"\n{encoder}, dense: head {row['head']:.1f}, k-NN {row['knn']:.1f}, {row['parameters']:,} parameters"
                )
                continue
            if size.endswith("distilled"):
                print(f"\n{encoder}, {size}")
                print(
                    "| method | 100 steps: head | k-NN | cosine | 1,000 steps: head | k-NN | cosine |\n|---|---|---|---|---|---|---|"
                )
                for method, [row] in methods.items():
                    after = [row["distilled"][str(step)] for step in STEPS]
                    texts = [
                        f"{figures['head']:.1f} | {figures['knn']:.1f} | {figures['cosine']:.4f}" for figures in after
                    ]
                    print(f"| {method} | {' | '.join(texts)} |")
                continue
            print(f"\n{encoder}, {size}: {next(iter(methods.values()))[0]['parameters']:,} parameters")
            print("| method | pruned: head | recovered: head | k-NN | cosine |\n|---|---|---|---|---|")
            for method, rows in methods.items():
                columns = [
                    ("pruned", "head", 1),
                    ("recovered", "head", 1),
                    ("recovered", "knn", 1),
                    ("recovered", "cosine", 4),
                ]
                texts = []
                for stage, figure, digits in columns:
                    values = torch.tensor([row[stage][figure] for row in rows if figure in row[stage]])
                    spread = f" ± {float(values.std()):.{digits}f}" if len(values) > 1 else ""
                    texts.append(f"{float(values.mean()):.{digits}f}{spread}")
                print(f"| {method} | {' | '.join(texts)} |")
            for method, rows in methods.items():
                if "image_blocks" in rows[0]:
                    blocks = len(rows[0]["widths"])
                    ours = (IMAGES + 128) * blocks + NUM_SENSITIVITY_IMAGES * (
                        blocks + blocks * (blocks + 1) // 2
                    )  # 128: the first batch, to see its tokens
                    cost = rows[0]["image_blocks"]
                    print(
                        f"cost in images × blocks, forward: {method} {cost:,}, ranking {ours:,}: {cost / ours:.0f} ×; {rows[0]['widths']}"
                    )

    def draw(self) -> None:
        """The accuracy of the original head over the parameters, pruned (dashed) and recovered, one panel per encoder."""
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot

        encoders = list(dict.fromkeys(key.split(" | ")[0] for key in self.cells))
        figure, panels = pyplot.subplots(1, len(encoders), figsize=(5 * len(encoders), 4), squeeze=False)
        for encoder, panel in zip(encoders, panels[0], strict=True):
            rows = [(key.split(" | "), row) for key, row in self.cells.items() if key.startswith(f"{encoder} | ")]
            for index, method in enumerate((*UNIFORM, FITTED)):
                points = sorted(
                    (row["parameters"] / 1e6, row["pruned"]["head"], row["recovered"]["head"])
                    for (_, name, size, seed), row in rows
                    if name == method and "/" in size and "pruned" in row and seed == "0"
                )
                if points:
                    millions, pruned, recovered = zip(*points, strict=True)
                    panel.plot(millions, recovered, f"C{index}o-", label=method, markersize=3)
                    panel.plot(millions, pruned, f"C{index}--", linewidth=0.7)
            [dense] = [row["head"] for (_, name, *_), row in rows if name == "dense"]
            panel.axhline(dense, color="black", linewidth=0.7)
            panel.set(title=encoder, xlabel="million parameters", ylabel="accuracy of the original head, %")
        panels[0][0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(self.path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="the trained CIFAR-10 ViT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["cifar", "demo", "swiglu", "swin"])
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[*UNIFORM, FITTED],
        help="those at equal widths; with --no-searches nothing else",
    )
    parser.add_argument("--no-searches", action="store_true", help="leave out AMP's searches and the distillations")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    store, weights = Store(args.out), args.out.parent / "weights"
    subjects = {
        "cifar": (lambda: on_cifar(cifar(args.encoder)), {"1/8": 3, "1/4": 3, "1/16": 1, "1/2": 1}, True),
        "demo": (demo, {"1/8": 3, "1/4": 3, "1/16": 1, "1/2": 1}, True),
        "swiglu": (lambda: on_cifar(trained("swiglu", swiglu, weights, 4)), {"1/8": 1, "1/4": 1}, False),
        "swin": (lambda: on_cifar(trained("swin", swin, weights, 4)), {"1/8": 1, "1/4": 1}, False),
    }
    rounds = (
        ((1, False), (3, False)) if args.no_searches else ((1, False), (1, True), (3, True))
    )  # the cheap cells of all encoders first
    for limit, searching in () if args.tables else rounds:
        for name in args.only:
            build, sizes, searches = subjects[name]
            run(name, build(), store, sizes, args.methods, searches and searching, limit)
    store.tables()
    store.draw()


if __name__ == "__main__":
    main()
