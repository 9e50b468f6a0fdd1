"""torch-pruning importance criteria: DGMR, and scores that were computed elsewhere.

Works on torch-pruning groups and returns one score per channel. A group does not tell an MLP from attention. The pruner
decides which layers are pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch_pruning as tp
from torch import nn

from dgmr_tp.pruning.selection import Selection, select_diverse_rows
from dgmr_tp.pruning.sites import Site, find_sites, prunes_outputs


class DGMRImportance(tp.importance.Importance):
    """DGMR's criterion: hidden neurons scored by the order of a greedy Gram-Schmidt (arXiv 2506.08591, section 3.2).

    The procedure runs on a matrix with one row per neuron, in float64. The row of a plain MLP's neuron is its row in
    the Linear that produces it. The row of a gated MLP's neuron is its gate row and its value row concatenated, for two
    Linears and for the halves of one. Biases, activations and data are not used.

    The scores are float64 in (0, 1). The neuron picked at place ``p`` of ``M`` (from 0) scores in the interval
    ``(1 − (p+1)/M, 1 − p/M)``. The order is therefore strict and nested: pruning in four steps keeps the neurons that
    one step keeps. A score means the same fraction of a layer at any width. Its position inside the interval depends on
    the pick's residual norm relative to the layer's, and orders neurons of different layers under ``global_pruning``.

    It works in any torch-pruning pruner, and in :class:`dgmr_tp.MLPPruner`, which also finds the MLPs::

        pruner = tp.pruner.BasePruner(model, images, importance=DGMRImportance(), pruning_ratio=0.5,
                                      ignored_layers=[everything but the first Linear of each MLP])
        pruner.step()
    """

    @torch.no_grad()
    def __call__(self, group: tp.Group, picks: int | None = None, **_: object) -> torch.Tensor | None:
        """Return the scores of the channels ``group[0].idxs``.

        Args:
            group: a torch-pruning group.
            picks: number of neurons that will be kept. The procedure stops after the round that reaches it, and the
                remaining neurons are ordered by norm. Default: order all.

        Returns:
            Scores on the CPU, or None if no Linear produces the group. The two rows of a fused gate have the same
            score, so that a pruner may average coupled channels (``MLPPruner``, torch-pruning's
            ``out_channel_groups``).
        """
        rows = producer_rows(group)
        if rows is None:
            return None
        scores = selection_scores(select_diverse_rows(rows.numpy(), picks))
        channels = group._DG.get_out_channels(group[0].dep.target.module)
        return scores.repeat(channels // len(rows))[group[0].idxs]


def producer_rows(group: tp.Group) -> torch.Tensor | None:
    """Return one row per neuron of the group: the concatenated rows of every Linear that produces it.

    A group of some channels is extended to all of them, because a neuron's score depends on the other neurons.

    Returns:
        Float64 ``[neurons, columns]`` on the CPU, or None if no Linear produces the group.
    """
    root = group[0].dep
    channels = group._DG.get_out_channels(root.target.module)
    if channels is None or not prunes_outputs(group[0]):
        return None
    fused = isinstance(root.target.module, nn.Linear) and sorted(_group_of(group, [0])[0].idxs) == [0, channels // 2]
    if len(group[0].idxs) < channels:
        group = _group_of(group, list(range(channels)))
    producers = [item for item in group if isinstance(item.dep.target.module, nn.Linear) and prunes_outputs(item)]
    if not producers:
        return None
    # Filled in place: these are the largest matrices of the program, and one float64 copy is enough.
    rows = torch.zeros(channels, sum(item.dep.target.module.in_features for item in producers), dtype=torch.float64)
    start = 0
    for item in producers:
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
    """Convert a selection to the scores that :class:`DGMRImportance` describes, float64 ``[rows]`` by row index."""
    rows = len(selection.order)
    residual = torch.from_numpy(selection.residual)
    typical = residual.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    # The last term depends on the layer alone and separates the zero rows of different layers.
    position = 0.1 + 0.5 * residual / (residual + typical) + 0.3 * typical / (1 + typical)
    rank = torch.arange(rows - 1, -1, -1, dtype=torch.float64)
    scores = torch.empty(rows, dtype=torch.float64)
    scores[torch.from_numpy(selection.order)] = (rank + position) / rows
    return scores


class PrecomputedScores(tp.importance.Importance):
    """torch-pruning importance from existing scores, for criteria that evaluate a whole encoder at once.

    Args:
        model: the module whose groups will be scored.
        scores: by site name in ``model``, ``[hidden]``. Higher scores are kept first.
        name: name of the criterion in plans.
        sites: sites of ``model``. Default: all that :func:`find_sites` returns.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, torch.Tensor],
        name: str,
        sites: Sequence[Site] | None = None,
    ) -> None:
        self.name = name
        self.scores = {
            model.get_submodule(site.producers[0]): scores[site.name]
            for site in (find_sites(model) if sites is None else sites)
            if site.name in scores
        }

    def __call__(self, group: tp.Group, **_: object) -> torch.Tensor | None:
        """Return the scores of the channels ``group[0].idxs``, or None for a group without scores."""
        scores = self.scores.get(group[0].dep.target.module)
        if scores is None:
            return None
        channels = group._DG.get_out_channels(group[0].dep.target.module)
        return scores.repeat(channels // len(scores))[group[0].idxs]
