"""Loading of released checkpoints: file formats, layouts, pruned widths, damaged files, and the hub."""

import copy
import json
import os
import pickle
import re

import open_clip
import pytest
import timm
import torch
from conftest import pictures, redraw, run_command
from families import FAMILIES, INTERN, OPEN_CLIP, TEXT, VIT, in_transformers, plain_output, write_shards
from safetensors.torch import save_file
from torch import nn

from dgmr_tp import DgmrError, MLPPruner, open_model
from dgmr_tp.encoders.checkpoint import load_by_shape
from dgmr_tp.encoders.checkpoint_file import read_tensors
from dgmr_tp.encoders.open_clip_models import _load_release, _report_activation, _tag_and_file
from dgmr_tp.encoders.timm_models import to_timm_keys
from dgmr_tp.pruning import find_sites

IMAGES = pictures(3)


def output(tower):
    return plain_output(tower.eval(), IMAGES)


def narrowed(tower, keep=40):
    """Return a pruned copy, with widths as in the papers' checkpoints."""
    tower = copy.deepcopy(tower)
    blocks = [site for site in find_sites(tower) if "blocks." in site.name or site.name.startswith("encoder.")]
    pruner = MLPPruner(tower, keep=keep, sites=blocks)
    pruner.apply(pruner.plan())
    return tower


def same_and_not_by_chance(loaded, expected):
    """Assert that the outputs agree, and that a change of one MLP would be noticed."""
    assert torch.allclose(output(loaded), output(expected), atol=1e-6)
    broken = copy.deepcopy(loaded)
    last = [layer for name, layer in broken.named_modules() if isinstance(layer, nn.Linear) and ".mlp." in name][-1]
    nn.init.zeros_(last.weight)
    assert not torch.allclose(output(broken), output(expected), atol=1e-4)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A small CLIP with a name in open_clip's registry."""
    path = tmp_path_factory.mktemp("configs") / "tiny-clip.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": OPEN_CLIP, "text_cfg": TEXT}))
    open_clip.add_model_config(path)
    return redraw(open_clip.create_model("tiny-clip"))


SAVERS = {
    "old.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "open_clip_model.safetensors": save_file,
    "open_clip_pytorch_model.bin": torch.save,
    "flat.pt": torch.save,
    "epoch_9.pt": lambda state, path: torch.save(
        {"epoch": 9, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path
    ),
}


@pytest.mark.parametrize("file", SAVERS)
@pytest.mark.parametrize("width", ["dense", "pruned"])
def test_a_clip_opens_from_every_format(tiny_clip, tmp_path, file, width):
    clip = copy.deepcopy(tiny_clip)
    clip.visual = narrowed(clip.visual) if width == "pruned" else clip.visual
    SAVERS[file](clip.state_dict(), tmp_path / file)
    opened = open_model("open_clip:tiny-clip", str(tmp_path / file))
    same_and_not_by_chance(opened.module.visual, clip.visual)
    tokens = opened.tokenizer(["a red star", "a blue ring"])
    with torch.no_grad():
        assert torch.equal(opened.module.encode_text(tokens), tiny_clip.encode_text(tokens))


def test_shards_open_by_their_index(tiny_clip, tmp_path):
    write_shards(tmp_path, tiny_clip.state_dict())
    same_and_not_by_chance(
        open_model("open_clip:tiny-clip", str(tmp_path / "model.safetensors.index.json")).module.visual,
        tiny_clip.visual,
    )


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_a_bare_tower_needs_the_text_towers_weights_named(tiny_clip, tmp_path, prefix):
    tower = narrowed(tiny_clip.visual)
    path = tmp_path / "distilled.pth"
    torch.save({"model": {f"{prefix}{name}": tensor for name, tensor in tower.state_dict().items()}}, path)
    with pytest.raises(DgmrError, match=r"vision tower alone.*--pretrained TAG\+"):
        open_model("open_clip:tiny-clip", str(path))
    clip = copy.deepcopy(tiny_clip)
    _load_release(clip, str(path), tower_only=True)
    same_and_not_by_chance(clip.visual, tower)


@pytest.mark.parametrize("width", ["dense", "pruned"])
def test_eva_clips_own_release_opens_as_open_clip(tmp_path, width):
    """EVA02_CLIP_E_psz14_plus_s9B.pt: the tower's keys start with ``visual.``, without open_clip's ``trunk.``."""
    FAMILIES["open_clip EVA02-E+"](tmp_path / "clip")
    clip = open_model(str(tmp_path / "clip")).module
    released = narrowed(clip) if width == "pruned" else clip
    state = {name.replace("visual.trunk.", "visual."): tensor for name, tensor in released.state_dict().items()}
    torch.save(state, tmp_path / "EVA02_CLIP_E_psz14_plus_s9B.pt")
    fresh = redraw(copy.deepcopy(clip), seed=1)
    _load_release(fresh, str(tmp_path / "EVA02_CLIP_E_psz14_plus_s9B.pt"), tower_only=False)
    same_and_not_by_chance(fresh.visual, released.visual)


def in_dinov2s_names(state):
    """Rename the keys as in facebookresearch's DINOv2 with SwiGLU."""
    names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    # The release has a mask token and a position for the class token, which timm adds to the token itself.
    return {**renamed, "mask_token": torch.zeros(1, 48)}


@pytest.mark.parametrize("width", ["dense", "pruned"])
def test_dinov2s_own_release_opens_as_timm(tmp_path, width):
    """dinov2_vitg14_pretrain.pth and the papers' pruned checkpoints have ``w12`` and ``w3``."""
    arguments = {**VIT, "num_classes": 0}
    dense = redraw(timm.create_model("vit_giant_patch14_dinov2", **arguments))
    released = narrowed(dense) if width == "pruned" else dense
    torch.save(in_dinov2s_names(released.state_dict()), tmp_path / "dinov2_vitg14_pretrain.pth")
    tensors = read_tensors(tmp_path / "dinov2_vitg14_pretrain.pth")
    assert "blocks.0.mlp.w12.weight" in tensors
    fresh = timm.create_model("vit_giant_patch14_dinov2", **arguments)
    load_by_shape(fresh, to_timm_keys(tensors, fresh, "file"), "file")
    same_and_not_by_chance(fresh, released)


def eva_8b(**options):
    import dgmr_tp.encoders.timm_models  # noqa: F401  (registers the name)

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 24}
    return timm.create_model("eva_clip_8b_patch14_224", **small, **options)


def in_transformers_names(state):
    """Rename the keys as in BAAI/EVA-CLIP-8B on the hub."""
    released = {"text_model.embeddings.token_embedding.weight": torch.zeros(5, 4), "logit_scale": torch.zeros(())}
    released["vision_model.embeddings.class_embedding"] = state["cls_token"].flatten()
    released["vision_model.embeddings.position_embedding.weight"] = state["pos_embed"][0]
    released["visual_projection.weight"] = state["head.weight"]
    released["vision_model.post_layernorm.weight"] = state["norm.weight"]
    for part in ("weight", "bias"):
        released[f"vision_model.embeddings.patch_embedding.{part}"] = state[f"patch_embed.proj.{part}"]
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"vision_model.encoder.layers.{block}."
        query, key, value = state[f"{ours}attn.qkv.weight"].chunk(3)
        for name, rows in (("q", query), ("k", key), ("v", value)):
            released[f"{theirs}self_attn.{name}_proj.weight"] = rows.clone()
        released[f"{theirs}layer_norm1.weight"] = state[f"{ours}norm1.weight"]
        released[f"{theirs}layer_norm2.weight"] = state[f"{ours}norm2.weight"]
        for part in ("weight", "bias"):
            released[f"{theirs}self_attn.out_proj.{part}"] = state[f"{ours}attn.proj.{part}"]
            for layer in ("fc1", "fc2"):
                released[f"{theirs}mlp.{layer}.{part}"] = state[f"{ours}mlp.{layer}.{part}"]
    return released


@pytest.mark.parametrize("layout", ["hub", "file"])
def test_eva_clip_8b_opens_as_timms_eva(layout):
    tower = redraw(eva_8b())
    nn.init.zeros_(tower.head.bias)
    state = tower.state_dict()
    own = {f"visual.{name}": tensor for name, tensor in state.items() if name != "head.bias"}
    released = in_transformers_names(state) if layout == "hub" else {**own, "text.positional_embedding": torch.zeros(3)}
    fresh = eva_8b()
    load_by_shape(fresh, to_timm_keys(released, fresh, "release"), "release")
    same_and_not_by_chance(fresh, tower)


def test_eva_clip_8b_has_the_published_size():
    with torch.device("meta"):
        import dgmr_tp.encoders.timm_models  # noqa: F401

        tower = timm.create_model("eva_clip_8b_patch14_224", num_classes=0)
    assert sum(parameter.numel() for parameter in tower.parameters()) == pytest.approx(7520.85e6, abs=5e3)


def release_internvit(directory):
    """Write OpenGVLab's layout: its keys, its fused projection and its configuration."""
    in_transformers("InternVLVisionModel", "InternVLVisionConfig", **{**INTERN, "use_mean_pooling": True})(directory)
    ours = read_tensors(directory / "model.safetensors")
    names = {
        "encoder.layer.": "encoder.layers.",
        "cls_token": "class_embedding",
        "position_embeddings": "position_embedding",
        "patch_embeddings.projection": "patch_embedding",
        "lambda_": "ls",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.projection_layer": "attn.proj",
        "attention.": "attn.",
    }
    released = {}
    for name, tensor in ours.items():
        for mine, theirs in names.items():
            name = name.replace(mine, theirs)
        released[name] = tensor
    for block in range(2):
        prefix = f"encoder.layers.{block}.attn."
        for part in ("weight", "bias"):
            if f"{prefix}q_proj.{part}" in released:
                released[f"{prefix}qkv.{part}"] = torch.cat([released.pop(f"{prefix}{p}_proj.{part}") for p in "qkv"])
    (directory / "model.safetensors").unlink()
    save_file(released, directory / "model.safetensors")
    config = {
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "hidden_size": 48,
        "image_size": 32,
        "intermediate_size": 192,
        "model_type": "intern_vit_6b",
        "norm_type": "rms_norm",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "qk_normalization": True,
        "qkv_bias": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_intern_vit.py").write_text("raise SystemExit('remote code was run')")


def test_internvits_release_opens_as_transformers(tmp_path):
    in_transformers("InternVLVisionModel", "InternVLVisionConfig", **{**INTERN, "use_mean_pooling": True})(
        tmp_path / "ours"
    )
    release_internvit(tmp_path / "release")
    assert (tmp_path / "release" / "config.json").read_text() != (tmp_path / "ours" / "config.json").read_text()
    same_and_not_by_chance(open_model(str(tmp_path / "release")).module, open_model(str(tmp_path / "ours")).module)


def test_a_pickle_is_never_executed(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"weight": Harmful()}))
    with pytest.raises(DgmrError, match=r"evil\.pt"):
        open_model("timm:vit_tiny_patch16_224", str(tmp_path / "evil.pt"))
    torch.save({"weight": Harmful()}, tmp_path / "evil2.pt")
    with pytest.raises(DgmrError, match=r"evil2\.pt holds Python objects \(\w+\.mkdir\), which are never executed"):
        open_model("timm:vit_tiny_patch16_224", str(tmp_path / "evil2.pt"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {}, "is not a checkpoint"),
        (lambda state: {"step": 3}, "is not a checkpoint"),
        (
            lambda state: {name: t for name, t in state.items() if name != "visual.ln_post.bias"},
            r"has no tensor 'visual\.ln_post\.bias'",
        ),
        (
            lambda state: {**state, "visual.conv1.weight": torch.zeros(2)},
            r"'visual\.conv1\.weight' with shape \(2,\), and the model has \(48, 3, 8, 8\)",
        ),
        (lambda state: {**state, "visual.surplus": torch.zeros(2)}, r"holds a tensor 'visual\.surplus'"),
    ],
)
def test_a_file_that_does_not_fit_names_itself_and_the_first_key(tiny_clip, tmp_path, change, says):
    torch.save(change(tiny_clip.state_dict()), tmp_path / "wrong.pt")
    with pytest.raises(DgmrError, match=re.escape(str(tmp_path)) + rf".*{says}"):
        open_model("open_clip:tiny-clip", str(tmp_path / "wrong.pt"))


def test_a_truncated_file_is_one_sentence(tiny_clip, tmp_path):
    for name, save in (("cut.pt", torch.save), ("cut.safetensors", save_file)):
        save(tiny_clip.state_dict(), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DgmrError, match=rf"cannot read .*{name}.*damaged") as caught:
            open_model("open_clip:tiny-clip", str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_hub_names_open_from_the_cache_and_fail_in_one_sentence_without_it(tmp_path):
    """Uses a repository in the layout of the hub's cache. The hub itself is not contacted."""
    snapshot = tmp_path / "hub" / "models--org--clip" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    FAMILIES["open_clip"](snapshot)
    (snapshot / "sub").mkdir()
    torch.save(redraw(timm.create_model("vit_tiny_patch16_224")).state_dict(), snapshot / "sub" / "vit.pth")
    (tmp_path / "hub" / "models--org--clip" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--clip" / "refs" / "main").write_text("0123")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    folder = run_command("inspect", "hf-hub:org/clip", env=environment)
    assert folder.returncode == 0 and "transformer.resblocks.1.mlp" in folder.stdout, folder.stderr
    arguments = ("-m", "timm:vit_tiny_patch16_224", "--pretrained", "hf-hub:org/clip/sub/vit.pth", "--criterion", "l2")
    file = run_command("plan", *arguments, env=environment)
    assert file.returncode == 0 and "blocks.11.mlp" in file.stdout, file.stderr
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "missing-shard.safetensors"}})
    )
    index = run_command(
        "plan",
        "-m",
        "timm:vit_tiny_patch16_224",
        "--pretrained",
        "hf-hub:org/clip/model.safetensors.index.json",
        env=environment,
    )
    assert index.returncode == 2 and "cannot get hf-hub:org/clip" in index.stderr and index.stderr.count("\n") == 1
    nothing = run_command(
        "plan", "-m", "timm:vit_tiny_patch16_224", "--pretrained", "hf-hub:org/vit.pth", env=environment
    )
    assert nothing.returncode == 2 and "names no file" in nothing.stderr
    missing = run_command("inspect", "hf-hub:org/other", env=environment)
    assert (
        missing.returncode == 2 and missing.stderr.count("\n") == 1 and "cannot get hf-hub:org/other" in missing.stderr
    )


def test_open_clips_older_repositories_open(tiny_clip, tmp_path):
    """Weights in open_clip_pytorch_model.bin, with the extra tensors of older versions."""
    FAMILIES["open_clip"](tmp_path / "clip")
    state = read_tensors(tmp_path / "clip" / "open_clip_model.safetensors")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    torch.save(
        {**state, "logit_scale": state["logit_scale"].reshape(1), "context_length": torch.tensor(16)},
        tmp_path / "clip" / "open_clip_pytorch_model.bin",
    )
    opened = open_model(str(tmp_path / "clip"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.module.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": ["InternVisionModel"]}, {"architectures": ["CLIPVisionModel"], "model_type": "magic"}],
)
@pytest.mark.parametrize("weights", ["none", "disk", "memory"])
def test_a_config_that_describes_nothing_is_one_sentence(tmp_path, config, weights):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DgmrError, match=re.escape(str(tmp_path))) as caught:
        open_model(str(tmp_path / "model"), weights=weights)
    assert "\n" not in str(caught.value)


def test_a_cut_that_transformers_cannot_reopen_is_refused(tmp_path):
    FAMILIES["transformers CLIPModel"](tmp_path / "clip")
    model = open_model(str(tmp_path / "clip"))
    pruner = MLPPruner(model.module, keep=20)
    pruner.apply(pruner.plan())
    with pytest.raises(DgmrError, match=r"text_model.* is outside the vision tower"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_moving_average_is_preferred(tiny_clip, tmp_path, caplog):
    average = {name: tensor + 1 for name, tensor in tiny_clip.state_dict().items()}
    torch.save({"state_dict": tiny_clip.state_dict(), "state_dict_ema": average, "epoch": 3}, tmp_path / "both.pth")
    with caplog.at_level("INFO"):
        tensors = read_tensors(tmp_path / "both.pth")
    assert all(torch.equal(tensor, average[name]) for name, tensor in tensors.items())
    assert "took 'state_dict_ema', a moving average of the weights; left state_dict, epoch" in caplog.text


@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "teacher.backbone."])
def test_names_of_training_programs_open_in_every_format(tmp_path, save, prefix):
    tensors = {"blocks.0.mlp.fc1.weight": torch.ones(2), "norm.bias": torch.zeros(2)}
    save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / "file")
    assert {name: tensor.tolist() for name, tensor in read_tensors(tmp_path / "file").items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_a_name_that_only_resembles_a_wrapper_stays(tmp_path):
    names = {"encoder.layer.0.weight", "embeddings.weight", "module_list.weight"}
    save_file({name: torch.ones(1) for name in names}, tmp_path / "file.safetensors")
    assert read_tensors(tmp_path / "file.safetensors").keys() == names


def test_a_file_for_another_image_size_gets_its_positions_interpolated(tmp_path):
    config = {"embed_dim": 24, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 64}}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    for size in (64, 96):
        config["vision_cfg"] = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "image_size": size}
        (tmp_path / f"eva-{size}.json").write_text(json.dumps({**config, "text_cfg": text}))
    open_clip.add_model_config(tmp_path)
    module = redraw(open_clip.create_model("eva-64", force_image_size=224))
    save_file(module.state_dict(), tmp_path / "eva.safetensors")
    larger = open_model("open_clip:eva-64", str(tmp_path / "eva.safetensors"), image_size=280)
    expected = open_clip.create_model("eva-64", force_image_size=280)
    tower = timm.models.eva.checkpoint_filter_fn(module.visual.trunk.state_dict(), expected.visual.trunk)
    assert torch.equal(larger.tower.trunk.pos_embed, tower["pos_embed"])
    assert larger.tower.trunk.pos_embed.shape[1] == 1 + 20 * 20 and larger.tower(pictures(1, size=280)).isfinite().all()


def test_a_folder_of_that_name_does_not_hide_a_tag(tmp_path, monkeypatch):
    (tmp_path / "openai").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _tag_and_file("openai", ["openai", "laion400m_e32"]) == ("openai", None)
    assert _tag_and_file("laion400m-e32", ["openai", "laion400m_e32"]) == ("laion400m_e32", None)
    assert _tag_and_file("openai+tower.pt", ["openai"]) == ("openai", "tower.pt")
    assert _tag_and_file("openai", []) == (None, "openai")


def opens_without_network(name):
    config = open_clip.get_model_config(name)
    return config is not None and "hf_model_name" not in config["text_cfg"]


@pytest.mark.parametrize("name", filter(opens_without_network, dict(open_clip.list_pretrained())))
@pytest.mark.slow
def test_every_tag_gets_its_activation_function(name):
    for tag in open_clip.list_pretrained_tags_by_model(name):
        quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
        opened = open_model(f"open_clip:{name}", tag, weights="none")
        text = opened.module.text if hasattr(opened.module, "text") else opened.module.transformer
        activations = {type(layer).__name__ for layer in text.modules() if "GELU" in type(layer).__name__}
        if not hasattr(opened.tower, "trunk"):  # timm's trunks have GELU whatever the tag says
            activations |= {type(layer).__name__ for layer in opened.tower.modules() if "GELU" in type(layer).__name__}
        assert activations <= {"QuickGELU" if quick else "GELU"}, tag
        assert opened.config.get("quick_gelu", False) == quick


def test_openais_weights_get_quick_gelu_and_others_do_not():
    for tag, expected in (("openai", "QuickGELU"), ("laion2b_s34b_b79k", "GELU")):
        opened = open_model("open_clip:ViT-B-32", tag, weights="none")
        assert {type(block.mlp.gelu).__name__ for block in opened.tower.transformer.resblocks} == {expected}
        assert {type(block.mlp.gelu).__name__ for block in opened.module.transformer.resblocks} == {expected}


def test_weights_from_a_file_say_what_the_file_does_not(tmp_path, caplog):
    module = open_clip.create_model("ViT-S-32-alt")
    assert not open_clip.list_pretrained_tags_by_model("ViT-S-32-alt")
    save_file(module.state_dict(), tmp_path / "small.safetensors")
    open_model("open_clip:ViT-S-32-alt", str(tmp_path / "small.safetensors"))
    assert not [record for record in caplog.records if record.name.startswith("dgmr_tp")]
    _report_activation("ViT-B-32", {})
    assert "computes GELU" in caplog.text and "use open_clip:ViT-B-32-quickgelu" in caplog.text
