"""Deciding what stays: criteria by name, rankings that serve any size, and plans. Changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dgmr_tp.encoders import OpenedModel, adapt
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import (
    Amount,
    DGMRImportance,
    GivenScores,
    MLPPruner,
    Plan,
    Ranking,
    Site,
    SitePlan,
    TowerAdapter,
    find_sites,
    rank_tower,
)
from dgmr_tp.pruning.allocation import check_budget, fitted_widths, keep_counts
from dgmr_tp.pruning.amp import (
    TEMPERATURE,
    Objective,
    SearchState,
    entropy,
    gate_scores,
    search_widths,
    weight_gradients,
)
from dgmr_tp.pruning.cost import Cost, costs
from dgmr_tp.pruning.latency import widths_for_latency
from dgmr_tp.pruning.plan import weight_sha256
from dgmr_tp.utils.distributed import broadcast_from_main, is_main_process
from dgmr_tp.utils.files import write_whole
from dgmr_tp.utils.progress import report_progress

CRITERIA: dict[str, Callable[[], tp.importance.Importance]] = {
    "dgmr": DGMRImportance,
    "l2": lambda: tp.importance.MagnitudeImportance(p=2),
    "l1": lambda: tp.importance.MagnitudeImportance(p=1),
    "random": tp.importance.RandomImportance,
}
SEEING = ("output", "activation")
"""Criteria that look at calibration images; see dgmr_tp.pruning.output_selection."""
DIFFERENTIATING = ("taylor", "amp")
"""Criteria that look at gradients of AMP's entropy on images: torch-pruning's over weights, the paper's over hidden neurons."""
CANDIDATES = 512
"""Images whose similarities make one entropy: EVA-CLIP's number in AMP's paper; 1,024 for the others."""


@dataclass(frozen=True)
class Rankings:
    """The neurons of every MLP of an encoder in greedy order, with error curves: made once, it serves any size at once."""

    encoder: str
    criterion: str
    sites: dict[str, Ranking]
    sha256: dict[str, str]
    """Of each site's first Linear: the rankings fit this checkpoint and no other."""

    def plan(self, model: OpenedModel | nn.Module, **amount: Unpack[Amount]) -> Plan:
        """A plan of any size; with a ``budget`` every MLP gets the width that suits it (see :func:`fitted_widths`).

        Args:
            model: the encoder that was ranked; without weights (``open_model(…, weights="none")``) it takes no time.
            amount: see :func:`keep_counts`. Default: ``mlp_ratio=1``.

        Raises:
            DgmrError: another encoder was ranked, or the amount is impossible.
        """
        tower = tower_of(model)
        sites = block_sites(model) or find_sites(tower)
        for site in sites:
            ranked, found = self.sites.get(site.name), weight_sha256(tower, site)
            if (
                ranked is None
                or len(ranked.order) != site.hidden
                or (found != self.sha256[site.name] and not found.startswith("meta"))
            ):
                raise DgmrError(
                    f"the rankings were made for another encoder or checkpoint than {self.encoder}: {site.name} differs"
                )
        if budget := amount.get("budget"):
            if len(given := asked(amount)) > 1:
                raise DgmrError(f"give exactly one of {', '.join(given)}")
            size = model.image_size if isinstance(model, OpenedModel) else None
            loss = {name: (ranking.sensitivity * ranking.error).numpy() for name, ranking in self.sites.items()}
            known, round_to = costs(tower, sites, size), amount.get("round_to", 1)

            def fit(time: Cost | None = None) -> dict[str, int]:
                return fitted_widths(
                    sites, loss, budget=budget, costs=known | ({"latency": time} if time else {}), round_to=round_to
                )

            if "latency" not in budget:
                keep = fit()
            elif size is None:
                raise DgmrError("a budget of latency needs the image size: open the tower with open_model")
            else:
                keep = widths_for_latency(budget["latency"], fit, tower, sites, size, round_to)
        else:
            keep = keep_counts(sites, **_or_default(amount))
        decided = {}
        for site in sites:
            kept = sorted(self.sites[site.name].order[: keep[site.name]].tolist())
            decided[site.name] = SitePlan(site.width, site.hidden, tuple(kept), self.sha256[site.name])
        return Plan(self.encoder, self.criterion, decided)

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        sites = {
            name: {"sensitivity": ranking.sensitivity, "sha256": self.sha256[name]}
            for name, ranking in self.sites.items()
        }
        note = json.dumps({"encoder": self.encoder, "criterion": self.criterion, "sites": sites})
        tensors = {
            f"{name}.{part}": getattr(ranking, part)
            for name, ranking in self.sites.items()
            for part in ("order", "error")
        }
        aside = path.with_name(f".{path.name}.partial")
        safetensors.torch.save_file(tensors, aside, {"rankings": note})
        os.replace(aside, path)

    @classmethod
    def read(cls, path: Path) -> Rankings:
        """Inverse of :meth:`save`.

        Raises:
            DgmrError: the file is none of these.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["rankings"])
                sites = {
                    name: Ranking(
                        file.get_tensor(f"{name}.order"), file.get_tensor(f"{name}.error"), site["sensitivity"]
                    )
                    for name, site in note["sites"].items()
                }
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise DgmrError(f"cannot read the rankings {path}: {error}; make them with dgmr-tp rank") from error
        return cls(
            note["encoder"], note["criterion"], sites, {name: site["sha256"] for name, site in note["sites"].items()}
        )


def rank(
    model: OpenedModel | nn.Module,
    criterion: str = "output",
    images: str | Path | Iterable[Tensor] | None = None,
    *,
    calibration: int = 1024,
    seed: int = 0,
    picks: Mapping[str, int] | None = None,
) -> Rankings:
    """Rank all neurons of an encoder by what they do on images; the order serves plans of any size.

    Args:
        model: the original; unchanged.
        criterion: ``output`` or ``activation``; see :func:`dgmr_tp.pruning.output_selection.rank_neurons`.
        images, calibration, seed: as for :func:`dgmr_tp.prune`.
        picks: by site name, how many neurons have to be ordered; then nothing is measured for budgets. Default: all.

    Raises:
        DgmrError: bad input; says what and what to do.
    """
    if criterion not in SEEING:
        raise DgmrError(f"criterion {criterion} needs no ranking; those that look at images are {', '.join(SEEING)}")
    if images is None:
        raise DgmrError(
            f"criterion {criterion} looks at calibration images: give some (on the command line --images or --recover)"
        )
    adapter = encoder_of(model)
    found = rank_tower(
        adapter,
        batches(images, model, calibration, seed),
        by=criterion,
        picks=picks,
    )
    sites = {site.name: site for site in find_sites(adapter.tower)}
    return Rankings(adapter.name, criterion, found, {name: weight_sha256(adapter.tower, sites[name]) for name in found})


def make_plan(
    model: OpenedModel | nn.Module,
    criterion: str | tp.importance.Importance = "dgmr",
    images: str | Path | Iterable[Tensor] | None = None,
    *,
    calibration: int = 1024,
    seed: int = 0,
    done: Plan | None = None,
    remember: Callable[[Plan], None] = lambda plan: None,
    **amount: Unpack[Amount],
) -> Plan:
    """Decide what :func:`dgmr_tp.prune` would cut, and change nothing; same arguments, same errors.

    Args:
        done: decisions of an earlier call with the same arguments; they are taken over where the weights are the same.
        remember: called with all decisions so far after each.
    """
    name, size = (model.name, model.image_size) if isinstance(model, OpenedModel) else (None, None)
    tower, sites = tower_of(model), block_sites(model)
    if isinstance(criterion, str) and criterion in SEEING:
        # Only a budget needs the whole curves.
        check_amount(model, **amount)
        picks = None if amount.get("budget") else keep_counts(sites or find_sites(tower), **_or_default(amount))
        return rank(model, criterion, images, calibration=calibration, seed=seed, picks=picks).plan(model, **amount)
    with ExitStack() as stack:
        if isinstance(criterion, str) and criterion in DIFFERENTIATING:
            if not amount.get("budget"):
                check_amount(model, **amount)
            groups = candidate_groups(criterion, images, model, calibration, seed, CANDIDATES, at_least=False)
            if criterion == "amp":
                rule: tp.importance.Importance = GivenScores(tower, gate_scores(encoder_of(model), groups), "amp")
            else:
                rule = tp.importance.TaylorImportance()
                stack.enter_context(weight_gradients(encoder_of(model), groups))
        else:
            rule = importance(criterion)
        pruner = MLPPruner(tower, rule, sites=sites, name=name, image_size=size, **_or_default(amount))
        decided: dict[str, SitePlan] = {}
        for index, site in enumerate(pruner.sites):
            old = done.sites.get(site.name) if done else None
            if old and old.sha256 == weight_sha256(pruner.model, site):
                decided[site.name] = old
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))
                    decided[site.name] = pruner.decide(site)
            remember(pruner.plan_of(decided))
            report_progress("select", len(decided), len(pruner.sites))
    return pruner.plan_of(decided)


def check_amount(model: OpenedModel | nn.Module, **amount: Unpack[Amount]) -> None:
    """Raises DgmrError if an encoder, perhaps one without weights, cannot be cut to this; a budget's latency is not looked at."""
    sites, budget = block_sites(model) or find_sites(tower_of(model)), amount.get("budget")
    if not budget or len(asked(amount)) > 1:
        keep_counts(sites, **_or_default(amount))
        return
    size = model.image_size if isinstance(model, OpenedModel) else None
    counted = {key: limit for key, limit in budget.items() if key != "latency"}
    check_budget(sites, counted, costs(tower_of(model), sites, size), amount.get("round_to", 1))


class Found(NamedTuple):
    """What :func:`search` returns."""

    plan: Plan
    entropy: float
    """Of the pruned encoder on the search images, nats; the value of another objective, if one was given."""
    image_blocks: int
    """Images times blocks that were evaluated, the scoring's forward passes left out."""


def search(
    model: OpenedModel | nn.Module,
    images: str | Path | Iterable[Tensor],
    *,
    threshold: float,
    two_sided: bool = False,
    temperature: float = TEMPERATURE,
    candidates: int = CANDIDATES,
    calibration: int = 4096,
    seed: int = 0,
    objective: Objective | None = None,
    journal: Path | None = None,
) -> Found:
    """AMP: every MLP's width by binary search on a label-free entropy (see :mod:`dgmr_tp.pruning.amp`). Changes nothing.

    Under torch.distributed the groups of candidates are shared out; every process returns the same, and only the first writes.

    Args:
        model: the original; its MLPs are cut during the search and whole again behind it.
        images: unlabelled images, apart from those the result will be judged by.
        threshold: how much each site may raise the entropy, nats (the paper: 0.01, 2e-4, 2e-3, 0.02).
        two_sided: a fall of the entropy counts too; the paper lets it pass.
        temperature: of the similarities.
        candidates: images of one entropy; the entropy, and so the meaning of ``threshold``, depends on it.
        calibration: how many images are read, in whole groups of ``candidates``.
        seed: of the choice of images.
        objective: instead of the entropy, such as :func:`dgmr_tp.pruning.amp.contrastive` of the images' captions.
        journal: a file that keeps what was decided; a search that was interrupted goes on from it.

    Raises:
        DgmrError: fewer images than ``candidates``, or no walk is known for the model.
    """
    adapter, objective = encoder_of(model), objective or entropy(temperature)
    groups = candidate_groups("amp", images, model, calibration, seed, candidates, at_least=True)
    sites = {site.name: site for site in block_sites(model) or ()}
    sha = {name: weight_sha256(adapter.tower, site) for name, site in sites.items()}
    test = {"threshold": threshold, "two_sided": two_sided}
    options = {**test, "temperature": temperature, "candidates": candidates, "images": calibration, "seed": seed}
    seen = [float(batch.double().sum()) for group in groups for batch in group]
    request = {**options, "encoder": adapter.name, "weights": sha, "seen": seen, "objective": objective.__qualname__}

    def remember(state: SearchState) -> None:
        if journal and is_main_process():
            write_whole(journal, json.dumps({"request": request, "state": asdict(state)}))

    # Only the main process's disk may hold the journal.
    state = broadcast_from_main(lambda: _read_search(journal, request))
    scores = gate_scores(adapter, groups, objective)
    whole = {name: adapter.tower.get_submodule(name) for name in sites}
    try:  # not on a copy: there may be no room for a second tower
        end = search_widths(
            adapter,
            scores,
            groups,
            **test,
            objective=objective,
            state=state,
            remember=remember,
        )
    finally:
        for name, mlp in whole.items():
            adapter.tower.set_submodule(name, mlp)
    assert end.baseline is not None
    decided = {name: SitePlan(site.width, site.hidden, end.kept[name], sha[name]) for name, site in sites.items()}
    return Found(Plan(adapter.name, "amp", decided), end.baseline, end.image_blocks)


def _read_search(path: Path | None, request: dict[str, object]) -> SearchState | None:
    try:
        found = json.loads(path.read_text()) if path else None
        if not found or found["request"] != json.loads(json.dumps(request)):
            return None
        kept = {name: tuple(neurons) for name, neurons in found["state"]["kept"].items()}
        return SearchState(**{**found["state"], "kept": kept})
    except (OSError, ValueError, KeyError, TypeError):  # the first time, or a damaged one
        return None


def candidate_groups(
    criterion: str,
    images: str | Path | Iterable[Tensor] | None,
    model: OpenedModel | nn.Module,
    count: int,
    seed: int,
    candidates: int,
    *,
    at_least: bool,
) -> list[list[Tensor]]:
    """Whole groups of ``candidates`` images, in batches; what is left over is dropped.

    Raises:
        DgmrError: no images, or not one whole group; unless ``at_least`` is False: then all of them are one group.
    """
    if images is None:
        raise DgmrError(
            f"criterion {criterion} looks at calibration images: give some (on the command line --images or --recover)"
        )
    found = list(batches(images, model, count, seed))
    total = sum(map(len, found))
    if total < candidates and (at_least or not total):
        raise DgmrError(
            f"{criterion} compares groups of {candidates} images, got {total}; give more images or fewer candidates"
        )
    candidates = min(candidates, total)
    size = min(candidates, len(found[0]))
    joined = torch.cat(found)
    return [list(group.split(size)) for group in joined[: total - total % candidates].split(candidates)]


def importance(criterion: str | tp.importance.Importance) -> tp.importance.Importance:
    """A criterion by name, or as it is.

    Raises:
        DgmrError: the name is unknown.
    """
    if not isinstance(criterion, str):
        return criterion
    if criterion not in CRITERIA:
        raise DgmrError(f"unknown criterion {criterion!r}; known: {', '.join((*CRITERIA, *SEEING, *DIFFERENTIATING))}")
    return CRITERIA[criterion]()


def asked(amount: Amount) -> list[str]:
    """Which of the ways to say how many neurons stay were used."""
    return [key for key, value in amount.items() if key != "round_to" and value is not None]


def _or_default(amount: Amount) -> Amount:
    return amount if asked(amount) else {**amount, "mlp_ratio": 1}


def tower_of(model: OpenedModel | nn.Module) -> nn.Module:
    return model.tower if isinstance(model, OpenedModel) else model


def encoder_of(model: OpenedModel | nn.Module) -> TowerAdapter:
    """The walk over a model's blocks.

    Raises:
        DgmrError: it has none.
    """
    return model.adapter if isinstance(model, OpenedModel) else adapt(model)


def block_sites(model: OpenedModel | nn.Module) -> list[Site] | None:
    """The sites inside residual blocks, where a walk is known: heads with an MLP of their own are not the papers' matter."""
    try:
        adapter = encoder_of(model)
    except DgmrError:
        return None
    sites = adapter.sites
    if not sites:
        raise DgmrError(
            f"no block of {adapter.name} holds an MLP that can be cut by itself; is its projection shared with attention?"
        )
    return sites


def batches(
    images: str | Path | Iterable[Tensor], model: OpenedModel | nn.Module, count: int, seed: int
) -> Iterator[Tensor]:
    """Preprocessed batches on the model's device and in its dtype."""
    like = next(tower_of(model).parameters())
    found = images
    if isinstance(images, str | Path):
        from dgmr_tp.data.streams import find_images

        if not isinstance(model, OpenedModel):
            raise DgmrError(
                "a folder of images needs the encoder's preprocessing: open it with open_model, or pass preprocessed batches"
            )
        found = find_images(images).sample(count, seed, model.preprocess)
    return (_batch(batch).to(like.device, like.dtype) for batch in found)  # type: ignore[union-attr]


def _batch(given: Any) -> Tensor:
    if isinstance(given, Tensor) and given.ndim == 4:
        return given
    kind = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
    raise DgmrError(
        f"a batch of images is a tensor [batch, 3, height, width], this is {kind}; leave out labels, and put a lone batch into a list"
    )
