"""Rankings: the neurons of every MLP in greedy order, made once on calibration images and used for any size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Unpack

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.criteria import ActivationCriterion, criterion_named, names_needing
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Amount, Plan, Ranking, SitePlan, rank_tower
from dgmr_tp.pruning.allocation import fitted_widths, keep_counts, with_default_amount
from dgmr_tp.pruning.cost import Cost, costs
from dgmr_tp.pruning.latency import widths_for_latency
from dgmr_tp.utils.files import staging_file


@dataclass(frozen=True)
class Rankings:
    """The neurons of every MLP of a model in greedy order, with the error at every width."""

    encoder: str
    """Name of the model."""
    criterion: str
    sites: dict[str, Ranking]
    sha256: dict[str, str]
    """Hash of each site's first Linear. Rankings apply to this checkpoint only."""

    def plan(self, model: OpenedModel, **amount: Unpack[Amount]) -> Plan:
        """Make a plan of any size. With a ``budget``, every MLP gets the width that fits it (:func:`fitted_widths`).

        Args:
            model: the model that was ranked. Opened without weights (``open_model(…, weights="none")``) it is free.
            amount: see :func:`keep_counts`. Default: ``mlp_ratio=1``.

        Raises:
            DgmrError: another model was ranked, or the amount is impossible.
        """
        self._check(model)
        amount = with_default_amount(amount)
        keep = self._fitted(model, amount) if amount.get("budget") else keep_counts(model.sites, **amount)
        decided = {}
        for site in model.sites:
            kept = sorted(self.sites[site.name].order[: keep[site.name]].tolist())
            decided[site.name] = SitePlan(site.width, site.hidden, tuple(kept), self.sha256[site.name])
        return Plan(self.encoder, self.criterion, decided)

    def _check(self, model: OpenedModel) -> None:
        for site in model.sites:
            ranking, weight_hash = self.sites.get(site.name), model.weight_hashes[site.name]
            same_weights = weight_hash.startswith("meta") or weight_hash == self.sha256.get(site.name)
            if ranking is None or len(ranking.order) != site.hidden or not same_weights:
                raise DgmrError(
                    f"the rankings were made for another encoder or checkpoint than {self.encoder}: {site.name} "
                    "differs. Rank this one with dgmr-tp rank."
                )

    def _fitted(self, model: OpenedModel, amount: Amount) -> dict[str, int]:
        """Fit the width of every MLP to a budget."""
        budget, round_to = amount["budget"], amount.get("round_to", 1)
        assert budget is not None
        loss = {name: (ranking.sensitivity * ranking.error).numpy() for name, ranking in self.sites.items()}
        tower_costs = costs(model.tower, model.sites, model.image_size)

        def fit(time: Cost | None = None) -> dict[str, int]:
            all_costs = tower_costs | ({"latency": time} if time else {})
            return fitted_widths(model.sites, loss, budget=budget, costs=all_costs, round_to=round_to)

        if "latency" not in budget:
            return fit()
        if model.image_size is None:
            raise DgmrError("a budget of latency needs the image size. Open the tower with open_model.")
        with model.running():
            return widths_for_latency(budget["latency"], fit, model.tower, model.sites, model.image_size, round_to)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically. An existing file is replaced."""
        sites = {
            name: {"sensitivity": ranking.sensitivity, "sha256": self.sha256[name]}
            for name, ranking in self.sites.items()
        }
        note = json.dumps({"encoder": self.encoder, "criterion": self.criterion, "sites": sites})
        tensors: dict[str, Tensor] = {}
        for name, ranking in self.sites.items():
            tensors |= {f"{name}.order": ranking.order, f"{name}.error": ranking.error}
        with staging_file(Path(path), replace=True) as staging:
            safetensors.torch.save_file(tensors, staging, {"rankings": note})
            staging.chmod(0o644)  # safetensors writes files that only their owner can read

    @classmethod
    def read(cls, path: Path) -> Rankings:
        """Read a file written by :meth:`save`.

        Raises:
            DgmrError: the file cannot be read or holds something else.
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
                hashes = {name: site["sha256"] for name, site in note["sites"].items()}
                encoder, criterion = note["encoder"], note["criterion"]
            for name, ranking in sites.items():
                if sorted(ranking.order.tolist()) != list(range(len(ranking.order))):
                    raise ValueError(f"the order of {name} is not a permutation of its neurons")
                if not ranking.error.isfinite().all() or not isfinite(ranking.sensitivity):
                    raise ValueError(f"an error of {name} is not finite")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise DgmrError(f"cannot read the rankings {path}: {error}. Make them with dgmr-tp rank.") from error
        return cls(encoder, criterion, sites, hashes)


def rank(
    model: OpenedModel,
    criterion: str,
    images: CalibrationImages | None,
    *,
    picks: Mapping[str, int] | None = None,
) -> Rankings:
    """Rank all neurons of a model by their activations on images. The order serves plans of any size.

    Args:
        model: the dense model; unchanged.
        criterion: one that needs activations; see :func:`dgmr_tp.pruning.output_selection.rank_neurons`.
        images: the calibration images.
        picks: by site name, how many neurons are ordered. Sensitivities, which budgets need, are then not measured.
            Default: all neurons.

    Raises:
        DgmrError: the criterion needs no ranking, or there are no images.
    """
    rule = criterion_named(criterion)
    if not isinstance(rule, ActivationCriterion):
        raise DgmrError(
            f"criterion {criterion} needs no ranking. Those that rank on images are "
            f"{', '.join(names_needing('activations'))}."
        )
    require_images(criterion, images)
    assert images is not None
    with model.running():
        sites = rank_tower(model.adapter, images.on(model), by=rule.rule, picks=picks)
    return Rankings(model.name, criterion, sites, {name: model.weight_hashes[name] for name in sites})


def require_images(criterion: str, images: CalibrationImages | None) -> None:
    """Raise DgmrError if a criterion that needs calibration images has none."""
    if images is None or not len(images):
        raise DgmrError(
            f"criterion {criterion} looks at calibration images, got none. Give some with --images or --recover."
        )
