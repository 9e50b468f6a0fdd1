"""torch-pruning importance criteria: DGMR, and scores that were found elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch_pruning as tp
from torch import nn

from dgmr_tp.pruning.selection import Selection, select_diverse_rows
from dgmr_tp.pruning.sites import find_sites, prunes_outputs


class DGMRImportance(tp.importance.Importance):
    """Scores hidden neurons by the order in which DGMR's greedy Gram-Schmidt picks them (arXiv 2506.08591, section 3.2).

    A neuron's row is its row in the Linear layer that produces it; of a gated MLP, its gate row and its value row side by
    side, whether two Linears make them or the halves of one. Bias, activation and data do not enter. Computed in float64.

    The scores are float64 in (0, 1), higher is kept first. The neuron picked at place ``p`` of ``M`` lies in the slot
    ``(1 − (p+1)/M, 1 − p/M)``, so the order is strict, nested (pruning in four steps keeps what one step keeps) and means
    the same fraction of a layer whatever its width; the place inside the slot is given by the pick's residual norm (relative to
    the layer's), which orders the neurons of different layers against each other under ``global_pruning``.

    Use it in any torch-pruning pruner, or in :class:`dgmr_tp.MLPPruner`, which also finds the MLPs::

        pruner = tp.pruner.BasePruner(model, images, importance=DGMRImportance(), pruning_ratio=0.5,
                                      ignored_layers=[everything but the first Linear of each MLP])
        pruner.step()

    A criterion cannot tell an MLP from attention by the group alone: which layers are pruned is the pruner's business.
    """

    @torch.no_grad()
    def __call__(self, group: tp.Group, picks: int | None = None, **_: object) -> torch.Tensor | None:
        """Scores aligned with ``group[0].idxs``, on the CPU; None for a group that no Linear produces.

        ``picks``: how many neurons will stay. The procedure ends in the round that reaches this number, and the neurons after
        it are ordered by their norms alone.

        The two rows of a fused gate have the same score, so that what couples channels (``MLPPruner``, torch-pruning's
        ``out_channel_groups``) may average them.
        """
        rows = producer_rows(group)
        if rows is None:
            return None
        scores = selection_scores(select_diverse_rows(rows.numpy(), picks))
        channels = group._DG.get_out_channels(group[0].dep.target.module)
        return scores.repeat(channels // len(rows))[group[0].idxs]


def producer_rows(group: tp.Group) -> torch.Tensor | None:
    """One float64 row per neuron of the group, on the CPU: the rows of every Linear that produces it, side by side.

    A group of some channels is widened to all of them first: a neuron's place depends on the neurons beside it.
    """
    root = group[0].dep
    channels = group._DG.get_out_channels(root.target.module)
    if channels is None or not prunes_outputs(group[0]):
        return None
    fused = isinstance(root.target.module, nn.Linear) and sorted(_group_of(group, [0])[0].idxs) == [0, channels // 2]
    if len(group[0].idxs) < channels:
        group = _group_of(group, list(range(channels)))
    parts = [item for item in group if isinstance(item.dep.target.module, nn.Linear) and prunes_outputs(item)]
    if not parts:
        return None
    rows = torch.zeros(channels, sum(item.dep.target.module.in_features for item in parts), dtype=torch.float64)
    start = 0
    for item in parts:  # one float64 copy in all: these matrices are the largest there are
        weight = item.dep.target.module.weight
        columns = rows[:, start : start + weight.shape[1]]
        if item.idxs == item.root_idxs == list(range(channels)):
            columns.copy_(weight)
        else:
            columns[torch.as_tensor(item.root_idxs)] = weight[item.idxs].to(columns)
        start += weight.shape[1]
    return torch.cat(rows.chunk(2), dim=1) if fused else rows


def _group_of(group: tp.Group, channels: list[int]) -> tp.Group:
    root = group[0].dep
    return group._DG.get_pruning_group(root.target.module, root.handler, channels)


def selection_scores(selection: Selection) -> torch.Tensor:
    """The scores described in :class:`DGMRImportance`, float64 ``[rows]`` in the order of the rows."""
    rows = len(selection.order)
    residual = torch.from_numpy(selection.residual)
    typical = residual.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    # The last term is the layer's own, so that the zero rows of two layers do not tie.
    within_slot = 0.1 + 0.5 * residual / (residual + typical) + 0.3 * typical / (1 + typical)
    place = torch.arange(rows - 1, -1, -1, dtype=torch.float64)
    scores = torch.empty(rows, dtype=torch.float64)
    scores[torch.from_numpy(selection.order)] = (place + within_slot) / rows
    return scores


class GivenScores(tp.importance.Importance):
    """torch-pruning importance from scores that are there already, for criteria that look at a whole encoder.

    Args:
        model: the module whose groups will be scored.
        scores: by site name in ``model``, ``[hidden]``, higher is kept.
        name: what a plan calls the criterion.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, torch.Tensor], name: str) -> None:
        self.name = name
        self.scores = {
            model.get_submodule(site.producers[0]): scores[site.name]
            for site in find_sites(model)
            if site.name in scores
        }

    def __call__(self, group: tp.Group, **_: object) -> torch.Tensor | None:
        """Scores aligned with ``group[0].idxs``; None for a group that has none."""
        scores = self.scores.get(group[0].dep.target.module)
        if scores is None:
            return None
        channels = group._DG.get_out_channels(group[0].dep.target.module)
        return scores.repeat(channels // len(scores))[group[0].idxs]
