"""Block tuning against Adam written out in float64, and its guarantees."""

import copy
import math

import pytest
import torch
from conftest import pictures, redraw, timm_tower
from test_recovery import drift, pruned_pair
from torch import nn

from dgmr_tp.encoders import adapt
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Block, recover, tuning
from dgmr_tp.pruning.tuning import tune_block
from dgmr_tp.utils.progress import listen_to_progress


class Residual(nn.Module):
    """A block with a norm, a gain, and a parameter that its output does not depend on."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.gain, self.unused = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(3))

    def forward(self, state):
        return state + self.gain * self.linear(self.norm(state))


def problem(images=40):
    """Return a block, its inputs, the outputs of another block with the same shape, and weights of five tokens."""
    block, teacher = (redraw(Residual(), seed=seed) for seed in (1, 2))
    states = torch.randn(images, 5, 6, generator=torch.Generator().manual_seed(3))
    weight = torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125], dtype=torch.float64)
    return block, states, teacher(states).detach(), weight, torch.arange(images) % 10 == 9


def tuned(block, states, targets, weight, is_held_out, *, steps=8, norm=nn.Identity(), split=16):  # noqa: B008
    with torch.no_grad():
        return tune_block(
            Block("block", block, block),
            states.split(split),
            targets.split(split),
            weight,
            is_held_out,
            steps=steps,
            norm=norm,
            report_step=lambda step: None,
        )


def reference(block, states, targets, weight, is_held_out, steps, rate=0.03):
    """Train a float64 copy with Adam as in its paper, and return the parameters with the smallest held-out error."""
    block, states, targets = copy.deepcopy(block).double(), states.double(), targets.double()
    names, parameters = zip(*[item for item in block.named_parameters() if item[0] != "unused"], strict=True)
    rates = [rate * max(float(p.detach().square().mean().sqrt()), 1e-3) for p in parameters]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    fitted, generator = torch.nonzero(~is_held_out).flatten(), torch.Generator().manual_seed(0)

    def loss(images):
        difference = block(states[images]) - targets[images]
        return (difference**2).sum(2).mul(weight).sum(1).mean()

    best, best_values = float(loss(is_held_out)), [p.detach().clone() for p in parameters]
    for step in range(steps):
        images = fitted[torch.randint(len(fitted), (32,), generator=generator)]
        gradients = torch.autograd.grad(loss(images), parameters)
        factor = min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
        for p, g, m, v, r in zip(parameters, gradients, first, second, rates, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.99).add_(0.01 * g**2)
            p.data -= r * factor * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        if float(loss(is_held_out)) < best:
            best, best_values = float(loss(is_held_out)), [p.detach().clone() for p in parameters]
    return best, dict(zip(names, best_values, strict=True))


def test_a_block_is_trained_by_adam_on_the_weighted_error():
    block, *rest = problem()
    error, expected = reference(block, *rest, steps=8)
    other = reference(block, *rest, steps=8, rate=0.02)[1]
    result = tuned(block, *rest)
    held_out = rest[1][rest[-1]].double()
    mean = (held_out * rest[2][None, :, None]).sum(1).mean(0)
    variance = ((held_out - mean) ** 2).sum(2).mul(rest[2]).sum(1).mean()
    assert result.after == pytest.approx(error / float(variance), rel=1e-4) and result.after < result.before
    got = dict(block.named_parameters())
    assert all(torch.allclose(got[name].double(), value, atol=1e-5) for name, value in expected.items())
    assert not all(torch.allclose(got[name].double(), value, atol=1e-5) for name, value in other.items())
    assert torch.equal(got["unused"], redraw(Residual(), seed=1).unused)


def test_batches_do_not_matter_and_the_norm_does():
    results = []
    for split, norm in ((16, nn.Identity()), (40, nn.Identity()), (40, nn.LayerNorm(6))):
        block, *rest = problem()
        tuned(block, *rest, split=split, norm=norm)
        results.append(block.linear.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize("rate", [0.03, 1e6])
def test_parameters_that_do_not_lower_the_held_out_error_are_not_kept(monkeypatch, rate):
    monkeypatch.setattr(tuning, "LEARNING_RATE", rate)
    block, *rest = problem()
    before = copy.deepcopy(block.state_dict())
    result = tuned(block, *rest)
    kept = all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert kept == (result.after == result.before) == (rate == 1e6)


def test_tuned_blocks_bring_the_embedding_nearer_on_new_images(tower):
    new_images, errors = pictures(40, seed=9), {}
    for steps in (0, 60):
        dense, pruned = pruned_pair(tower, keep=24)
        report = recover(dense, pruned, pictures(300).split(50), tune_steps=steps)
        errors[steps] = drift(dense, pruned, new_images)
        assert all((entry.tuning is None) == (steps == 0) for entry in report)
    assert all(entry.tuning.after < entry.tuning.before for entry in report)
    assert errors[60] < 0.9 * errors[0]


def test_blocks_before_the_first_pruned_one_are_not_trained(tower):
    names = [f"{block.name}.mlp" for block in adapt(tower).blocks()]
    dense, pruned = pruned_pair(tower, keep={names[1]: 24})
    before = copy.deepcopy(pruned.tower.state_dict())
    recover(dense, pruned, pictures(100).split(50), tune_steps=10)
    changed = {name for name, tensor in pruned.tower.state_dict().items() if not torch.equal(tensor, before[name])}
    first, second, third = (block.name for block in pruned.blocks())
    assert not any(name.startswith(first) for name in changed)
    assert any(name.startswith(second) and "attn" in name for name in changed)
    assert any(name.startswith(third) for name in changed)
    assert all(name.startswith((second, third)) for name in changed)


def test_tuning_leaves_the_dense_tower_flags_and_dtypes_alone(tower):
    tower.bfloat16().requires_grad_(False)
    dense, pruned = pruned_pair(tower, keep=24)
    pruned.blocks()[0].module.requires_grad_(True)
    original = copy.deepcopy(dense.tower.state_dict())
    flags = [parameter.requires_grad for parameter in pruned.tower.parameters()]
    report = recover(dense, pruned, [pictures(60).bfloat16()], tune_steps=20)
    assert any(entry.tuning.after < entry.tuning.before for entry in report)
    assert all(torch.equal(tensor, original[name]) for name, tensor in dense.tower.state_dict().items())
    assert [parameter.requires_grad for parameter in pruned.tower.parameters()] == flags
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in pruned.tower.parameters())


def test_every_step_is_reported_and_a_negative_number_is_refused():
    dense, pruned = pruned_pair(redraw(timm_tower()), keep=24)
    seen = []
    with listen_to_progress(lambda *report: seen.append(report)):
        recover(dense, pruned, [pictures(20)], tune_steps=3)
    assert seen == [("tune blocks", step, 9) for step in range(1, 10)]
    with pytest.raises(DgmrError, match="tune_steps = -1 is negative"):
        recover(dense, pruned, [pictures(20)], tune_steps=-1)
