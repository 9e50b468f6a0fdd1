"""The MLP pruner: decides a plan with any torch-pruning importance and applies it through torch-pruning's groups."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.allocation import Amount, keep_counts
from dgmr_tp.pruning.cost import costs
from dgmr_tp.pruning.importance import DGMRImportance, GivenScores
from dgmr_tp.pruning.plan import Plan, SitePlan, weight_sha256
from dgmr_tp.pruning.sites import Site, find_sites, hidden_group
from dgmr_tp.utils.modules import evaluating
from dgmr_tp.utils.progress import report_progress


class MLPPruner:
    """Cuts hidden neurons out of a model's MLPs; attention, norms, the residual width and the outputs keep their shapes.

    ::

        pruner = MLPPruner(model.visual, mlp_ratio=1)
        plan = pruner.plan()      # decides, changes nothing
        print(plan)
        pruner.apply(plan)        # cuts, verifies

    Args:
        model: the tower; frozen, bf16 and fp16 weights are fine. It is pruned in place.
        importance: any torch-pruning importance. Default: :class:`DGMRImportance`.
        sites: which MLPs. Default: all that :func:`find_sites` finds.
        name: what the plan calls the encoder.
        image_size: height and width of the images, for a budget of ``flops``.
        amount: how many neurons stay: ``mlp_ratio``, ``keep_ratio``, ``keep`` or ``budget``, and ``round_to`` (see
            :func:`keep_counts`); none of them if a plan is only to be applied.

    Raises:
        DgmrError: no MLP was found, or a keep count is impossible.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: tp.importance.Importance | None = None,
        *,
        sites: Sequence[Site] | None = None,
        name: str | None = None,
        image_size: int | None = None,
        **amount: Unpack[Amount],
    ) -> None:
        self.model = model
        self.importance = importance or DGMRImportance()
        self.sites = list(sites) if sites is not None else find_sites(model)
        known = costs(model, self.sites, image_size) if amount.get("budget") else None
        self.keep = keep_counts(self.sites, **amount, costs=known) if amount else None
        self.name = name or type(model).__name__

    def plan(self) -> Plan:
        """Score every site and choose what stays. Changes nothing.

        Raises:
            DgmrError: the importance gives no score, a non-finite one, or the wrong number of them.
        """
        if self.keep is None:
            raise DgmrError("nothing says how many neurons stay: give MLPPruner mlp_ratio, keep_ratio, keep or budget")
        decided = {}
        for site in self.sites:
            decided[site.name] = self.decide(site)
            report_progress("select", len(decided), len(self.sites))
        return self.plan_of(decided)

    def plan_of(self, decided: dict[str, SitePlan]) -> Plan:
        """A plan of these decisions under the pruner's name and criterion."""
        criterion = getattr(self.importance, "name", type(self.importance).__name__.removesuffix("Importance"))
        return Plan(self.name, criterion, decided)

    def decide(self, site: Site) -> SitePlan:
        """What stays of one site."""
        assert self.keep is not None
        count = self.keep[site.name]
        kept = _best(self.scores(site), count) if count < site.hidden else tuple(range(count))
        return SitePlan(site.width, site.hidden, kept, weight_sha256(self.model, site))

    def scores(self, site: Site) -> Tensor:
        """The importance's scores of the site's hidden neurons, ``[hidden]``, higher is kept."""
        rows = site.hidden * (2 if site.fused else 1)
        mlp = self.model.get_submodule(site.name)
        given = isinstance(self.importance, GivenScores)  # which knows the layers themselves, and computes nothing
        if not given and next(mlp.parameters()).dtype in (
            torch.bfloat16,
            torch.float16,
        ):  # sums of thousands of squares need more digits
            gradients = [
                None if p.grad is None else p.grad.float() for p in mlp.parameters()
            ]  # of criteria that read them
            mlp = copy.deepcopy(mlp).float()
            for parameter, gradient in zip(mlp.parameters(), gradients, strict=True):
                parameter.grad = gradient
        group = _group(mlp, site, range(rows))
        try:
            # Ours need not order the neurons that go; torch-pruning's own take no such hint.
            hint = {"picks": self.keep[site.name]} if self.keep and isinstance(self.importance, DGMRImportance) else {}
            with torch.no_grad():
                scores = self.importance(group, **hint)
        except ValueError as error:
            raise DgmrError(f"{type(self.importance).__name__} cannot score site {site.name}: {error}") from error
        if scores is None or scores.shape != (rows,) or not torch.isfinite(scores).all():
            got = (
                "no scores"
                if scores is None
                else f"scores of shape {tuple(scores.shape)}, finite: {bool(torch.isfinite(scores).all())}"
            )
            raise DgmrError(
                f"{type(self.importance).__name__} gave {got} for site {site.name}; {rows} finite ones are needed"
            )
        return scores.view(-1, site.hidden).mean(0)  # as torch-pruning does with coupled channels

    def apply(self, plan: Plan) -> nn.Module:
        """Cut the model down to ``plan`` in place and return it.

        The whole plan is checked before the first cut. After each cut the widths and every weight are compared with the
        plan, and the MLP's output on random tokens with the output of the original whose dropped columns are zero (where no
        norm over the hidden neurons sits inside). ``requires_grad`` and train/eval mode come back as they were.

        Raises:
            DgmrError: the plan does not fit, or a pruned MLP is not what the plan says.
        """
        plan.check(self.model, self.sites)
        for site in self.sites:
            if site.name in plan.sites:
                self._cut(site, plan.sites[site.name].kept)
        return self.model

    def _cut(self, site: Site, kept: tuple[int, ...]) -> None:
        mlp = self.model.get_submodule(site.name)
        drop = sorted(set(range(site.hidden)) - set(kept))
        if not drop:
            return
        expected = _masked_output(self.model, site, drop) if site.exact else None
        before = dict(mlp.named_parameters())
        _group(mlp, site, drop).prune()
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(before[name].requires_grad)
        for norm in mlp.modules():  # torch-pruning does not know every RMSNorm's attribute
            if hasattr(norm, "normalized_shape") and isinstance(norm.weight, Tensor):
                norm.normalized_shape = tuple(norm.weight.shape)  # type: ignore[assignment]

        widths = {path: self.model.get_submodule(path).out_features for path in site.producers}
        widths[site.consumer] = self.model.get_submodule(site.consumer).in_features
        planned = {path: len(kept) * (2 if site.fused and path != site.consumer else 1) for path in widths}
        if widths != planned:
            raise DgmrError(
                f"torch-pruning left {widths} at site {site.name}, planned {planned}; this MLP cannot be pruned"
            )
        for name, parameter in mlp.named_parameters():
            if not parameter.is_meta and not torch.equal(
                parameter, _kept_part(before[name], parameter.shape, site.hidden, kept)
            ):
                raise DgmrError(
                    f"torch-pruning kept other neurons in {name} of site {site.name} than planned; this MLP cannot be pruned"
                )
        if expected is not None and not expected.is_meta:
            got = _output(self.model, site, {})
            if (got - expected).abs().max() > 1e-4 * expected.abs().max():
                raise DgmrError(
                    f"the pruned MLP {site.name} does not compute what the kept neurons compute; this MLP cannot be pruned"
                )


def resize(tower: nn.Module, hidden: Mapping[str, int]) -> None:
    """Cut every site of ``tower`` to its width in ``hidden``, whichever neurons: the weights are loaded afterwards."""
    sites = [site for site in find_sites(tower) if site.hidden > hidden.get(site.name, site.hidden)]
    planned = {
        site.name: SitePlan(site.width, site.hidden, tuple(range(hidden[site.name])), weight_sha256(tower, site))
        for site in sites
    }
    MLPPruner(tower, sites=sites).apply(Plan("", "", planned))


def _kept_part(before: Tensor, shape: torch.Size, hidden: int, kept: tuple[int, ...]) -> Tensor:
    """``before``, where it changed its shape, cut to the neurons ``kept``: in both halves of a fused gate alike."""
    index = torch.tensor(kept, device=before.device)
    for dim, width in enumerate(before.shape):
        if width != shape[dim]:
            before = before.index_select(dim, torch.cat([index + half for half in range(0, width, hidden)]))
    return before


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:count].tolist()))


def _group(mlp: nn.Module, site: Site, neurons: range | list[int]) -> tp.Group:
    producer = site.producers[0].removeprefix(f"{site.name}.") if site.name else site.producers[0]
    group = hidden_group(mlp, producer, neurons)
    if group is None:
        raise DgmrError(f"site {site.name} cannot be traced any more; it was changed after find_sites")
    return group


def _masked_output(model: nn.Module, site: Site, drop: list[int]) -> Tensor:
    weight = model.get_submodule(site.consumer).weight.detach().float().clone()
    weight[:, drop] = 0
    inside = site.consumer.removeprefix(f"{site.name}.") if site.name else site.consumer
    return _output(model, site, {f"{inside}.weight": weight})


def _output(model: nn.Module, site: Site, replaced: dict[str, Tensor]) -> Tensor:
    """The MLP's output on fixed random tokens in float32, eval mode, with some of its parameters replaced."""
    mlp = model.get_submodule(site.name)
    parameters = {name: parameter.detach().float() for name, parameter in mlp.named_parameters()}
    device = next(iter(parameters.values())).device
    tokens = torch.randn(8, site.width, generator=torch.Generator().manual_seed(0)).to(device)
    with evaluating(mlp), torch.no_grad():
        return torch.func.functional_call(mlp, {**parameters, **replaced}, (tokens,))
