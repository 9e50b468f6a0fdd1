"""DGMRImportance in stock torch-pruning pruners."""

import copy

import pytest
import torch
import torch_pruning as tp
from conftest import pictures, redraw, timm_tower
from torch import nn

import dgmr_tp
from dgmr_tp.pruning.selection import select_diverse_rows


def stock_pruner(model, ratio, **options):
    ignored = [
        m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not name.endswith("mlp.fc1")
    ]
    return tp.pruner.BasePruner(
        model,
        (pictures(1),),
        importance=dgmr_tp.DGMRImportance(),
        pruning_ratio=ratio,
        ignored_layers=ignored,
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **options,
    )


def kept_rows(model, pruned):
    """Return the indices of the rows of each dense fc1 that ``pruned`` kept, identified by their values."""
    kept = []
    for before, after in zip(model.blocks, pruned.blocks, strict=True):
        rows = {tuple(row.tolist()): i for i, row in enumerate(before.mlp.fc1.weight)}
        kept.append(sorted(rows[tuple(row.tolist())] for row in after.mlp.fc1.weight))
    return kept


def expected_rows(model, keep):
    return [sorted(select_diverse_rows(b.mlp.fc1.weight.detach().numpy()).order[:keep].tolist()) for b in model.blocks]


@pytest.fixture
def model():
    return redraw(timm_tower(init_values=None))


@pytest.mark.parametrize("keep", [24, 48, 72, 144])
def test_local_pruning_keeps_the_greedy_choice(model, keep):
    pruned = copy.deepcopy(model)
    stock_pruner(pruned, 1 - (keep + 0.5) / 192).step()
    assert kept_rows(model, pruned) == expected_rows(model, keep)
    assert kept_rows(model, pruned) != expected_rows(model, keep + 1)
    assert torch.isfinite(pruned(pictures(2))).all()


def test_four_steps_keep_what_one_step_keeps(model):
    pruned = copy.deepcopy(model)
    pruner = stock_pruner(pruned, 1 - 48.5 / 192, iterative_steps=4)
    for _ in range(4):
        pruner.step()
    assert kept_rows(model, pruned) == expected_rows(model, 48)


def test_global_pruning_cuts_the_asked_number_and_the_same_share_of_every_width():
    model = redraw(timm_tower(init_values=None))
    for block, hidden in zip(model.blocks, (96, 192, 384), strict=True):
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(48, hidden), nn.Linear(hidden, 48)
    redraw(model)
    stock_pruner(model, 0.5, global_pruning=True).step()
    widths = [block.mlp.fc1.out_features for block in model.blocks]
    assert sum(widths) == 336
    assert all(abs(width - share) <= 1 for width, share in zip(widths, (48, 96, 192), strict=True))


def test_scores_have_no_ties_within_or_across_layers(model):
    graph = tp.DependencyGraph().build_dependency(model, (pictures(1),))
    scores = []
    for block in model.blocks:
        group = graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, list(range(192)))
        scores.append(dgmr_tp.DGMRImportance()(group))
        part = graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, [3, 7, 100])
        assert torch.equal(dgmr_tp.DGMRImportance()(part), scores[-1][[3, 7, 100]])
    scores = torch.cat(scores)
    assert len(scores.unique()) == len(scores)
    assert scores.min() > 0 and scores.max() < 1


def test_zero_rows_of_two_layers_do_not_tie(model):
    scores = []
    for block in model.blocks:
        with torch.no_grad():
            block.mlp.fc1.weight[:50] = 0
        graph = tp.DependencyGraph().build_dependency(block.mlp, (torch.randn(2, 48),))
        group = graph.get_pruning_group(block.mlp.fc1, tp.prune_linear_out_channels, list(range(192)))
        scores.append(dgmr_tp.DGMRImportance()(group))
        assert set(scores[-1].argsort()[:50].tolist()) == set(range(50))
    assert len(torch.cat(scores).unique()) == 3 * 192


def test_gate_and_value_rows_are_judged_together():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.value, self.out = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(20, 6)

        def forward(self, x):
            return self.out(torch.nn.functional.silu(self.gate(x)) * self.value(x))

    mlp = redraw(Gated())
    graph = tp.DependencyGraph().build_dependency(mlp, (torch.randn(2, 6),))
    group = graph.get_pruning_group(mlp.gate, tp.prune_linear_out_channels, list(range(20)))
    rows = torch.cat([mlp.gate.weight, mlp.value.weight], 1).detach().numpy()
    assert dgmr_tp.DGMRImportance()(group).argsort(descending=True).tolist() == select_diverse_rows(rows).order.tolist()


def test_a_group_without_a_linear_producer_gets_none():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = tp.DependencyGraph().build_dependency(model, (pictures(1),))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(8)))
    assert dgmr_tp.DGMRImportance()(group) is None
