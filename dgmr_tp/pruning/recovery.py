"""Recovery in closed form: refit what reads the hidden neurons so that the pruned block leaves the dense one's residual stream.

For each site, over the tokens ``t`` of the calibration images, with ``h_t`` what the pruned MLP's last Linear sees and
``y_t`` what it would have to answer for the block to end where the dense tower's block ends, minimise over ``U`` and ``b``

    Σ_t w_t ‖y_t − U h_t − b‖²  +  damping · (tr Σ_hh / k) · ‖U − U_K‖²

where ``U_K`` are the columns that pruning kept. No labels, no training; images are read once, and the walk goes forward
over the blocks of both towers once, so each block is fitted on what the recovered blocks before it really produce, and makes
good what they left. With few images that fits noise; so a second ``y_t``, what the dense MLP answers on the same input, is fitted as
well, and images that were held out choose between the two. Where a norm stands between the MLP and the residual stream
(EVA-CLIP-E, SwinV2), no answer of the MLP is known that would bring the stream back, and there is only the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import scipy.linalg
import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import TowerAdapter
from dgmr_tp.pruning.calibration import Moments, answers_as_leaf, recorded_inputs, token_weights, too_few
from dgmr_tp.pruning.sites import find_sites
from dgmr_tp.utils.modules import evaluating
from dgmr_tp.utils.progress import report_progress

HELD_OUT = 10
"""One image in so many is not fitted on, and decides whether a refit is kept."""


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How far from the fit to the dense MLP's answers to the fit to the residual stream: all the way asks for most images."""
FAINT = 1e-4
"""Part of the largest gain below which a channel counts as dropped."""
ELEMENTWISE = 1e-2
"""A block's derivative by its MLP's answer is taken for a gain per channel if no more than this part of it is anything else:
rounding in bfloat16 is below, a norm above."""


def refit(moments: Moments, weight: Tensor, bias: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
    """The minimiser of the module's formula, float64: ``U`` ``[d, k]`` and ``b`` ``[d]``.

    Centring leaves the bias unpenalised; a layer without bias is fitted about zero and stays without one. Without
    damping the normal equations may be singular (dead or duplicate neurons, fewer tokens than neurons): then the solution
    nearest to ``weight`` is taken.
    """
    weight = weight.double()
    mean_h, mean_y = (
        moments.mean() if bias is not None else (torch.zeros_like(weight[0]), torch.zeros_like(weight[:, 0]))
    )
    hh, yh, _ = moments.about(mean_h, mean_y)
    residual = (yh - weight @ hh).T.cpu().numpy()
    ridge = damping * float(hh.diagonal().mean())
    normal = hh.cpu().numpy()
    normal[range(len(normal)), range(len(normal))] += ridge
    try:
        change = scipy.linalg.cho_solve(scipy.linalg.cho_factor(normal), residual) if ridge > 0 else None
    except scipy.linalg.LinAlgError:  # a ridge too small to matter
        change = None
    if change is None:
        change = scipy.linalg.lstsq(normal, residual, cond=len(normal) * torch.finfo(torch.float64).eps)[0]
    fitted = weight + torch.from_numpy(change.T).to(weight)
    return fitted, None if bias is None else mean_y - fitted @ mean_h


@dataclass(frozen=True)
class SiteRecovery:
    """What recovery did at one site; errors are relative mean squared errors on the images held out."""

    site: str
    cut_error: float
    recovered_error: float
    kept_cut: bool
    """True where refitting did not lower the held-out error, so that the cut weights stayed."""


@torch.no_grad()
def recover(
    dense: TowerAdapter,
    pruned: TowerAdapter,
    images: Iterable[Tensor],
    *,
    damping: float = 1e-3,
) -> list[SiteRecovery]:
    """Refit, in place, the last Linear of every MLP of ``pruned`` that lost neurons.

    Tokens count as :func:`token_weights` says. One image in ten is held out: a site whose error on those does not fall keeps
    its cut weights.

    Args:
        dense: the original; its residual stream says where the pruned one's should be.
        pruned: the same encoder after pruning.
        images: preprocessed batches ``[batch, 3, height, width]`` on the encoder's device and in its dtype, at least ten
            images in all. The states of all of them between two blocks, of both towers, are held in memory.
        damping: ``λ`` of the formula, relative to the neurons' mean variance.

    Returns:
        One entry per site, in the order of the walk.

    Raises:
        DgmrError: fewer than ten images, a negative damping, or the activations are not finite.
    """
    if damping < 0:
        raise DgmrError(f"damping = {damping}; it must be 0 or more")
    with evaluating(dense.tower, pruned.tower):
        return _recover(dense, pruned, images, damping)


def _recover(
    dense: TowerAdapter,
    pruned: TowerAdapter,
    images: Iterable[Tensor],
    damping: float,
) -> list[SiteRecovery]:
    states = [pruned.stem(batch) for batch in images]
    total = sum(map(len, states))
    if total < HELD_OUT:
        raise DgmrError(f"recovery needs at least {HELD_OUT} calibration images, got {total}")
    goals = list(states)
    blocks, dense_blocks = pruned.blocks(), dense.blocks()
    report = []
    for depth, (block, dense_block) in enumerate(zip(blocks, dense_blocks, strict=True)):
        # After the block: the first block of a hierarchical tower's stage has fewer tokens than the state it takes.
        after, sites = block(states[0]), find_sites(block.module)
        weight = token_weights(pruned, after, last=depth == len(blocks) - 1)
        if too_few(weight, total, max((site.hidden for site in sites), default=0)):
            weight = token_weights(pruned, after, last=False)
        for place, goal in enumerate(goals):  # in place: the states of all images are large
            goals[place] = dense_block(goal)
        for site in sites:
            consumer, dense_consumer = (
                cast(nn.Linear, b.module.get_submodule(site.consumer)) for b in (block, dense_block)
            )
            if consumer.in_features == dense_consumer.in_features:
                continue
            mlp, dense_mlp = (b.module.get_submodule(site.name) for b in (block, dense_block))
            gain = _gain(block, consumer, states[0][:1])
            heard = (
                torch.ones(consumer.out_features, dtype=torch.float64, device=consumer.weight.device)
                if gain is None
                else gain
            )
            fit, held_out = _site_moments(block, mlp, dense_mlp, consumer, states, goals, gain, weight)
            report.append(_refit_layer(f"{block.name}.{site.name}", consumer, heard, fit, held_out, damping))
        for place, state in enumerate(states):
            states[place] = block(state)
        report_progress("recover", depth + 1, len(blocks))
    return report


def _gain(block: Callable[[Tensor], Tensor], consumer: nn.Linear, state: Tensor) -> Tensor | None:
    """What the block multiplies each channel of its last Linear's answer with before it enters the stream, ``[width]``.

    One, or a LayerScale; None where the answer does not enter channel by channel, as behind a norm. Found by differentiating
    the block, so that no encoder has to declare it.
    """
    with torch.enable_grad(), answers_as_leaf(consumer) as seen:
        after = block(state)
        answer = seen[consumer]
        if after.shape != answer.shape:
            return None
        direction = torch.randn(answer.shape, generator=torch.Generator().manual_seed(0)).to(answer)
        (derivative,) = torch.autograd.grad(after, answer, direction)
    derivative, direction = derivative.flatten(0, -2).double(), direction.flatten(0, -2).double()
    gain = (derivative * direction).sum(0) / direction.square().sum(0)
    if (derivative - gain * direction).norm() > ELEMENTWISE * derivative.norm():
        return None
    # A channel that the block all but drops is not asked to make good what it cannot: half precision could not hold its weights.
    return gain.where(gain.abs() > FAINT * gain.abs().max(), 1)


def _site_moments(
    block: Callable[[Tensor], Tensor],
    mlp: nn.Module,
    dense_mlp: nn.Module,
    consumer: nn.Linear,
    states: list[Tensor],
    goals: list[Tensor],
    gain: Tensor | None,
    weight: Tensor,
) -> tuple[Moments, Moments]:
    """Moments of the hidden neurons and, side by side, of the dense MLP's answers and of those that bring the stream to the dense one.

    Answers are taken as the stream hears them, times the gain; where there is none, they are the dense MLP's alone.
    """
    fit, held_out = Moments(), Moments()
    counted = torch.nonzero(weight).flatten()
    image = 0
    for state, goal in zip(states, goals, strict=True):
        with recorded_inputs(mlp, consumer) as seen:
            after = block(state)
        hidden, answers = seen[consumer][:, counted], dense_mlp(seen[mlp])[:, counted].double()
        if gain is not None:
            missing = goal[:, counted].double() - after[:, counted].double()
            answers = torch.cat([gain * answers, gain * consumer(hidden).double() + missing], dim=-1)
        index = torch.arange(image, image + len(state), device=state.device)
        image += len(state)
        for moments, chosen in ((fit, index % HELD_OUT != HELD_OUT - 1), (held_out, index % HELD_OUT == HELD_OUT - 1)):
            if chosen.any():
                rows = weight[counted].repeat(int(chosen.sum()))
                moments.add(hidden[chosen].flatten(0, 1), answers[chosen].flatten(0, 1), rows)
    return fit, held_out


def _refit_layer(
    name: str, layer: nn.Linear, gain: Tensor, fit: Moments, held_out: Moments, damping: float
) -> SiteRecovery:
    """Refit ``layer`` to one or two targets side by side, ``gain`` times its answers; of the weights between the two fits, and of
    those that are there, the best on the images held out stay."""
    if not all(torch.isfinite(moments.hh).all() and torch.isfinite(moments.yh).all() for moments in (fit, held_out)):
        raise DgmrError(
            f"the activations at {name} are not finite on these images; check the weights and the preprocessing"
        )
    width, scale = layer.out_features, gain[:, None]
    targets, judge = len(fit.y) // width, held_out.last(width)
    weight, bias = (
        scale * layer.weight.detach().double(),
        None if layer.bias is None else gain * layer.bias.detach().double(),
    )
    fitted, fitted_bias = refit(fit, weight.repeat(targets, 1), None if bias is None else bias.repeat(targets), damping)
    candidates = []
    for share in SHARES if targets > 1 else (0.0,):
        new_weight = (torch.lerp(fitted[:width], fitted[-width:], share) / scale).to(layer.weight.dtype)
        new_bias = None
        if fitted_bias is not None:
            new_bias = (torch.lerp(fitted_bias[:width], fitted_bias[-width:], share) / gain).to(layer.weight.dtype)
        error = judge.error(scale * new_weight.double(), None if new_bias is None else gain * new_bias.double())
        candidates.append((error, new_weight, new_bias))
    cut = judge.error(weight, bias)
    recovered, new_weight, new_bias = min(candidates, key=lambda candidate: candidate[0])
    better = recovered < cut
    if better:
        layer.weight.copy_(new_weight)
        if new_bias is not None:
            layer.bias.copy_(new_bias)
    return SiteRecovery(name, cut, recovered, kept_cut=not better)
