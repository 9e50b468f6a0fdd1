"""AMP's search on a model: the width of every MLP by binary search on a label-free entropy (arXiv 2603.08100)."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from dgmr_tp.compression.calibration import CalibrationImages
from dgmr_tp.compression.planning import ENTROPY_GROUP_SIZE
from dgmr_tp.encoders import OpenedModel
from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning import Plan, SitePlan
from dgmr_tp.pruning.amp import TEMPERATURE, Objective, SearchState, entropy, gate_scores, search_widths
from dgmr_tp.utils.config import Config
from dgmr_tp.utils.distributed import broadcast_from_main, is_main_process
from dgmr_tp.utils.files import atomic_write, read_json, to_json


class SearchConfig(Config):
    """AMP's search for widths; see :func:`dgmr_tp.compression.amp_search.search`."""

    images: int = Field(4096, ge=2)
    """Number of images, in whole groups of ``candidates``."""
    candidates: int = Field(ENTROPY_GROUP_SIZE, ge=2)
    """Group size for the entropy. The meaning of the threshold depends on it."""
    temperature: float = Field(TEMPERATURE, gt=0)
    """Temperature of the softmax over the candidates' similarities."""
    two_sided: bool = False
    """Also reject widths at which the entropy falls by more than the threshold. The paper accepts any fall."""

    @model_validator(mode="after")
    def _at_least_one_group(self) -> SearchConfig:
        if self.images < self.candidates:
            raise ValueError(f"images = {self.images} make no group of candidates = {self.candidates}")
        return self


class SearchResult(NamedTuple):
    """Result of :func:`search`."""

    plan: Plan
    entropy: float
    """Entropy of the pruned model on the search images in nats, or the value of another objective."""
    image_blocks: int
    """Images times blocks evaluated by the search, without the forward passes of the scores."""


def search(
    model: OpenedModel,
    images: CalibrationImages,
    *,
    threshold: float,
    config: SearchConfig | None = None,
    objective: Objective | None = None,
    journal: Path | None = None,
    seed: int = 0,
) -> SearchResult:
    """Find the width of every MLP by AMP's binary search; see :mod:`dgmr_tp.pruning.amp`.

    Under ``torch.distributed`` the processes share the groups. Every process returns the same result, and only the main
    process writes the journal.

    Args:
        model: the dense model. Its MLPs are cut during the search and restored afterwards.
        images: unlabeled images, distinct from those that the result is evaluated on.
        threshold: the largest rise of the entropy per site in nats (the paper uses 0.01, 2e-4, 2e-3 and 0.02).
        config: group size, temperature and test. ``images`` in it is only recorded in the journal.
        objective: replaces the entropy, for example :func:`dgmr_tp.pruning.amp.contrastive` with captions.
        journal: a file that records the decisions. An interrupted search resumes from it.
        seed: recorded in the journal, as the seed that drew the images.

    Raises:
        DgmrError: fewer images than one group has, or no adapter is known for the model.
    """
    if not isfinite(threshold):
        raise DgmrError(
            f"threshold = {threshold} is not a finite number. Give the largest rise of the entropy in nats."
        )
    config = config or SearchConfig.model_validate({})
    objective = objective or entropy(config.temperature)
    if len(images) < config.candidates:
        raise DgmrError(
            f"amp compares groups of {config.candidates} images, got {len(images)}. Give more images or fewer "
            "candidates."
        )
    adapter, sites = model.adapter, {site.name: site for site in model.sites}
    with model.running():
        groups = images.groups(model, config.candidates)
        checksums = [float(batch.double().sum()) for group in groups for batch in group]
        request = {
            **config.model_dump(),
            "threshold": threshold,
            "seed": seed,
            "encoder": model.name,
            "weights": model.weight_hashes,
            "image_checksums": checksums,
            "objective": objective.__qualname__,
        }

        def remember(state: SearchState) -> None:
            if journal and is_main_process():
                atomic_write(journal, to_json({"request": request, "state": asdict(state)}))

        # Only the main process's disk may hold the journal.
        state = broadcast_from_main(lambda: _read_journal(journal, request))
        scores = gate_scores(adapter, groups, objective)
        dense_mlps = {name: model.tower.get_submodule(name) for name in sites}
        try:  # in place: there may be no room for a second tower
            result = search_widths(
                adapter,
                scores,
                groups,
                threshold=threshold,
                two_sided=config.two_sided,
                objective=objective,
                state=state,
                remember=remember,
            )
        finally:
            for name, mlp in dense_mlps.items():
                model.tower.set_submodule(name, mlp)
    assert result.baseline is not None
    decided = {
        name: SitePlan(site.width, site.hidden, result.kept[name], model.weight_hashes[name])
        for name, site in sites.items()
    }
    return SearchResult(Plan(model.name, "amp", decided), result.baseline, result.image_blocks)


def _read_journal(path: Path | None, request: dict[str, object]) -> SearchState | None:
    """Return the state of an interrupted search for the same request; None without one or if the file is damaged."""

    def parse(journal: Any) -> SearchState | None:
        if journal["request"] != json.loads(json.dumps(request)):
            return None
        kept = {name: tuple(neurons) for name, neurons in journal["state"]["kept"].items()}
        return SearchState(**{**journal["state"], "kept": kept})

    try:
        return read_json(path, parse, remedy="It is ignored.") if path else None
    except DgmrError:
        return None
