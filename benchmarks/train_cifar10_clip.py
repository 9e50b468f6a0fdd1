"""Train a small CLIP for CIFAR-10: a ViT on its photographs, and a text tower that matches its classes.

    CIFAR10_DIR=.../cifar10 python benchmarks/train_cifar10_clip.py --encoder VIT.safetensors --out runs/cifar10_clip
    CIFAR10_DIR=.../cifar10 python benchmarks/train_cifar10_clip.py --epochs 12 --out runs/cifar10_clip

The first command takes a trained timm encoder, ``vit_tiny_patch16_224(img_size=32, patch_size=4, depth=6,
num_classes=10)``. Without ``--encoder``, one is trained and stored next to the CLIP as ``encoder.safetensors``. Its
weights are copied into open_clip's own ViT, with the patch bias folded into the positions, and the outputs are
compared. The text tower learns to map the ten class names to the ten rows of the classifier.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dgmr_tp.data.images import Images

MEAN, STD = 0.47, 0.25
CONFIG = {
    "model_cfg": {
        "embed_dim": 10,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 4,
            "width": 192,
            "layers": 6,
            "head_width": 64,
            "mlp_ratio": 4.0,
            "no_ln_pre": True,
            "norm_kwargs": {"eps": 1e-6},
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "shortest"},
}


def load_split(directory: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 ``[n, 3, 32, 32]``, and the labels of a split in webdataset tars."""
    records = Images.find(directory / split).records
    images, labels = [], []
    for record in records:
        images.append(
            torch.frombuffer(bytearray(record.read().tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
        )
    import tarfile

    for path in sorted({record.file for record in records}):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".cls")]
            label_of = {member.name: int(tar.extractfile(member).read()) for member in members}  # type: ignore[union-attr]
        labels += [label_of[r.name.split(":", 1)[1].rsplit(".", 1)[0] + ".cls"] for r in records if r.file == path]
    return torch.stack(images), torch.tensor(labels)


def normalize(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - MEAN) / STD


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> torch.nn.Module:
    """Train a classifier in place, with crops, flips and one cycle of AdamW."""
    steps = epochs * (len(images) // 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (256,))
        x = F.pad(normalize(images[chosen]), (4, 4, 4, 4))
        dx, dy = torch.randint(9, (2,)).tolist()
        x = x[..., dy : dy + 32, dx : dx + 32]
        x = torch.where(torch.rand(256, 1, 1, 1) < 0.5, x.flip(-1), x)
        F.cross_entropy(model(x), labels[chosen], label_smoothing=0.1).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        if step % 50 == 0:
            print(f"encoder: step {step} of {steps}", flush=True)
    return model.eval()


def into_open_clip(vit: torch.nn.Module, clip: torch.nn.Module) -> None:
    """Copy the weights of timm's ViT into open_clip's, which then computes the same function."""
    source, target = vit.state_dict(), clip.visual.state_dict()
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for name, tensor in source.items():
        if name.startswith("blocks."):
            new = name.replace("blocks.", "transformer.resblocks.")
            for old, fresh in names.items():
                new = new.replace(old, fresh)
            target[new] = tensor
    position = source["pos_embed"][0].clone()
    position[1:] += source["patch_embed.proj.bias"]
    target |= {"conv1.weight": source["patch_embed.proj.weight"], "class_embedding": source["cls_token"].flatten()}
    target |= {
        "positional_embedding": position,
        "ln_post.weight": source["norm.weight"],
        "ln_post.bias": source["norm.bias"],
    }
    target["proj"] = source["head.weight"].T
    clip.visual.load_state_dict(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    root = Path(os.environ["CIFAR10_DIR"])
    images, labels = load_split(root, "train")
    classnames = (root / "classnames.txt").read_text("utf-8").split("\n")[:10]
    templates = [
        line for line in (root / "zeroshot_classification_templates.txt").read_text("utf-8").split("\n") if line
    ]
    if args.encoder:
        vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10).eval()
        vit.load_state_dict({name: tensor.float() for name, tensor in load_file(args.encoder).items()})
    else:
        vit = train(
            timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, num_classes=10),
            images,
            labels,
            args.epochs,
        )

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, args.out / "encoder.safetensors"
    )
    (args.out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", "utf-8")
    clip = open_clip.create_model(f"local-dir:{args.out.resolve()}", load_weights=False).eval()
    into_open_clip(vit, clip)
    with torch.no_grad():
        x = normalize(images[:32])
        difference = (clip.visual(x) - vit.forward_features(x)[:, 0] @ vit.head.weight.T).abs().max()
    assert difference < 1e-3, difference

    # The embedding is the ten logits. The text tower learns the classifier's rows, and the vision tower is unchanged.
    tokenizer = open_clip.get_tokenizer(f"local-dir:{args.out.resolve()}")
    with torch.no_grad():
        features = torch.cat([clip.encode_image(normalize(batch)) for batch in images[:20000].split(500)])
    tokens = tokenizer([template.format(c=name) for name in classnames for template in templates])
    clip.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=5e-4)
    started = time.time()
    for step in range(1, 301):
        chosen = torch.randint(len(features), (1024,))
        text = F.normalize(clip.encode_text(tokens), dim=-1).view(10, len(templates), -1)
        pick = F.normalize(text[:, torch.randperm(len(templates))[:4]].mean(1), dim=-1)
        loss = F.cross_entropy(30 * F.normalize(features[chosen], dim=-1) @ pick.T, labels[chosen])
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        if step % 50 == 0:
            print(f"text: step {step} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
    save_file(
        {n: t.detach().half().contiguous() for n, t in clip.state_dict().items()},
        args.out / "open_clip_model.safetensors",
    )


if __name__ == "__main__":
    main()
