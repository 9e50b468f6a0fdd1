"""Train the demo CLIP of the package (dgmr_tp/data/demo_clip) from scratch on generated scenes.

    python benchmarks/train_demo_clip.py --steps 2600 --stop-after 2200 --out runs/demo_clip_1
    python benchmarks/train_demo_clip.py --init runs/demo_clip_1 --batch 128 --steps 2200 --mlp-decay 1.5 --seed 1 \
        --out dgmr_tp/data/demo_clip

The contrastive loss is CLIP's with several positives. Two of three batches have full captions. The third has captions
that name color and shape only, and every image of that color and shape is a positive. Linear heads that predict the
attributes help the vision tower in the first steps and are then discarded.

The second command applies strong weight decay to the vision MLPs. Large towers train for so long that decay removes
what the task does not need. After a training of minutes, a hidden layer still has most of its random initial weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dgmr_tp.data.scenes import (
    BACKGROUNDS,
    CLASSNAMES,
    COLORS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    TEMPLATES,
    TEXTURES,
    Scene,
    distinct,
)

CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 6,
            "head_width": 32,
            "mlp_ratio": 4.0,
        },
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
    },
    "preprocess_cfg": {
        "mean": [0.42, 0.42, 0.42],
        "std": [0.26, 0.26, 0.26],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
ATTRIBUTES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "texture": TEXTURES,
    "row": tuple(ROWS),
    "column": tuple(COLUMNS),
    "background": BACKGROUNDS,
}
TRAIN_SEED, TEST_SEED = 1, 2
FLIPPED = torch.tensor([2, 1, 0])  # columns of a mirrored image


def render(span: tuple[int, int, int]) -> np.ndarray:
    seed, start, stop = span
    return np.stack([Scene.draw(seed, i).image() for i in range(start, stop)])


def training_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images, uint8 ``[count, 3, 64, 64]``, and their attributes as indices ``[count, 7]``."""
    spans = [(TRAIN_SEED, i, min(i + 500, count)) for i in range(0, count, 500)]
    with ProcessPoolExecutor(2) as pool:
        images = torch.from_numpy(np.concatenate(list(pool.map(render, spans)))).permute(0, 3, 1, 2).contiguous()
    scenes = [Scene.draw(TRAIN_SEED, i) for i in range(count)]
    labels = [[options.index(getattr(scene, name)) for name, options in ATTRIBUTES.items()] for scene in scenes]
    return images, torch.tensor(labels)


def captions(labels: torch.Tensor, full: bool, rng: torch.Generator) -> list[str]:
    texts = []
    for row in labels.tolist():
        values = {name: options[i] for (name, options), i in zip(ATTRIBUTES.items(), row, strict=True)}
        if full:
            texts.append(Scene(0, 0, **values).caption)
        else:
            template = TEMPLATES[torch.randint(len(TEMPLATES), (), generator=rng)]
            texts.append(template.format(c=f"{values['color']} {values['shape']}"))
    return texts


def normalize(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror half of the images (left becomes right), shift all by up to two pixels, and vary the brightness."""
    images, labels = images.clone(), labels.clone()
    mirror = torch.rand(len(images), generator=rng) < 0.5
    images[mirror] = images[mirror].flip(-1)
    column = list(ATTRIBUTES).index("column")
    labels[mirror, column] = FLIPPED[labels[mirror, column]]
    dx, dy = (int(torch.randint(5, (), generator=rng)) for _ in range(2))
    images = F.pad(normalize(images), (2, 2, 2, 2), mode="replicate")[..., dy : dy + 64, dx : dx + 64]
    light = 1 + 0.1 * torch.randn(len(images), 1, 1, 1, generator=rng)
    return images * light, labels


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Return CLIP's symmetric cross entropy. The target of a row is spread evenly over its positives."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = match.float()
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    return (rows + F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))) / 2


@torch.no_grad()
def evaluate(model, tokenizer, images, scenes) -> dict[str, float]:
    """Return zero-shot top-1 over all classes and image-to-text recall at 5, as clip_benchmark defines them."""
    model.eval()
    embed = F.normalize(torch.cat([model.encode_image(batch) for batch in images.split(250)]), dim=-1)
    classes = [
        F.normalize(
            F.normalize(model.encode_text(tokenizer([t.format(c=name) for t in TEMPLATES])), dim=-1).mean(0), dim=0
        )
        for name in CLASSNAMES
    ]
    top1 = (embed @ torch.stack(classes).T).argmax(1) == torch.tensor([scene.label for scene in scenes])
    text = F.normalize(model.encode_text(tokenizer([scene.caption for scene in scenes])), dim=-1)
    best = (embed @ text.T).topk(5).indices == torch.arange(len(scenes))[:, None]
    model.train()
    return {"top1": top1.float().mean().item(), "image_to_text_r5": best.any(1).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start from the weights in this directory")
    parser.add_argument("--mlp-decay", type=float, default=0.05, help="weight decay of the vision tower's MLPs")
    parser.add_argument("--stop-after", type=int, help="end after so many steps of the schedule")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "open_clip_config.json"
    config.write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    model = open_clip.create_model(f"local-dir:{args.out.resolve()}", load_weights=False)
    if args.init:
        weights = load_file(args.init / "open_clip_model.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.out.resolve()}")
    sizes = [len(options) for options in ATTRIBUTES.values()]
    heads = torch.nn.Linear(CONFIG["model_cfg"]["embed_dim"], sum(sizes))

    started = time.time()
    images, labels = training_images(args.images)
    test = list(distinct(Scene.draw(TEST_SEED, i) for i in range(1100)))[:1000]
    test_images = normalize(torch.from_numpy(np.stack([scene.image() for scene in test])).permute(0, 3, 1, 2))
    print(f"{len(images)} images drawn in {time.time() - started:.0f} s", flush=True)

    mlps = [p for name, p in model.visual.named_parameters() if ".mlp." in name and p.ndim > 1]
    in_mlps = {id(p) for p in mlps}
    others = [p for p in model.parameters() if p.ndim > 1 and id(p) not in in_mlps] + [heads.weight]
    plain = [p for p in model.parameters() if p.ndim <= 1] + [heads.bias]
    groups = [(mlps, args.mlp_decay), (others, 0.05), (plain, 0.0)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for parameters, decay in groups], lr=args.lr, betas=(0.9, 0.98)
    )
    warmup = 150
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(s / args.steps, 1)))),
    )
    started = time.time()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, args.steps + 1):
        if len(order) < args.batch:
            order = torch.randperm(len(images), generator=rng)
        chosen, order = order[: args.batch], order[args.batch :]
        x, y = augment(images[chosen], labels[chosen], rng)
        full = step % 3 != 0
        named = y if full else y[:, :2]
        match = (named[:, None] == named[None]).all(-1)
        image = model.encode_image(x)
        text = model.encode_text(tokenizer(captions(y, full, rng)))
        loss = contrastive_loss(image, text, model.logit_scale.exp(), match)
        attributes = heads(image).split(sizes, dim=1)
        auxiliary = sum(F.cross_entropy(logits, y[:, i]) for i, logits in enumerate(attributes))
        (loss + 0.5 * auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 25 == 0:
            rate = step * args.batch / (time.time() - started)
            print(
                f"step {step} loss {loss.item():.3f} attributes {auxiliary.item():.3f} {rate:.0f} images/s", flush=True
            )
        last = step == (args.stop_after or args.steps)
        if step % 200 == 0 or last:
            figures = evaluate(model, tokenizer, test_images, test)
            print(f"step {step} held out: " + json.dumps(figures), flush=True)
            weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
            save_file(weights, args.out / "open_clip_model.safetensors", metadata={"format": "pt"})
        if last:
            break


if __name__ == "__main__":
    main()
