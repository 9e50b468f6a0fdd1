"""Encoders are opened, saved and reopened by this package and by their own libraries."""

import json
import shutil
import subprocess
import sys

import open_clip
import pytest
import timm
import torch
from compress import make_plan
from conftest import pictures, redraw
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dgmr_tp import DgmrError, MLPPruner, load_pruned, open_model, prune
from dgmr_tp.data.scenes import Scene
from dgmr_tp.encoders import OpenedModel, wrap_tower
from dgmr_tp.pruning import find_sites, recover
from dgmr_tp.pruning.cost import flops
from dgmr_tp.pruning.plan import weight_sha256

OPEN_CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 88,
        "layers": 3,
        "head_width": 22,
        "mlp_ratio": 4.3637,
        "ls_init_value": 0.1,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture
def open_clip_directory(tmp_path):
    directory = tmp_path / "clip"
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": PREPROCESS})
    )
    module = redraw(open_clip.create_model(f"local-dir:{directory}", load_weights=False))
    save_file(module.state_dict(), directory / "open_clip_model.safetensors")
    return directory


@pytest.fixture
def timm_directory(tmp_path):
    options = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 10}
    module = redraw(timm.create_model("vit_tiny_patch16_224", **options))
    timm.models.save_for_hf(module, tmp_path / "vit", safe_serialization=True)
    return tmp_path / "vit"


@pytest.fixture(params=["open_clip", "timm"])
def directory(request):
    return request.getfixturevalue(f"{request.param}_directory")


def embed(model: OpenedModel, count: int = 3) -> torch.Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.tower(pictures(count))


@pytest.mark.parametrize("amount", [{"mlp_ratio": 1}, {"keep": 37}, {"keep": {"*.0.*": 20, "*.1.*": 65, "*": 11}}])
def test_a_pruned_directory_opens_again_with_the_same_outputs(directory, tmp_path, amount):
    model, plan, _ = prune(open_model(str(directory)), **amount)
    model.save(tmp_path / "pruned", plan)
    again = load_pruned(tmp_path / "pruned")
    assert torch.equal(embed(again), embed(model))
    assert not torch.allclose(embed(again), embed(open_model(str(directory))), rtol=1e-2, atol=1e-2)
    assert {name: len(site.kept) for name, site in plan.sites.items()} == json.loads(
        (tmp_path / "pruned" / "dgmr_tp.json").read_text()
    )["hidden"]
    assert again.preprocess_config == model.preprocess_config
    assert not list(tmp_path.glob(".*partial"))


PLAIN = {
    "open_clip": "import open_clip; m = open_clip.create_model('local-dir:{path}').visual",
    "timm": "import timm; m = timm.create_model('local-dir:{path}', pretrained=True)",
}


def test_the_plain_library_opens_a_uniform_width_without_this_package(directory, tmp_path):
    model, plan, _ = prune(
        open_model(str(directory)), keep=240
    )  # int(88 · (240 / 88)) is 239, so that a larger ratio is needed
    model.save(tmp_path / "pruned", plan)
    torch.save((pictures(3), embed(model)), tmp_path / "expected.pt")
    program = f"""
import sys, torch
sys.modules["dgmr_tp"] = None
{PLAIN[model.library].format(path=tmp_path / "pruned")}
images, expected = torch.load("{tmp_path}/expected.pt")
with torch.no_grad():
    assert torch.allclose(m.eval()(images), expected, atol=1e-5), "outputs differ"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_text_tower_comes_along(open_clip_directory, tmp_path):
    model, plan, _ = prune(open_model(str(open_clip_directory)), mlp_ratio=1)
    model.save(tmp_path / "pruned", plan)
    original = open_model(str(open_clip_directory))
    tokens = original.tokenizer(["a red star", "a blue ring"])
    with torch.no_grad():
        assert torch.equal(
            load_pruned(tmp_path / "pruned").module.encode_text(tokens), original.module.encode_text(tokens)
        )


@pytest.mark.parametrize(
    ("keep", "opens"), [(29, True), ({"visual.*": 29, "*": 50}, True), ({"transformer.*.1.*": 17, "*": 50}, False)]
)
def test_both_towers_may_be_pruned(open_clip_directory, tmp_path, keep, opens):
    config = json.loads((open_clip_directory / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 2
    (open_clip_directory / "open_clip_config.json").write_text(json.dumps(config))
    module = redraw(open_clip.create_model(f"local-dir:{open_clip_directory}", load_weights=False))
    save_file(module.state_dict(), open_clip_directory / "open_clip_model.safetensors")
    model = open_model(str(open_clip_directory))
    pruner = MLPPruner(model.module, keep=keep)
    pruner.apply(pruner.plan())
    model.save(tmp_path / "pruned")
    tokens = model.tokenizer(["a red star", "a blue ring"])
    model.module.eval()
    with torch.no_grad():
        expected = model.module.encode_text(tokens)
        assert torch.equal(load_pruned(tmp_path / "pruned").module.eval().encode_text(tokens), expected)
        assert not torch.allclose(module.encode_text(tokens), expected, rtol=1e-3)
        assert ("alone does not open it" not in (tmp_path / "pruned" / "README.md").read_text()) == opens
        if opens:
            assert torch.allclose(
                open_clip.create_model(f"local-dir:{tmp_path / 'pruned'}").eval().encode_text(tokens),
                expected,
                atol=1e-6,
            )


def test_saving_over_something_is_refused(directory, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(DgmrError, match="exists already"):
        open_model(str(directory)).save(tmp_path / "there")


def weights_file(directory):
    return next(directory.glob("*.safetensors"))


def test_a_truncated_checkpoint_is_one_sentence_with_the_file(directory):
    path = weights_file(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DgmrError, match=rf"cannot read .*{path.name}.*damaged"):
        open_model(str(directory))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_that_does_not_fit_names_the_key(directory, change):
    path = weights_file(directory)
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("mlp.c_fc.bias") or name.endswith("mlp.fc1.bias"))
    key = {
        "missing": key,
        "extra": "surplus.weight",
        "shape": next(name for name in tensors if name.endswith("pos_embed") or "positional" in name),
    }[change]
    if change == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(3)
    save_file(tensors, path)
    with pytest.raises(DgmrError, match=key.replace(".", r"\.")):
        open_model(str(directory))


@pytest.mark.parametrize(
    ("source", "pretrained", "says"),
    [
        ("open_clip:ViT-B-23", "openai", "Did you mean.*ViT-B-32"),
        ("timm:vit_tiny_patch16_225", "none", "Did you mean.*vit_tiny_patch16_224"),
        ("open_clip:ViT-B-32", None, "--pretrained"),
        ("nowhere", None, "unknown model 'nowhere'"),
        ("demo", "openai", "holds its own weights"),
    ],
)
def test_unknown_models_are_refused_with_a_hint(source, pretrained, says):
    with pytest.raises(DgmrError, match=says):
        open_model(source, pretrained)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DgmrError, match="is not a model directory"):
        open_model(str(tmp_path))


def test_models_open_by_name():
    model = open_model("timm:vit_tiny_patch16_224", "none")
    assert model.image_size == (224, 224) and len(model.adapter.blocks()) == 12
    assert model.preprocess(__import__("PIL.Image").Image.new("RGB", (300, 200))).shape == (3, 224, 224)


def test_a_checkpoint_file_opens_under_a_name(tmp_path):
    module = redraw(timm.create_model("vit_tiny_patch16_224"))
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    images = pictures(1, size=224)
    for name in ("weights.safetensors", "weights.pth"):
        opened = open_model("timm:vit_tiny_patch16_224", str(tmp_path / name))
        assert torch.equal(opened.module.eval()(images), module(images))
    broken = tmp_path / "broken.pth"
    broken.write_bytes((tmp_path / "weights.pth").read_bytes()[:5000])
    with pytest.raises(DgmrError, match=r"broken\.pth"):
        open_model("timm:vit_tiny_patch16_224", str(broken))


def test_the_demo_clip_opens_in_plain_open_clip(tmp_path):
    from dgmr_tp.encoders.model import DEMO

    shutil.copytree(DEMO, tmp_path / "demo")
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'demo'}").eval()
    with torch.no_grad():
        assert torch.equal(plain.encode_image(pictures(2, size=64)), embed_64(open_model("demo")))
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 16e6
    vision = json.loads((DEMO / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    assert vision["mlp_ratio"] >= 4


def embed_64(model):
    model.module.eval()
    with torch.no_grad():
        return model.module.encode_image(pictures(2, size=64))


def test_planning_is_what_pruning_does(directory):
    opened = open_model(str(directory))
    assert make_plan(opened, mlp_ratio=1) == prune(opened, mlp_ratio=1).plan
    assert make_plan(opened, "random", mlp_ratio=1, seed=1) == make_plan(opened, "random", mlp_ratio=1, seed=1)
    assert make_plan(opened, "random", mlp_ratio=1, seed=1) != make_plan(opened, "random", mlp_ratio=1, seed=2)
    with pytest.raises(DgmrError, match="unknown criterion"):
        make_plan(opened, "magic")


def hugging_face_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "star": 4, "blue": 5, "ring": 6}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)


def test_a_hugging_face_tokenizer_comes_along(open_clip_directory, tmp_path):
    """As for SigLIP, open_clip looks for the tokenizer in the directory, whatever name the config gives."""
    config = json.loads((open_clip_directory / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "somewhere/on-the-hub"
    (open_clip_directory / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DgmrError, match="cannot load its tokenizer"):
        open_model(str(open_clip_directory))
    hugging_face_tokenizer(open_clip_directory)
    original = open_model(str(open_clip_directory))
    original.source = None  # a model opened by name has no directory to copy from
    model, plan, _ = prune(original, keep=29)
    model.save(tmp_path / "pruned", plan)
    again = load_pruned(tmp_path / "pruned")
    assert torch.equal(again.tokenizer(["a red star", "blue"]), original.tokenizer(["a red star", "blue"]))
    assert not torch.equal(again.tokenizer(["a red star"]), again.tokenizer(["a blue ring"]))


def test_classes_of_its_own_survive(tmp_path):
    """A fine-tuned checkpoint has another number of classes than the architecture's 1,000."""
    module = redraw(timm.create_model("vit_tiny_patch16_224", num_classes=7))
    torch.save(module.state_dict(), tmp_path / "mine.pth")
    opened = open_model("timm:vit_tiny_patch16_224", str(tmp_path / "mine.pth"))
    opened.save(tmp_path / "saved")
    plain = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    images = pictures(1, size=224)
    assert plain(images).shape == (1, 7) and torch.equal(plain(images), module(images))


@pytest.mark.parametrize(
    "name", ["timm:vit_small_patch16_dinov3", "open_clip:ViT-S-32-alt", "timm:vit_tiny_patch16_224"]
)
def test_an_image_size_of_its_own_survives(tmp_path, name):
    opened = open_model(name, "none", image_size=64)
    assert opened.image_size == (64, 64)
    images = pictures(2, size=64)
    with torch.no_grad():
        expected = opened.tower.eval()(images)
    opened.save(tmp_path / "saved")
    again = load_pruned(tmp_path / "saved")
    assert again.image_size == (64, 64)
    assert again.preprocess(__import__("PIL.Image").Image.new("RGB", (300, 200))).shape == (3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.tower.eval()(images), expected)


def test_shapes_alone_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    program = (
        "import dgmr_tp\n"
        "model = dgmr_tp.open_model('open_clip:ViT-B-16-SigLIP', 'webli', weights='none')\n"
        "print(len(model.adapter.blocks()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "12", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "tag"), [("timm:vit_tiny_patch16_224", "augreg_in21k_ft_in1k"), ("open_clip:ViT-B-32", "openai")]
)
def test_unknown_tags_are_refused_without_a_download(source, tag):
    assert open_model(source, tag, weights="none").tower is not None
    with pytest.raises(DgmrError, match=f"has no weights 'nonsense'. Its tags are: .*{tag}"):
        open_model(source, "nonsense", weights="none")


def test_an_opened_model_finds_its_sites_once(timm_directory, monkeypatch):
    models = []

    def count(model):
        models.append(model)
        return find_sites(model)

    monkeypatch.setattr("dgmr_tp.pruning.adapter.find_sites", count)
    opened = open_model(str(timm_directory))
    assert opened.has_adapter and opened.sites is opened.sites == opened.adapter.sites
    assert opened.weight_hashes is opened.weight_hashes
    assert opened.weight_hashes == {site.name: weight_sha256(opened.tower, site) for site in opened.sites}
    plan = MLPPruner(opened.tower, sites=opened.sites, weight_hashes=opened.weight_hashes, keep=20).plan()
    pruned = opened.copy()
    MLPPruner(pruned.tower, sites=opened.sites, weight_hashes=opened.weight_hashes).apply(plan)
    recover(opened.adapter, pruned.adapter, [pictures(20)])
    assert models == [opened.tower]
    assert [site.hidden for site in pruned.sites] == [20] * 3  # a copy has no caches of the original
    assert pruned.weight_hashes != opened.weight_hashes
    assert models == [opened.tower, pruned.tower]


def test_a_bare_tower_is_an_opened_model_without_preprocessing(tmp_path):
    tower = redraw(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2))
    opened = wrap_tower(tower)
    assert opened.tower is tower and opened.name == "VisionTransformer" and opened.image_size is None
    assert opened.has_adapter and len(opened.sites) == 2 and opened.copy().tower is not tower
    with pytest.raises(DgmrError, match=r"needs the encoder's preprocessing.*open_model, or pass preprocessed batches"):
        opened.preprocess(None)
    with pytest.raises(DgmrError, match=r"a bare tower belongs to no library.*\. Save its state_dict"):
        opened.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    unknown = wrap_tower(nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))))
    assert not unknown.has_adapter and [site.hidden for site in unknown.sites] == [32]


def test_one_prune_finds_the_sites_and_hashes_each_weight_once(monkeypatch):
    calls = {"find_sites": 0, "weight_sha256": 0}

    def counting(function):
        def count(*arguments):
            calls[function.__name__] += 1
            return function(*arguments)

        return count

    for function in (find_sites, weight_sha256):
        for module in [module for name, module in sys.modules.items() if name.startswith("dgmr_tp.")]:
            if getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, counting(function))
    model = open_model("demo")
    calls.update(dict.fromkeys(calls, 0))
    table = prune(model, [pictures(16, size=model.image_size[0])], mlp_ratio=1).table
    assert calls == {"find_sites": 1, "weight_sha256": len(table)}


def test_a_tower_of_one_channel_sees_gray_images(tmp_path):
    module = redraw(timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=64, depth=2, num_classes=3))
    timm.models.save_for_hf(module, tmp_path / "gray", safe_serialization=True)
    model = open_model(str(tmp_path / "gray"))
    color = Image.fromarray(Scene.draw(0, 0).image())
    assert model.preprocess(color).shape == (1, 64, 64)
    assert torch.equal(model.preprocess(color), model.preprocess(color.convert("L").convert("RGB")))
    assert flops(model.tower, model.image_size) > 0
    pruned, _, _ = prune(model, [pictures(16, size=64)[:, :1]], keep=8)
    assert pruned.tower(pictures(2, size=64)[:, :1]).shape == (2, 3)
