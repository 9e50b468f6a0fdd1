"""Every family of encoders is pruned, verified, recovered, saved, reopened, opened by its own library, and exported.

``make test`` runs one model of each form of MLP, ``make test-all`` runs all.
"""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from compress import make_plan
from conftest import pictures
from families import FAMILIES, FORMS, plain_embedding, plain_output
from torch import nn

from dgmr_tp import DgmrError, MLPPruner, load_pruned, open_model, prune
from dgmr_tp.encoders import adapt
from dgmr_tp.export.bundle import export_bundle, failures
from dgmr_tp.export.formats import open_exported
from dgmr_tp.export.towers import vision_export_tower
from dgmr_tp.pruning import ImageEncoder, find_sites, last_state
from dgmr_tp.pruning.plan import Plan, SitePlan

IMAGES = pictures(3)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Function from a family's name to its directory, written once. Zeroing any MLP changes the output by 1 %."""
    root = tmp_path_factory.mktemp("families")
    done = {}

    def write(name):
        if name not in done:
            FAMILIES[name](root / name.replace(" ", "_"))
            done[name] = root / name.replace(" ", "_")
            model = open_model(str(done[name]))
            before = plain_output(model.tower.eval(), IMAGES)
            for site in block_sites(model):
                assert moved(before, plain_output(without(model.tower, site), IMAGES)) > 0.01, (
                    f"zeroing {site.name} hardly changes the output"
                )
        return done[name]

    return write


@pytest.fixture(params=[name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def directory(request, written):
    return written(request.param)


@pytest.fixture
def model(directory):
    opened = open_model(str(directory))
    opened.module.eval()
    return opened


def block_sites(model):
    inside = tuple(f"{block.name}." for block in model.adapter.blocks())
    return [site for site in find_sites(model.tower) if site.name.startswith(inside)]


def without(tower, site):
    tower = copy.deepcopy(tower)
    nn.init.zeros_(tower.get_submodule(site.consumer).weight)
    return tower


def moved(a, b):
    return float((a - b).norm() / a.norm())


def uneven(sites):
    """Return a different keep count for every site."""
    return {site.name: site.hidden // 2 - 3 * i for i, site in enumerate(sites)}


def swapped(plan):
    """Return the plan with one kept neuron of its first site replaced by a pruned one."""
    name, site = next(iter(plan.sites.items()))
    dropped = min(set(range(site.hidden)) - set(site.kept))
    kept = tuple(sorted({*site.kept[1:], dropped}))
    return Plan(
        plan.encoder, plan.criterion, {**plan.sites, name: SitePlan(site.width, site.hidden, kept, site.sha256)}
    )


def test_the_walk_is_the_towers_own_forward(model):
    expected = plain_embedding(model, IMAGES)
    with torch.no_grad():
        state = last_state(model.adapter, IMAGES)
        assert torch.allclose(ImageEncoder(model.adapter)(IMAGES), expected, atol=1e-6)
        assert moved(expected, model.adapter.embed(state.flip(-1))) > 0.01
        class_token, patches = model.adapter.features(state)
    assert (
        patches.ndim == 3
        and patches.shape[0] == 3
        and (class_token is None or class_token.shape == patches[:, 0].shape)
    )


@pytest.mark.parametrize(
    "name", ["transformers CLIPVisionModel", "transformers SigLIP", "transformers InternViT", "timm ViT"]
)
def test_a_subclass_of_a_known_tower_uses_its_parents_adapter(written, name):
    tower = open_model(str(written(name))).tower.eval()
    adapter = adapt(tower)
    tower.__class__ = type("Mine", (type(tower),), {})
    subclass_adapter = adapt(tower)
    assert type(subclass_adapter) is type(adapter) and subclass_adapter.gives_tokens == adapter.gives_tokens
    with torch.no_grad():
        assert torch.equal(ImageEncoder(subclass_adapter)(IMAGES), ImageEncoder(adapter)(IMAGES))


def masked(tower, sites, plan):
    """Return an independent reference: the dense tower with zero columns for the pruned neurons."""
    tower = copy.deepcopy(tower)
    for site in sites:
        dropped = sorted(set(range(site.hidden)) - set(plan.sites[site.name].kept))
        tower.get_submodule(site.consumer).weight.data[:, dropped] = 0
    return tower


class NormedSwiGLU(nn.Module):
    """Reference for a gate with a norm: the norm is taken over the kept neurons, with their scale and shift."""

    def __init__(self, mlp, site, kept):
        super().__init__()
        self.mlp, self.kept = mlp, list(kept)
        self.gate, self.value = (mlp.get_submodule(path.removeprefix(f"{site.name}.")) for path in site.producers)

    def forward(self, x):
        x = x.double()
        rows = [layer.weight.double()[self.kept] @ x.transpose(-1, -2) for layer in (self.gate, self.value)]
        gate, value = (
            row.transpose(-1, -2) + (0 if layer.bias is None else layer.bias.double()[self.kept])
            for row, layer in zip(rows, (self.gate, self.value), strict=True)
        )
        hidden = gate * torch.sigmoid(gate) * value
        hidden = (hidden - hidden.mean(-1, keepdim=True)) / (
            hidden.var(-1, unbiased=False, keepdim=True) + self.mlp.norm.eps
        ).sqrt()
        hidden = hidden * self.mlp.norm.weight.double()[self.kept] + self.mlp.norm.bias.double()[self.kept]
        return (hidden @ self.mlp.fc2.weight.double()[:, self.kept].T + self.mlp.fc2.bias.double()).float()


def reference(tower, sites, plan):
    if all(site.exact for site in sites):
        return masked(tower, sites, plan)
    tower = copy.deepcopy(tower)
    for site in sites:
        parent, _, child = site.name.rpartition(".")
        setattr(
            tower.get_submodule(parent),
            child,
            NormedSwiGLU(tower.get_submodule(site.name), site, plan.sites[site.name].kept),
        )
    return tower


@pytest.mark.parametrize("criterion", ["dgmr", "l2"])
def test_the_pruned_tower_computes_what_the_kept_neurons_compute(model, criterion):
    sites, dense = block_sites(model), model.tower
    pruned, plan, _ = prune(model, criterion=criterion, keep=uneven(sites))
    tower = pruned.tower
    assert {site.name: site.hidden for site in block_sites(pruned)} == uneven(sites)
    expected = plain_output(reference(dense, sites, plan), IMAGES)
    got = plain_output(tower, IMAGES)
    assert moved(expected, got) < 1e-5
    assert moved(plain_output(dense, IMAGES), got) > 1e-3
    wrong, _, _ = prune(model, plan=swapped(plan))
    assert moved(expected, plain_output(wrong.tower, IMAGES)) > 1e-5 * 10
    assert [p.requires_grad for p in tower.parameters()] == [p.requires_grad for p in dense.parameters()]


def test_a_frozen_bf16_tower_is_pruned_like_any(model):
    model.module.bfloat16().requires_grad_(False)
    pruned, _, _ = prune(model, keep=uneven(block_sites(model)))
    assert not any(parameter.requires_grad for parameter in pruned.module.parameters())
    assert {parameter.dtype for parameter in pruned.tower.parameters()} == {torch.bfloat16}
    assert torch.isfinite(plain_output(pruned.tower, IMAGES.bfloat16())).all()


def test_recovery_lowers_every_sites_error_and_the_towers(model):
    new = pictures(30, seed=9)
    dense = plain_output(model.tower, new)
    keep = {site.name: site.hidden // 4 for site in block_sites(model)}
    cut, _, _ = prune(model, keep=keep)
    recovered, _, table = prune(model, pictures(200).split(50), keep=keep)
    assert [row.site for row in table] == [site.name for site in block_sites(model)]
    assert all(row.recovered_error < row.cut_error or row.fit_rejected for row in table)
    assert moved(dense, plain_output(recovered.tower, new)) < 0.9 * moved(dense, plain_output(cut.tower, new))


def test_tuning_lowers_the_blocks_errors_on_held_out_images(model):
    new, keep = pictures(30, seed=9), {site.name: site.hidden // 4 for site in block_sites(model)}
    dense, cut = plain_output(model.tower, new), prune(model, keep=keep).model
    refitted, tuned = (prune(model, pictures(200).split(50), keep=keep, tune_steps=steps) for steps in (0, 60))
    assert all(row.tuned_error <= row.block_error for row in tuned.table)
    assert any(row.tuned_error < row.block_error for row in tuned.table)
    assert all(row.tuned_error is None for row in refitted.table)
    assert moved(dense, plain_output(tuned.model.tower, new)) < 0.9 * moved(dense, plain_output(cut.tower, new))
    assert not torch.equal(plain_output(tuned.model.tower, new), plain_output(refitted.model.tower, new))


def test_a_saved_directory_opens_with_the_same_outputs(model, directory, tmp_path):
    pruned, plan, _ = prune(model, keep=uneven(block_sites(model)))
    pruned.save(tmp_path / "pruned", plan)
    (tmp_path / "pruned").rename(tmp_path / "moved")
    again = load_pruned(tmp_path / "moved")
    assert torch.equal(plain_output(again.tower.eval(), IMAGES), plain_output(pruned.tower, IMAGES))
    assert again.module.state_dict().keys() == model.module.state_dict().keys()
    assert again.preprocess_config == model.preprocess_config
    assert "alone does not open it" in (tmp_path / "moved" / "README.md").read_text()
    assert not torch.equal(plain_output(again.tower, IMAGES), plain_output(model.tower, IMAGES))
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "moved").rglob("*"))


def sayable(model, name):
    """Return keep counts that the family's own config can express."""
    hidden = {site.width: site.hidden for site in block_sites(model)}
    if "transformers DINOv2 SwiGLU" in name:
        return {"*": 64}  # mlp_ratio 2: two thirds of 96, rounded up to a multiple of 8
    if "transformers DINOv2" in name:
        return {"*": 96}
    if "Swin" in name or "DINOv3 SwiGLU" in name:
        return {site.name: site.width for site in block_sites(model)}
    return {"*": min(hidden.values()) // 2 + 1}


OUTPUT = """
images, expected = torch.load("{root}/expected.pt")
tower = model.get_submodule("{tower}").eval()
with torch.no_grad():
    out = tower(images)
out = out[0] if isinstance(out, tuple) else out
if not isinstance(out, torch.Tensor):
    out = out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output
assert torch.allclose(out, expected, atol=1e-5), "outputs differ"
assert not torch.allclose(out, expected.flip(0), atol=1e-5), "the comparison is too weak"
"""


def test_the_plain_library_opens_what_its_config_can_say(model, directory, tmp_path, request):
    name = request.node.callspec.params["directory"]
    pruned, plan, _ = prune(model, keep=sayable(model, name))
    pruned.save(tmp_path / "pruned", plan)
    readme = (tmp_path / "pruned" / "README.md").read_text()
    if any(site.name not in plan.sites for site in find_sites(model.tower)):
        # The library applies the blocks' ratio to the head's MLP, which was not pruned.
        assert "alone does not open it" in readme
        return
    [line] = [line for line in readme.splitlines() if line.startswith("model = ") and "dgmr" not in line]
    torch.save((IMAGES, plain_output(pruned.tower, IMAGES)), tmp_path / "expected.pt")
    library = model.library
    program = f"import sys, torch\nsys.modules['dgmr_tp'] = None\nimport {library}\n{line}\n"
    program += OUTPUT.format(root=tmp_path, tower=model.tower_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_exported_files_compute_the_same(model, tmp_path):
    pruned, _, _ = prune(model, keep=uneven(block_sites(model)))
    part = vision_export_tower(pruned.adapter, IMAGES, outputs=("embedding", "patches"))
    report = export_bundle(
        [part], tmp_path, model="", preprocess={}, formats=["onnx", "onnx-fp16", "torchscript"], latency_batches=()
    )
    assert not failures(report)
    for file in ("model.onnx", "model.pt"):
        run = open_exported(tmp_path / file, trusted=True)
        for batch in (1, 4):
            images = pictures(batch, seed=batch)
            expected = plain_embedding(pruned, images)
            assert moved(expected, run(images)) < 1e-4
            assert moved(expected, run(images + 0.1)) > 1e-4


def test_a_moved_directory_with_a_timm_trunk_is_relocated(written, tmp_path):
    from dgmr_tp.encoders.open_clip_models import relocate

    model = open_model(str(written("open_clip EVA02-L")))
    pruned, plan, _ = prune(model, keep=40)
    pruned.save(tmp_path / "before", plan)
    (tmp_path / "before").rename(tmp_path / "after")
    path = tmp_path / "after" / "open_clip_config.json"
    assert "/before/" in path.read_text()
    assert relocate(tmp_path / "after")
    assert (
        json.loads(path.read_text())["model_cfg"]["vision_cfg"]["timm_model_name"]
        == f"local-dir:{tmp_path}/after/trunk"
    )


def test_an_encoder_whose_mlp_shares_its_projection_with_attention_is_refused_with_the_reason():
    import timm

    parallel = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )
    with pytest.raises(DgmrError, match=r"share one projection"):
        MLPPruner(parallel, keep=8)
    with pytest.raises(DgmrError, match=r"share"):
        make_plan(parallel, keep=8)


def test_hidden_widths_survive_any_ratio():
    """int(width · ratio) equals the hidden width for every width, including 240 of 88."""
    from dgmr_tp.encoders.widths import ratio_for
    from dgmr_tp.pruning import Site

    rng = np.random.default_rng(0)
    for width in (88, 192, 1408, 1536):
        for hidden in {240, *map(int, rng.integers(1, 6 * width, 200))}:
            assert int(width * ratio_for([Site("mlp", ("a",), "b", width, hidden, False, True)])) == hidden
    sites = [Site("mlp", ("a",), "b", width, width, False, True) for width in (96, 192, 384)]
    assert [int(site.width * ratio_for(sites)) for site in sites] == [96, 192, 384]
    assert ratio_for([*sites, Site("mlp", ("a",), "b", 96, 97, False, True)]) is None
