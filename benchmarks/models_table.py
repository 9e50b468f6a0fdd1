"""Print docs/models.md: the systems of both papers, counted on the meta device, and the published figures.

python benchmarks/models_table.py > docs/models.md
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dgmr_tp import open_model
from dgmr_tp.pruning.allocation import keep_counts
from dgmr_tp.pruning.cost import flop_cost, parameter_cost

# Published parameters of the dense model and at ratio 1 (DGMR figure 1b and text; AMP tables 1, 2, 4), and FLOPs (AMP).
SYSTEMS = {
    "OpenCLIP ViT-g/14": ("open_clip:ViT-g-14", "1.01 B → 0.48 B", "0.52 T"),
    "OpenCLIP ViT-bigG/14": ("open_clip:ViT-bigG-14", "1.84 B → 0.80 B", "0.95 T"),
    "EVA02-CLIP-E/14+": ("open_clip:EVA02-E-14-plus", "4.35 B → 1.24 B", "2.23 T"),
    "EVA-CLIP-8B": ("timm:eva_clip_8b_patch14_224", "7.53 B → 3.23 B", "3.86 T"),
    "InternViT-6B": ("InternViT-6B", "5.9 B → 3.0 B", "–"),
    "DINOv2-g/14": ("timm:vit_giant_patch14_dinov2", "1.14 B → 0.66 B", "0.30 T"),
    "Swin-B": ("timm:swin_base_patch4_window7_224", "–", "–"),
}
INTERNVIT = {
    "architectures": ["InternVisionModel"],
    "hidden_size": 3200,
    "image_size": 224,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
}
HEADER = """# Systems of the papers

This page is printed by `python benchmarks/models_table.py > docs/models.md`. Every tower is built at full size on the
meta device. FLOPs are those of one image of 224 px. A multiply-add counts as two, and attention products are included.
*r* is the hidden width as a multiple of the token width.

| system | blocks × width, hidden | M parameters | r = 1 | r = 2 | GFLOPs | r = 1 | r = 2 | published |
|---|---|---|---|---|---|---|---|---|"""
FOOTER = """
- *Published*: parameters from DGMR (arXiv 2506.08591, figure 1b), FLOPs of the dense models from AMP (arXiv 2603.08100,
  tables 1, 2, 4). The papers' CLIP rows do not include the attention products. Their DINOv2 row counts a multiply-add
  once.
- The claim "more than 57 % of the parameters and FLOPs of all models" does not hold at r = 1. ViT-g loses 52.7 %, bigG
  56.5 %, InternViT-6B 50.0 % and DINOv2-g 41.5 %. The claim of 71.5 % for EVA-CLIP-E holds.
- DINOv2-g is counted with the positions of its 518 px release. At 224 px it has 1.7 M fewer parameters.
- Swin-B: the papers' code supports it, but the papers give no settings and no figures."""


def write_internvit(directory: Path) -> None:
    """Write InternViT-6B's folder without its weights."""
    (directory / "config.json").write_text(json.dumps(INTERNVIT), "utf-8")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")


def opened(source: str, **options):
    if source != "InternViT-6B":
        return open_model(source, weights="none", **options)
    with tempfile.TemporaryDirectory() as scratch:
        write_internvit(Path(scratch))
        return open_model(scratch, weights="none")


def row(name: str, source: str, published: str, published_flops: str) -> str:
    model = opened(source)
    tower, sites = model.tower, model.sites
    at_224 = model if model.image_size == (224, 224) else opened(source, image_size=224)
    costs = (parameter_cost(tower, sites), flop_cost(at_224.tower, sites, 224))
    shapes: dict[tuple[int, int], int] = {}
    for site in sites:
        shapes[site.width, site.hidden] = shapes.get((site.width, site.hidden), 0) + 1
    blocks = ", ".join(f"{count} × {width}, {hidden}" for (width, hidden), count in shapes.items())
    columns: list[list[str]] = [[f"{costs[0].total / 1e6:.1f}"], [f"{costs[1].total / 1e9:.1f}"]]
    for ratio in (1, 2):
        counts = keep_counts(sites, mlp_ratio=ratio)
        for column, cost, unit in zip(columns, costs, (1e6, 1e9), strict=True):
            after = cost.without({site.name: site.hidden - counts[site.name] for site in sites})
            column.append(f"{after / unit:.1f} ({100 * (after / cost.total - 1):.1f} %)")
    return " | ".join([f"| {name}", blocks, *columns[0], *columns[1], f"{published}, {published_flops} |"])


if __name__ == "__main__":
    print(HEADER)
    for name, (source, *published) in SYSTEMS.items():
        print(row(name, source, *published), flush=True)
    print(FOOTER)
