"""The MLP pruner on open_clip's and timm's ViT: pruning is exact, and nothing else changes."""

import copy
import json
import re

import pytest
import timm
import torch
import torch_pruning as tp
from compress import make_plan
from conftest import pictures, redraw, timm_tower
from torch import nn
from torch.nn.utils import parametrizations

from dgmr_tp import DGMRImportance, MLPPruner, open_model, prune
from dgmr_tp.encoders import adapt
from dgmr_tp.encoders.model import wrap_tower
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Plan, find_sites, last_state, recover
from dgmr_tp.pruning.plan import weight_sha256
from dgmr_tp.pruning.selection import select_diverse_rows
from dgmr_tp.pruning.sites import sites_inside


def masked(model, plan):
    """Return the reference: the dense model with zero columns for pruned neurons in each second Linear."""
    model = copy.deepcopy(model)
    for site in find_sites(model):
        drop = sorted(set(range(site.hidden)) - set(plan.sites[site.name].kept))
        with torch.no_grad():
            model.get_submodule(site.consumer).weight[:, drop] = 0
    return model


def test_sites_are_the_mlps(tower):
    sites = find_sites(tower)
    assert len(sites) == 3
    for site in sites:
        assert site.name.endswith(".mlp") and site.hidden == 192 and site.width == 48 and site.exact
        assert len(site.producers) == 1


@pytest.mark.parametrize(
    "importance", [DGMRImportance(), tp.importance.MagnitudeImportance(p=2), tp.importance.RandomImportance()]
)
def test_pruned_equals_masked_original(tower, importance):
    pruned = copy.deepcopy(tower)
    pruner = MLPPruner(pruned, importance, mlp_ratio=1)
    plan = pruner.plan()
    pruner.apply(plan)
    images = pictures(3)
    reference = masked(tower, plan)(images)
    assert torch.allclose(pruned(images), reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(pruned(images), tower(images), rtol=1e-2, atol=1e-2)
    name, site = next(iter(plan.sites.items()))
    other = next(i for i in range(site.hidden) if i not in site.kept)
    swapped = Plan(
        plan.encoder,
        plan.criterion,
        {**plan.sites, name: type(site)(site.width, site.hidden, (*site.kept[1:], other), site.sha256)},
    )
    assert not torch.allclose(pruned(images), masked(tower, swapped)(images), rtol=1e-4, atol=1e-5)


def test_dgmr_keeps_the_greedy_choice(tower):
    plan = MLPPruner(tower, keep=31).plan()
    for site in find_sites(tower):
        weight = tower.get_submodule(site.producers[0]).weight.detach().numpy()
        assert plan.sites[site.name].kept == tuple(sorted(select_diverse_rows(weight).order[:31].tolist()))


def test_only_the_mlps_change_and_flags_come_back(tower):
    tower.train()
    tower.requires_grad_(False)
    first = next(iter(find_sites(tower)))
    tower.get_submodule(first.producers[0]).weight.requires_grad_(True)
    flags = {name: parameter.requires_grad for name, parameter in tower.named_parameters()}
    modes = {name: module.training for name, module in tower.named_modules()}
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    pruner = MLPPruner(tower, keep_ratio=0.25)
    pruner.apply(pruner.plan())
    assert {name: parameter.requires_grad for name, parameter in tower.named_parameters()} == flags
    assert {name: module.training for name, module in tower.named_modules()} == modes
    for name, tensor in tower.state_dict().items():
        inside_mlp = ".mlp." in name and not name.endswith(("c_proj.bias", "fc2.bias"))
        assert (tensor.shape != before[name].shape) == inside_mlp, name
        assert inside_mlp or torch.equal(tensor, before[name]), name


def test_planning_changes_nothing(tower):
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    MLPPruner(tower, mlp_ratio=1).plan()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


def test_bf16_weights_stay_bf16(tower):
    tower.bfloat16()
    pruner = MLPPruner(tower, mlp_ratio=0.5)
    pruner.apply(pruner.plan())
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tower(pictures(2).bfloat16())).all()


def test_meta_model_of_full_size():
    with torch.device("meta"):
        model = timm_tower(embed_dim=1408, num_heads=16, mlp_ratio=4.3637, layers=2)
    pruner = MLPPruner(model, tp.importance.RandomImportance(), mlp_ratio=1)
    assert {site.hidden for site in pruner.sites} == {6144}
    pruner.apply(pruner.plan())
    assert {block.mlp.fc1.out_features for block in model.blocks} == {1408}


def test_walk_computes_what_the_model_computes(tower):
    adapter, images = adapt(tower), pictures(2)
    with torch.no_grad():
        assert torch.allclose(adapter.embed(last_state(adapter, images)), tower(images), atol=1e-6)
        class_token, patches = adapter.features(last_state(adapter, images))
    assert class_token.shape == (2, 48) and patches.shape == (2, 16, 48)


@pytest.mark.parametrize(
    ("width", "options", "kept"),
    [(100, {"mlp_ratio": 0.29}, 29), (48, {"keep_ratio": 1 / 3}, 63), (48, {"keep": 7}, 7)],
)
def test_keep_counts_are_exact(width, options, kept):
    model = timm_tower(layers=1, embed_dim=width, num_heads=4 if width == 100 else 3)
    assert MLPPruner(model, **options).keep == {"blocks.0.mlp": kept}


def test_keep_counts_by_pattern():
    model = timm_tower()
    assert list(MLPPruner(model, keep={"blocks.0.*": 8, "blocks.2.mlp": 16}).keep.values()) == [8, 192, 16]


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(DgmrError, match=r"no site matches 'layers\.\*'\. The sites are blocks\.0\.mlp"):
        make_plan(timm_tower(), keep={"blocks.0.*": 3, "layers.*": 5})


def test_batches_that_are_none_are_refused():
    tower = redraw(timm_tower())
    with pytest.raises(DgmrError, match=r"this is a list\. Leave out labels"):
        prune(tower, [[pictures(4), torch.zeros(4)]], keep=8)
    with pytest.raises(DgmrError, match=r"shape \[3, 32, 32\]\. .* put a single batch into a list"):
        prune(tower, pictures(20), keep=8)


@pytest.mark.parametrize("inference", [False, True])
def test_looking_for_sites_leaves_no_hook_behind(inference):
    """Attention with separate Linears fails in torch-pruning, which does not remove its hooks from them."""
    tower = redraw(
        timm.models.Eva(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, qkv_fused=False, num_classes=10)
    )
    mine = tower.blocks[0].attn.q_proj.register_forward_hook(lambda *_: None)
    with torch.inference_mode(inference):
        assert len(find_sites(tower)) == 2
    assert [len(module._forward_hooks) for module in tower.modules() if module._forward_hooks] == [1]
    mine.remove()
    assert not any(module._forward_hooks for module in tower.modules())


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"keep": 193}, {"mlp_ratio": 4.1}, {"keep_ratio": 0.001}, {}, {"keep": 8, "mlp_ratio": 1}]
)
def test_impossible_keep_counts_are_refused(options):
    with pytest.raises(DgmrError, match=r"keep|exactly one|how many"):
        MLPPruner(timm_tower(), **options).plan()


def test_plan_survives_json_and_prints(tower):
    plan = MLPPruner(tower, mlp_ratio=1).plan()
    assert Plan.from_json(plan.to_json()) == plan
    assert "192" in str(plan) and "48" in str(plan)
    json.loads(plan.to_json())


def edited(plan, **changes):
    data = json.loads(plan.to_json())
    site = next(iter(data["sites"].values()))
    site.update(changes)
    return Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kept": [0, 0, 1]}, "duplicate"),
        ({"kept": []}, "none"),
        ({"kept": [5, 3]}, "ascending"),
        ({"kept": [0, 192]}, "192"),
        ({"kept": [-1, 2]}, "-1"),
        ({"kept": [0.0, 1.0]}, "not all integers"),
        ({"kept": ["0", "1"]}, "not all integers"),
        ({"hidden": 100}, "100"),
        ({"sha256": "0"}, "another checkpoint"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_changes(tower, changes, says):
    pruner = MLPPruner(tower, mlp_ratio=1)
    plan = edited(pruner.plan(), **changes)
    before = copy.deepcopy(tower.state_dict())
    with pytest.raises(DgmrError, match=says):
        pruner.apply(plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


def test_a_plan_for_other_weights_is_refused(tower):
    plan = MLPPruner(tower, mlp_ratio=1).plan()
    other = redraw(copy.deepcopy(tower), seed=1)
    with pytest.raises(DgmrError, match="another checkpoint"):
        MLPPruner(other, mlp_ratio=1).apply(plan)


def test_a_model_without_mlps_is_refused():
    with pytest.raises(DgmrError, match="no MLP found"):
        MLPPruner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), mlp_ratio=1)


def test_an_importance_that_gives_nonsense_is_refused(tower):
    class Wrong(tp.importance.Importance):
        def __call__(self, group):
            return torch.full((192,), torch.nan)

    with pytest.raises(DgmrError, match="Wrong"):
        MLPPruner(tower, Wrong(), mlp_ratio=1).plan()


def test_weight_hashes_of_the_caller_are_used_and_checked(tower, monkeypatch):
    sites = find_sites(tower)
    hashes = {site.name: weight_sha256(tower, site) for site in sites}
    plan = MLPPruner(tower, mlp_ratio=1).plan()
    calls = []
    monkeypatch.setattr("dgmr_tp.pruning.plan.weight_sha256", lambda *_: calls.append(1))
    monkeypatch.setattr("dgmr_tp.pruning.pruner.weight_sha256", lambda *_: calls.append(1))
    pruner = MLPPruner(copy.deepcopy(tower), sites=sites, weight_hashes=hashes, mlp_ratio=1)
    assert pruner.plan() == plan
    pruner.apply(plan)
    assert not calls
    other = {**hashes, sites[1].name: "0"}
    with pytest.raises(DgmrError, match="another checkpoint"):
        MLPPruner(copy.deepcopy(tower), sites=sites, weight_hashes=other).apply(plan)
    monkeypatch.undo()
    with pytest.raises(DgmrError, match="another checkpoint"):
        pruner.apply(plan)  # the hashes of pruned sites are no longer valid


def test_sites_inside_a_module_have_relative_paths(tower):
    sites = find_sites(tower)
    name = sites[1].name
    [inside] = sites_inside(sites, name)
    assert inside.name == "" and inside == find_sites(tower.get_submodule(name))[0]
    block = name.removesuffix(".mlp")
    assert sites_inside(sites, block) == find_sites(tower.get_submodule(block))
    assert sites_inside(sites, "") == sites


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize(
    "parametrize",
    [parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.orthogonal],
)
def test_parametrized_mlps_are_refused(parametrize, layer):
    tower = redraw(timm_tower())
    parametrize(tower.blocks[1].mlp.get_submodule(layer))
    with pytest.raises(DgmrError, match=rf"the weight of blocks.1.mlp.{layer} is computed from other tensors .*Remove"):
        prune(tower, mlp_ratio=1)


def test_a_model_without_weights_is_refused():
    plan = MLPPruner(timm_tower(), mlp_ratio=1).plan()
    empty, demo = timm_tower().to("meta"), open_model("demo", weights="none")
    for call in (
        lambda: MLPPruner(empty, mlp_ratio=1).plan(),
        lambda: MLPPruner(empty, tp.importance.MagnitudeImportance(p=2), mlp_ratio=1).plan(),
        lambda: MLPPruner(empty).apply(plan),
        lambda: prune(empty, mlp_ratio=1),
        lambda: prune(empty, [pictures(20)], mlp_ratio=1),
        lambda: prune(demo, mlp_ratio=1),
        lambda: recover(adapt(empty), adapt(empty), [pictures(20)]),
    ):
        with pytest.raises(DgmrError, match=r"is on the meta device and has no values. Open the model with weights"):
            call()


@pytest.mark.parametrize("criterion", ["output", "l2", "amp"])
@pytest.mark.parametrize("shape", [(3, 40, 40), (3, 32, 40), (1, 32, 32)])
def test_images_that_the_tower_does_not_take_are_refused(tower, criterion, shape):
    images = [torch.randn(20, *shape)]
    with pytest.raises(DgmrError, match=rf"does not take images of shape {re.escape(str(list(shape)))}: .*[^.]\. Give"):
        prune(tower, images, criterion=criterion, mlp_ratio=1)
    with pytest.raises(DgmrError, match="does not take images of shape"):
        recover(adapt(tower), adapt(tower), images)


def test_images_of_two_sizes_are_refused():
    """This tower takes both sizes, and the token weights of one would be wrong for the other."""
    with pytest.raises(DgmrError, match=r"shapes \(3, 32, 32\) and \(3, 40, 40\). Give images of one shape"):
        prune(redraw(timm_tower(dynamic_img_size=True)), [pictures(20), pictures(20, size=40)], mlp_ratio=1)


def test_a_tower_without_mlps_is_not_sent_to_the_pruner():
    resnet, mixer = timm.create_model("resnet18"), timm.create_model("mixer_s32_224")
    with pytest.raises(DgmrError, match=r"recovered or distilled, and it has no MLP that can be pruned. Use one of"):
        adapt(resnet)
    with pytest.raises(DgmrError, match=r"recovered or distilled. Prune it with MLPPruner, or use one of"):
        adapt(mixer)
    assert not wrap_tower(resnet).has_adapter and not wrap_tower(mixer).has_adapter


def test_tied_weights_are_refused_and_a_shared_mlp_is_not():
    tower = redraw(timm_tower())
    tower.blocks[1].mlp.fc1.weight = tower.blocks[0].mlp.fc1.weight
    with pytest.raises(DgmrError, match=r"blocks\.0\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc1\.weight are one tensor"):
        prune(tower, keep=8)
    shared = redraw(timm_tower())
    shared.blocks[1].mlp = shared.blocks[0].mlp
    pruned = prune(shared, keep=8).model
    assert pruned.blocks[1].mlp is pruned.blocks[0].mlp and pruned.blocks[1].mlp.fc1.out_features == 8
