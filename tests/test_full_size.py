"""Every family at full size on the meta device: halve all MLPs, and check the parameters and FLOPs that remain."""

import pytest
import timm
import torch
import transformers
from compress import block_sites

from dgmr_tp import open_model
from dgmr_tp.encoders import adapt
from dgmr_tp.pruning.cost import flop_cost, flops, parameter_cost, parameters
from dgmr_tp.pruning.pruner import resize

# Blocks, token width and hidden width, from the models' publications.
TIMM = {
    "vit_huge_patch14_clip_224": (32, 1280, 5120),
    "vit_giant_patch14_reg4_dinov2": (40, 1536, 4096),
    "vit_7b_patch16_dinov3": (40, 4096, 8192),
    "vit_huge_plus_patch16_dinov3": (32, 1280, 5120),
    "eva_giant_patch14_clip_224": (40, 1408, 6144),
    "eva02_large_patch14_clip_224": (24, 1024, 2730),
    "eva02_enormous_patch14_clip_224": (64, 1792, 15360),
    "vit_so400m_patch14_siglip_224": (27, 1152, 4304),
    "vit_pe_core_gigantic_patch14_448": (50, 1536, 8960),
    "aimv2_3b_patch14_224": (24, 3072, 8192),
    "deit3_huge_patch14_224": (32, 1280, 5120),
    "swinv2_large_window12_192": (24, 192, 768),
}
OPEN_CLIP = {"ViT-bigG-14": (48, 1664, 8192), "coca_ViT-L-14": (24, 1024, 4096), "ViT-B-16-SigLIP2": (12, 768, 3072)}


def intern_300m():
    config = transformers.InternVLVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    return transformers.InternVLVisionModel(config), 448


def dinov2_giant():
    config = transformers.Dinov2Config(
        hidden_size=1536,
        num_hidden_layers=40,
        num_attention_heads=24,
        mlp_ratio=4,
        use_swiglu_ffn=True,
        image_size=518,
        patch_size=14,
    )
    return transformers.Dinov2Model(config), 518


TRANSFORMERS = {intern_300m: (24, 1024, 4096), dinov2_giant: (40, 1536, 4096)}


def halved(tower, image_size, blocks, width, hidden):
    sites = block_sites(tower)
    assert (len(sites), sites[0].width, sites[0].hidden) == (blocks, width, hidden)
    size, work = parameter_cost(tower, sites), flop_cost(tower, sites, image_size)
    keep = {site.name: site.hidden // 2 for site in sites}
    resize(tower, keep)
    assert [site.hidden for site in block_sites(tower)] == list(keep.values())
    cut = {site.name: site.hidden - keep[site.name] for site in sites}
    assert parameters(tower) == size.total - sum(size.neuron[name] * count for name, count in cut.items()) < size.total
    assert flops(tower, image_size) == work.total - sum(work.neuron[name] * count for name, count in cut.items())
    assert all(parameter.is_meta for parameter in tower.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    with torch.device("meta"):
        tower = timm.create_model(name, num_classes=0)
    halved(tower, timm.data.resolve_data_config({}, model=tower)["input_size"][-1], *TIMM[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name):
    model = open_model(f"open_clip:{name}", weights="none")
    halved(model.tower, model.image_size, *OPEN_CLIP[name])


@pytest.mark.slow
@pytest.mark.parametrize("build", TRANSFORMERS)
def test_transformers(build):
    with torch.device("meta"):
        tower, image_size = build()
    assert len(adapt(tower).blocks()) == TRANSFORMERS[build][0]
    halved(tower, image_size, *TRANSFORMERS[build])
