"""The MLP pruner: it decides a plan with any torch-pruning importance, and applies a plan with torch-pruning's groups.

Works on one model in place. It does not know the library that the model comes from, nor files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.allocation import Amount, keep_counts
from dgmr_tp.pruning.cost import ImageSize, costs
from dgmr_tp.pruning.importance import DGMRImportance, PrecomputedScores
from dgmr_tp.pruning.plan import Plan, SitePlan, weight_sha256
from dgmr_tp.pruning.sites import Site, find_sites, hidden_group
from dgmr_tp.utils.modules import check_weights, evaluating
from dgmr_tp.utils.progress import report_progress

OUTPUT_TOLERANCE = 1e-4
"""Largest difference between a pruned MLP's output and its reference, relative to the largest absolute output."""


class MLPPruner:
    """Removes hidden neurons from a model's MLPs. Attention, norms, residual width and output shapes do not change.

    ::

        pruner = MLPPruner(model.visual, mlp_ratio=1)
        plan = pruner.plan()      # decides; the model is unchanged
        print(plan)
        pruner.apply(plan)        # prunes in place and verifies

    Args:
        model: the tower. It is pruned in place. Its weights may be frozen, bf16 or fp16.
        importance: any torch-pruning importance. Default: :class:`DGMRImportance`.
        sites: the MLPs to prune. Default: all that :func:`find_sites` returns.
        weight_hashes: :func:`weight_sha256` of ``model`` by site name, where the caller has them. Missing ones are
            computed when they are needed.
        name: name of the encoder in the plan. Default: the class name of ``model``.
        image_size: height and width of the images in pixels, which a budget of ``flops`` needs.
        amount: how many neurons to keep: ``mlp_ratio``, ``keep_ratio``, ``keep`` or ``budget``, and ``round_to`` (see
            :func:`keep_counts`). Not needed to apply an existing plan.

    Raises:
        DgmrError: the model has no MLP, or a keep count is impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: tp.importance.Importance | None = None,
        *,
        sites: Sequence[Site] | None = None,
        weight_hashes: Mapping[str, str] | None = None,
        name: str | None = None,
        image_size: ImageSize | None = None,
        **amount: Unpack[Amount],
    ) -> None:
        self.model = model
        self.importance = importance or DGMRImportance()
        self.sites = list(sites) if sites is not None else find_sites(model)
        self.weight_hashes = dict(weight_hashes or {})
        site_costs = costs(model, self.sites, image_size) if amount.get("budget") else None
        self.keep = keep_counts(self.sites, **amount, costs=site_costs) if amount else None
        self.name = name or type(model).__name__

    def plan(self) -> Plan:
        """Score every site and choose the neurons to keep. The model is unchanged.

        Raises:
            DgmrError: no amount was given, the model has no weights, or the importance returns no score, a non-finite
                one, or the wrong number.
        """
        if self.keep is None:
            raise DgmrError(
                "no amount says how many neurons to keep. Give MLPPruner mlp_ratio, keep_ratio, keep or budget."
            )
        decisions = {}
        for site in self.sites:
            decisions[site.name] = self.decide(site)
            report_progress("select", len(decisions), len(self.sites))
        return self.plan_of(decisions)

    def plan_of(self, decisions: dict[str, SitePlan]) -> Plan:
        """Return a plan of ``decisions`` with the pruner's encoder name and the name of its importance."""
        criterion = getattr(self.importance, "name", type(self.importance).__name__.removesuffix("Importance"))
        return Plan(self.name, criterion, decisions)

    def decide(self, site: Site) -> SitePlan:
        """Choose the neurons of one site: the highest scores, as many as the amount allows."""
        assert self.keep is not None
        count = self.keep[site.name]
        kept = _highest(self.scores(site), count) if count < site.hidden else tuple(range(count))
        weight_hash = self.weight_hashes.get(site.name) or weight_sha256(self.model, site)
        return SitePlan(site.width, site.hidden, kept, weight_hash)

    def scores(self, site: Site) -> Tensor:
        """Return the importance's scores of the site's neurons, ``[hidden]``. Higher scores are kept first.

        bf16 and fp16 MLPs are scored in float32, because an importance sums thousands of squares.
        """
        rows = site.hidden * (2 if site.fused else 1)
        mlp = self.model.get_submodule(site.name)
        # PrecomputedScores identifies layers by object and computes nothing, so it must see the model's own modules.
        has_scores = isinstance(self.importance, PrecomputedScores)
        if not has_scores and next(mlp.parameters()).dtype in (torch.bfloat16, torch.float16):
            gradients = [
                None if p.grad is None else p.grad.float() for p in mlp.parameters()
            ]  # for tp's Taylor criterion
            mlp = copy.deepcopy(mlp).float()
            for parameter, gradient in zip(mlp.parameters(), gradients, strict=True):
                parameter.grad = gradient
        group = _group(mlp, site, range(rows))
        # DGMR need not order the neurons that are pruned. Importances of torch-pruning take no such argument.
        options = {"picks": self.keep[site.name]} if self.keep and isinstance(self.importance, DGMRImportance) else {}
        try:
            with torch.no_grad():
                scores = self.importance(group, **options)
        except NotImplementedError:
            check_weights(mlp)
            raise
        except ValueError as error:
            raise DgmrError(f"{type(self.importance).__name__} cannot score site {site.name}: {error}") from error
        if scores is None:
            raise DgmrError(
                f"{type(self.importance).__name__} returned no scores for site {site.name}. {rows} finite scores are "
                "needed."
            )
        if scores.is_meta:
            check_weights(mlp)
        finite = bool(torch.isfinite(scores).all())
        if scores.shape != (rows,) or not finite:
            raise DgmrError(
                f"{type(self.importance).__name__} returned scores of shape {tuple(scores.shape)}, finite: {finite}, "
                f"for site {site.name}. {rows} finite scores are needed."
            )
        return scores.view(-1, site.hidden).mean(0)  # torch-pruning averages coupled channels too

    def apply(self, plan: Plan) -> nn.Module:
        """Prune the model in place to ``plan`` and return it.

        The whole plan is checked before the first site is pruned. After each site, the widths and all weights are
        compared with the plan. The MLP's output on random tokens is compared with that of the dense MLP whose pruned
        columns are zero, except where the MLP has a norm over the hidden neurons. ``requires_grad`` and train/eval mode
        are restored.

        Raises:
            DgmrError: the model has no weights, the plan does not fit it, or a pruned MLP differs from the plan.
        """
        try:
            plan.check(self.model, self.sites, self.weight_hashes)
        except DgmrError:
            check_weights(self.model)
            raise
        _check_untied(self.model, [site for site in self.sites if site.name in plan.sites])
        for site in self.sites:
            if site.name in plan.sites:
                self._cut(site, plan.sites[site.name].kept)
                self.weight_hashes.pop(site.name, None)
        return self.model

    def _cut(self, site: Site, kept: tuple[int, ...]) -> None:
        mlp = self.model.get_submodule(site.name)
        pruned = sorted(set(range(site.hidden)) - set(kept))
        if not pruned:
            return
        expected = _masked_output(self.model, site, pruned) if site.exact else None
        before = dict(mlp.named_parameters())
        _group(mlp, site, pruned).prune()
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(before[name].requires_grad)
        for norm in mlp.modules():  # torch-pruning does not update this attribute of every RMSNorm
            if hasattr(norm, "normalized_shape") and isinstance(norm.weight, Tensor):
                norm.normalized_shape = tuple(norm.weight.shape)  # type: ignore[assignment]

        widths = {path: self.model.get_submodule(path).out_features for path in site.producers}
        widths[site.consumer] = self.model.get_submodule(site.consumer).in_features
        planned = {path: len(kept) * (2 if site.fused and path != site.consumer else 1) for path in widths}
        if widths != planned:
            raise DgmrError(
                f"torch-pruning left {widths} at site {site.name}, and the plan says {planned}. This MLP cannot be "
                "pruned."
            )
        for name, parameter in mlp.named_parameters():
            if parameter.is_meta:
                continue
            if not torch.equal(parameter, _kept_part(before[name], parameter.shape, site.hidden, kept)):
                raise DgmrError(
                    f"torch-pruning kept other neurons in {name} of site {site.name} than planned. This MLP cannot be "
                    "pruned."
                )
        if expected is not None and not expected.is_meta:
            output = _output(self.model, site, {})
            if (output - expected).abs().max() > OUTPUT_TOLERANCE * expected.abs().max():
                raise DgmrError(
                    f"the pruned MLP {site.name} does not compute what the kept neurons compute. This MLP cannot be "
                    "pruned."
                )


def _check_untied(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise DgmrError if a parameter of a site is also a parameter of another layer. Cutting would separate the two."""
    names: dict[int, str] = {}
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            full_name = f"{path}.{name}" if path else name
            first_name = names.setdefault(id(parameter), full_name)
            tied = [n for n in (first_name, full_name) if any(n.startswith(f"{site.name}.") for site in sites)]
            if first_name != full_name and tied:
                raise DgmrError(
                    f"{first_name} and {full_name} are one tensor, which pruning would separate. Give each layer its "
                    "own copy first."
                )


def cut_sites(model: nn.Module, sites: Sequence[Site], kept: Mapping[str, Sequence[int]]) -> None:
    """Prune ``sites`` of ``model`` in place to the neurons ``kept``, by site name, without comparing weight hashes."""
    planned = {site.name: SitePlan(site.width, site.hidden, tuple(kept[site.name]), "") for site in sites}
    MLPPruner(model, sites=sites, weight_hashes=dict.fromkeys(planned, "")).apply(Plan("", "", planned))


def resize(tower: nn.Module, hidden: Mapping[str, int]) -> None:
    """Narrow every site of ``tower`` to its width in ``hidden``, by site name. Use it before pruned weights are loaded.

    Sites that ``hidden`` does not name, or for which it is not smaller, stay as they are.
    """
    sites = [site for site in find_sites(tower) if site.hidden > hidden.get(site.name, site.hidden)]
    cut_sites(tower, sites, {site.name: range(hidden[site.name]) for site in sites})


def _kept_part(before: Tensor, shape: torch.Size, hidden: int, kept: tuple[int, ...]) -> Tensor:
    """Select the neurons ``kept`` in every dimension of ``before`` that differs from ``shape``.

    A dimension of twice ``hidden`` is a fused gate. The neurons are then selected in both halves.
    """
    index = torch.tensor(kept, device=before.device)
    for dim, width in enumerate(before.shape):
        if width != shape[dim]:
            before = before.index_select(dim, torch.cat([index + offset for offset in range(0, width, hidden)]))
    return before


def _highest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Return the indices of the ``count`` highest scores, ascending. Of equal scores, the first ones are taken."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def _group(mlp: nn.Module, site: Site, neurons: range | list[int]) -> tp.Group:
    group = hidden_group(mlp, site.relative_to(site.name).producers[0], neurons)
    if group is None:
        raise DgmrError(f"site {site.name} can no longer be traced. Do not change the MLP after find_sites.")
    return group


def _masked_output(model: nn.Module, site: Site, pruned: list[int]) -> Tensor:
    """Return the MLP's output while the consumer's columns of the neurons ``pruned`` are zero."""
    weight = model.get_submodule(site.consumer).weight.detach().float().clone()
    weight[:, pruned] = 0
    return _output(model, site, {f"{site.relative_to(site.name).consumer}.weight": weight})


def _output(model: nn.Module, site: Site, replacements: dict[str, Tensor]) -> Tensor:
    """Return the MLP's output ``[8, width]`` on fixed random tokens in float32 and eval mode.

    ``replacements`` are parameters by name that take the place of the MLP's own.
    """
    mlp = model.get_submodule(site.name)
    parameters = {name: parameter.detach().float() for name, parameter in mlp.named_parameters()}
    device = next(iter(parameters.values())).device
    tokens = torch.randn(8, site.width, generator=torch.Generator().manual_seed(0)).to(device)
    with evaluating(mlp), torch.no_grad():
        return torch.func.functional_call(mlp, {**parameters, **replacements}, (tokens,))
