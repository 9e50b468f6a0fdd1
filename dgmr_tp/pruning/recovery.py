"""Recovery in closed form: refit the last Linear of each pruned MLP so that its block matches the dense tower's.

Works on a dense and a pruned :class:`TowerAdapter` and on calibration images. Needs no labels and no training. Each
block can also be tuned after its refit (:mod:`dgmr_tp.pruning.tuning`).

For each site, let ``h_t`` be the input of the pruned MLP's last Linear at token ``t`` of the calibration images,
``w_t`` the weight of the token, and ``y_t`` a target for the MLP's output. The refit minimizes over ``U`` and ``b``

    Σ_t w_t ‖y_t − U h_t − b‖²  +  damping · (tr Σ_hh / k) · ‖U − U_K‖²

where ``U_K`` are the columns that pruning kept, ``k`` is their number and ``Σ_hh`` the covariance of ``h``.

There are two targets:

- *residual stream*: the MLP output that makes the pruned block's output equal the dense block's output. The blocks are
  processed in order, and each is fitted on the states that the recovered blocks before it produce. The fit therefore
  also compensates for errors from earlier blocks. With few images it fits noise.
- *dense MLP*: the output of the dense MLP on the same input. Errors from earlier blocks remain.

Both are fitted, and held-out images choose among interpolations between the two. If a norm separates the MLP from the
residual stream (EVA-CLIP-E, SwinV2), the first target cannot be computed, and only the second is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import scipy.linalg
import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.adapter import TowerAdapter, check_embeddings, run_blocks, stem_states
from dgmr_tp.pruning.calibration import (
    Moments,
    at_least_float32,
    detach_output,
    record_inputs,
    token_weights,
)
from dgmr_tp.pruning.sites import sites_inside
from dgmr_tp.pruning.tuning import Tuning, tune_block
from dgmr_tp.utils.modules import check_weights, evaluating, full_float32
from dgmr_tp.utils.progress import report_progress

HELD_OUT_INTERVAL = 10
"""One image in this many is held out of the fit and decides whether the refit is used."""
MIN_TOKENS_PER_NEURON = 4
"""Minimum number of fitted tokens per neuron of the widest MLP of a block.

If the images of the fit have fewer of the tokens that the head reads, all tokens are fitted.
"""
MIN_HELD_OUT_TOKENS = 10
"""Minimum number of held-out tokens that judge a refit.

If the held-out images have fewer of the tokens that the head reads, all tokens judge.
"""
INTERPOLATION_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights between the two regression targets (0: dense MLP output, 1: residual stream).

Weight 1 needs the most images.
"""
MIN_GAIN_FRACTION = 1e-4
"""Gain of a channel, relative to the largest, below which the residual stream target ignores the gain."""
DIAGONAL_TOLERANCE = 1e-2
"""Relative tolerance for treating d(block output)/d(MLP output) as diagonal, that is, as a gain per channel.

Rounding in bfloat16 is below it, and a norm is above it.
"""


def refit(moments: Moments, weight: Tensor, bias: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
    """Minimize the objective of this module for one Linear.

    The activations are centered, so that the bias is not penalized. A layer without bias is fitted without centering.
    Without damping, the normal equations can be singular (dead or duplicate neurons, fewer tokens than neurons). The
    solution nearest to ``weight`` is then returned.

    Args:
        moments: of the inputs ``h`` ``[k]`` and the targets ``y`` ``[d]``.
        weight: ``U_K``, ``[d, k]``.
        bias: ``[d]``, or None for a layer without bias.
        damping: see the module's formula.

    Returns:
        ``U`` ``[d, k]`` and ``b`` ``[d]`` or None, float64.
    """
    weight = weight.double()
    if bias is None:
        mean_h, mean_y = torch.zeros_like(weight[0]), torch.zeros_like(weight[:, 0])
    else:
        mean_h, mean_y = moments.means()
    hh, yh, _ = moments.second_moments(mean_h, mean_y)
    residual = (yh - weight @ hh).T.cpu().numpy()
    ridge = damping * float(hh.diagonal().mean())
    normal = hh.cpu().numpy()
    normal[range(len(normal)), range(len(normal))] += ridge
    try:
        change = scipy.linalg.cho_solve(scipy.linalg.cho_factor(normal), residual) if ridge > 0 else None
    except scipy.linalg.LinAlgError:  # the ridge is below rounding
        change = None
    if change is None:
        cutoff = max(len(normal) * torch.finfo(torch.float64).eps, 8 * moments.rounding)
        change = scipy.linalg.lstsq(normal, residual, cond=cutoff)[0]
    fitted = weight + torch.from_numpy(change.T).to(weight)
    return fitted, None if bias is None else mean_y - fitted @ mean_h


@dataclass(frozen=True)
class SiteRecovery:
    """Result of the recovery of one site. Errors are relative mean squared errors on the held-out images."""

    site: str
    """Site name."""
    cut_error: float
    """Error after pruning, before the refit."""
    recovered_error: float
    """Error after the refit."""
    fit_rejected: bool
    """True if the refit did not reduce the held-out error. The layer then keeps its weights from before the refit."""
    tuning: Tuning | None = None
    """Result of tuning the site's block, or None if blocks are not tuned."""
    images_needed: int | None = None
    """Number of images with enough tokens that the head reads to fit the site on them alone.

    None if the calibration images have enough. Otherwise the site was fitted on all tokens.
    """


@torch.no_grad()
def recover(
    dense: TowerAdapter,
    pruned: TowerAdapter,
    images: Iterable[Tensor],
    *,
    damping: float = 1e-3,
    tune_steps: int = 0,
) -> list[SiteRecovery]:
    """Refit, in place, the last Linear of every MLP of ``pruned`` that lost neurons, and tune the blocks if asked.

    Tokens are weighted by :func:`~dgmr_tp.pruning.calibration.token_weights`. One image in ten is held out. A site
    whose held-out error does not fall keeps its weights.

    Args:
        dense: the dense tower. Its residual stream is the target. It is unchanged.
        pruned: the same tower after pruning.
        images: preprocessed batches ``[batch, 3, height, width]`` on the tower's device and in its dtype, with at least
            ten images in total. The states of all images between two blocks are held in memory, for both towers.
        damping: ridge of the formula, relative to the mean variance of the neurons. 0 or more.
        tune_steps: number of steps in which each block is trained after its refit; see
            :func:`~dgmr_tp.pruning.tuning.tune_block`. 0: no training, and only the refitted Linears change.

    Returns:
        One entry per pruned site inside the blocks, in the order of the blocks.

    Raises:
        DgmrError: a tower has no weights or does not take the images, there are fewer than ten images, the damping or
            ``tune_steps`` is negative, the activations are not finite, or the held-out images do not differ.
    """
    if tune_steps < 0:
        raise DgmrError(f"tune_steps = {tune_steps} is negative. Give 0 or more.")
    if not 0 <= damping < float("inf"):
        raise DgmrError(f"damping = {damping} is negative or not finite. Give 0 or more.")
    check_weights(dense.tower)
    check_weights(pruned.tower)
    with evaluating(dense.tower, pruned.tower), full_float32():
        return _recover(dense, pruned, images, damping, tune_steps)


def _recover(
    dense: TowerAdapter, pruned: TowerAdapter, images: Iterable[Tensor], damping: float, tune_steps: int
) -> list[SiteRecovery]:
    states = stem_states(pruned, images)
    num_images = sum(map(len, states))
    if num_images < HELD_OUT_INTERVAL:
        raise DgmrError(
            f"recovery needs at least {HELD_OUT_INTERVAL} calibration images and got {num_images}. Give more images."
        )
    check_embeddings(dense.embed(run_blocks(dense.blocks(), states[0])), "the dense model")
    dense_states = list(states)
    blocks, dense_blocks = pruned.blocks(), dense.blocks()
    report: list[SiteRecovery] = []
    for depth, (block, dense_block) in enumerate(zip(blocks, dense_blocks, strict=True)):
        # The state after the block, because the first block of a Swin stage has fewer tokens than its input.
        state_after = block(states[0])
        sites = sites_inside(dense.sites, block.name)
        consumers = [cast(nn.Linear, block.module.get_submodule(site.consumer)) for site in sites]
        weight = token_weights(pruned, state_after, last=depth == len(blocks) - 1)
        widest = max((consumer.in_features for consumer in consumers), default=0)
        images_needed = _images_needed(weight, widest)
        has_few_images = num_images < images_needed
        if has_few_images:
            weight = token_weights(pruned, state_after, last=False)
        for index, state in enumerate(dense_states):  # in place, because the states of all images are large
            dense_states[index] = dense_block(state)
        for site, consumer in zip(sites, consumers, strict=True):
            if consumer.in_features == site.hidden:
                continue
            mlp, dense_mlp = (b.module.get_submodule(site.name) for b in (block, dense_block))
            gain = _gain(block, consumer, states[0][:1])
            fit, held_out = _site_moments(block, mlp, dense_mlp, consumer, states, dense_states, gain, weight)
            if gain is None:
                gain = torch.ones(consumer.out_features, dtype=torch.float64, device=consumer.weight.device)
            entry = _refit_layer(f"{block.name}.{site.name}", consumer, gain, fit, held_out, damping)
            report.append(replace(entry, images_needed=images_needed if has_few_images else None))
        if tune_steps:
            is_last = depth == len(blocks) - 1
            tuning = tune_block(
                block,
                states,
                dense_states,
                weight,
                _is_held_out(num_images),
                steps=tune_steps,
                norm=partial(_final_norm, pruned) if is_last else nn.Identity(),
                report_step=partial(_report_step, depth * tune_steps, len(blocks) * tune_steps),
            )
            report = [replace(entry, tuning=tuning) if entry.tuning is None else entry for entry in report]
        for index, state in enumerate(states):
            states[index] = block(state)
        if not tune_steps:
            report_progress("recover", depth + 1, len(blocks))
    return report


def _is_held_out(num_images: int, first_image: int = 0) -> Tensor:
    """Return which of ``num_images`` images are held out, the first being number ``first_image``."""
    return torch.arange(first_image, first_image + num_images) % HELD_OUT_INTERVAL == HELD_OUT_INTERVAL - 1


def _images_needed(weight: Tensor, neurons: int) -> int:
    """Return the smallest number of images that fit and judge ``neurons`` on the tokens that have a weight."""
    tokens = int((weight > 0).sum())
    fitted = math.ceil(MIN_TOKENS_PER_NEURON * neurons / tokens)
    with_held_out = (fitted - 1) * HELD_OUT_INTERVAL // (HELD_OUT_INTERVAL - 1) + 1
    return max(with_held_out, math.ceil(MIN_HELD_OUT_TOKENS / tokens) * HELD_OUT_INTERVAL)


def _report_step(steps_before: int, total: int, step: int) -> None:
    report_progress("tune blocks", steps_before + step, total)


def _final_norm(adapter: TowerAdapter, state: Tensor) -> Tensor:
    """Apply the final norm in the tower's dtype, and return float32."""
    return adapter.norm(state.to(next(adapter.tower.parameters()).dtype)).float()


def _gain(block: Callable[[Tensor], Tensor], consumer: nn.Linear, state: Tensor) -> Tensor | None:
    """Return the factor of each channel between the MLP's output and the residual stream, float64 ``[width]``.

    The factor is 1, or a LayerScale. The block is differentiated, so that no adapter has to declare it.

    Returns:
        The gain, or None if d(block output)/d(MLP output) is not diagonal, as with a norm in between. Channels with a
        gain below :data:`MIN_GAIN_FRACTION` of the largest get 1, because the refit would need weights that half
        precision cannot represent.
    """
    with torch.enable_grad(), detach_output(consumer) as outputs:
        after = block(state)
        output = outputs[consumer]
        if after.shape != output.shape:
            return None
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        (derivative,) = torch.autograd.grad(after, output, direction)
    derivative, direction = derivative.flatten(0, -2).double(), direction.flatten(0, -2).double()
    gain = (derivative * direction).sum(0) / direction.square().sum(0)
    if (derivative - gain * direction).norm() > DIAGONAL_TOLERANCE * derivative.norm():
        return None
    return gain.where(gain.abs() > MIN_GAIN_FRACTION * gain.abs().max(), 1)


def _site_moments(
    block: Callable[[Tensor], Tensor],
    mlp: nn.Module,
    dense_mlp: nn.Module,
    consumer: nn.Linear,
    states: list[Tensor],
    dense_states: list[Tensor],
    gain: Tensor | None,
    weight: Tensor,
) -> tuple[Moments, Moments]:
    """Return the moments of the consumer's inputs and its targets, on the images of the fit and on the held-out images.

    The targets are the dense MLP's output and the output that reaches the dense residual stream, concatenated and
    multiplied by the gain. Without a gain they are the dense MLP's output alone.

    Args:
        block: the pruned tower's block.
        mlp: its MLP.
        dense_mlp: the dense tower's MLP.
        consumer: last Linear of ``mlp``.
        states: states before ``block``.
        dense_states: the dense tower's states after its block.
        gain: see :func:`_gain`.
        weight: weights of the tokens.
    """
    fit, held_out = Moments(), Moments()
    weighted_tokens = torch.nonzero(weight).flatten()
    first_image = 0
    for state, dense_state in zip(states, dense_states, strict=True):
        with record_inputs(mlp, consumer) as inputs:
            after = block(state)
        hidden = inputs[consumer][:, weighted_tokens]
        output = at_least_float32(consumer(hidden))
        hidden, targets = at_least_float32(hidden), at_least_float32(dense_mlp(inputs[mlp])[:, weighted_tokens])
        if gain is not None:
            missing = at_least_float32(dense_state[:, weighted_tokens]) - at_least_float32(after[:, weighted_tokens])
            targets = torch.cat([targets, output], dim=-1) * gain.repeat(2).to(targets)
            targets[..., -gain.numel() :] += missing
        is_held_out = _is_held_out(len(state), first_image).to(state.device)
        first_image += len(state)
        for moments, selected in ((fit, ~is_held_out), (held_out, is_held_out)):
            if selected.any():
                rows = weight[weighted_tokens].repeat(int(selected.sum()))
                moments.add(hidden[selected].flatten(0, 1), targets[selected].flatten(0, 1), rows)
    return fit, held_out


def _refit_layer(
    name: str, layer: nn.Linear, gain: Tensor, fit: Moments, held_out: Moments, damping: float
) -> SiteRecovery:
    """Refit ``layer`` in place, if that reduces the error on the held-out images.

    The moments contain one target, or the dense MLP's and the residual stream's concatenated. The candidates are the
    interpolations between the two fits. The candidate with the smallest held-out error is used.

    Args:
        name: site name.
        layer: last Linear of the pruned MLP.
        gain: float64 ``[width]``. The targets are ``gain`` times the layer's output.
        fit: moments of the images of the fit.
        held_out: moments of the held-out images.
        damping: see the module's formula.
    """
    if not all(torch.isfinite(moments.hh).all() and torch.isfinite(moments.yh).all() for moments in (fit, held_out)):
        raise DgmrError(
            f"the activations at {name} are not finite on these images. Check the weights and the preprocessing."
        )
    width, scale = layer.out_features, gain[:, None]
    num_targets, validation = len(fit.y) // width, held_out.last_channels(width)
    weight = scale * layer.weight.detach().double()
    bias = None if layer.bias is None else gain * layer.bias.detach().double()
    repeated_bias = None if bias is None else bias.repeat(num_targets)
    fitted, fitted_bias = refit(fit, weight.repeat(num_targets, 1), repeated_bias, damping)
    candidates = []
    for interpolation in INTERPOLATION_WEIGHTS if num_targets > 1 else (0.0,):
        new_weight = (torch.lerp(fitted[:width], fitted[-width:], interpolation) / scale).to(layer.weight.dtype)
        new_bias = scaled_bias = None
        if fitted_bias is not None:
            new_bias = (torch.lerp(fitted_bias[:width], fitted_bias[-width:], interpolation) / gain).to(
                layer.weight.dtype
            )
            scaled_bias = gain * new_bias.double()
        error = validation.relative_error(scale * new_weight.double(), scaled_bias)
        candidates.append((error, new_weight, new_bias))
    cut_error = validation.relative_error(weight, bias)
    if not math.isfinite(cut_error):
        raise DgmrError(
            f"the dense model's output at {name} is the same for all held-out calibration images, so the recovery "
            "cannot be judged. Give different images."
        )
    recovered_error, new_weight, new_bias = min(candidates, key=lambda candidate: candidate[0])
    improved = recovered_error < cut_error
    if improved:
        layer.weight.copy_(new_weight)
        if new_bias is not None:
            layer.bias.copy_(new_bias)
    return SiteRecovery(name, cut_error, recovered_error, fit_rejected=not improved)
