"""A plan: the hidden neurons that each site keeps, as plain JSON.

The pruner writes a plan and applies it. The module knows sites and weights, but not how neurons are chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import Cost
from dgmr_tp.pruning.sites import Site
from dgmr_tp.utils.files import to_json

PLAN_FORMAT = 1
"""Version of the JSON format."""


@dataclass(frozen=True)
class SitePlan:
    """The decision for one site."""

    width: int
    """Token width."""
    hidden: int
    """Hidden width before pruning."""
    kept: tuple[int, ...]
    """Indices of the kept neurons, ascending. Their number is the hidden width after pruning."""
    sha256: str
    """SHA-256 of the first producer's weight before pruning. The plan is valid for this checkpoint only."""


@dataclass(frozen=True)
class Plan:
    """The decision for an encoder. ``print(plan)`` shows a table. The JSON can be edited by hand and applied."""

    encoder: str
    """Name of the encoder, such as ``open_clip:ViT-g-14``."""
    criterion: str
    """Name of the importance or ranking that chose the neurons."""
    sites: dict[str, SitePlan]
    """Decisions by site name."""

    def to_json(self) -> str:
        """Return the plan as JSON, indented by one space."""
        return to_json({"format": PLAN_FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Parse the output of :meth:`to_json`.

        Raises:
            DgmrError: ``text`` is not a plan of this format.
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
            if version != PLAN_FORMAT:
                raise DgmrError(
                    f"this plan has format {version!r}, and this version reads format {PLAN_FORMAT}. Make the plan "
                    "again with dgmr-tp plan."
                )
            sites = {
                name: SitePlan(**{**site, "kept": tuple(site["kept"])}) for name, site in data.pop("sites").items()
            }
            return cls(sites=sites, **data)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DgmrError(
                f"this is not a plan: {type(error).__name__}: {error}. Make one with dgmr-tp plan."
            ) from error

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan from a file.

        Raises:
            DgmrError: the file cannot be read, or it is not a plan; names the file.
        """
        try:
            return cls.from_json(Path(path).read_text("utf-8"))
        except OSError as error:
            raise DgmrError(
                f"cannot read the plan {path}: {error.strerror}. Name a plan that dgmr-tp wrote."
            ) from error
        except UnicodeDecodeError as error:
            raise DgmrError(f"{path} is not a text in UTF-8. Name a plan that dgmr-tp wrote.") from error
        except DgmrError as error:
            raise DgmrError(f"{path}: {error}") from error

    def check(self, model: nn.Module, sites: Sequence[Site], weight_hashes: Mapping[str, str] | None = None) -> None:
        """Check that the plan fits ``model``.

        Args:
            model: the model before pruning.
            sites: its sites.
            weight_hashes: the model's :func:`weight_sha256` by site name, where the caller has them. Missing ones are
                computed.

        Raises:
            DgmrError: a site is unknown, has other widths or other weights, or its kept indices are empty, not
                integers, not ascending, duplicate or out of range; names the site and the value.
        """
        by_name = {site.name: site for site in sites}
        hashes = weight_hashes or {}
        if unknown := [name for name in self.sites if name not in by_name]:
            raise DgmrError(
                f"the plan names a site {unknown[0]!r} that this encoder does not have. Its sites are "
                f"{', '.join(by_name)}."
            )
        for name, planned in self.sites.items():
            site, kept = by_name[name], planned.kept
            if (planned.hidden, planned.width) != (site.hidden, site.width):
                raise DgmrError(
                    f"the plan expects {planned.hidden} × {planned.width} at site {name}, and this encoder has "
                    f"{site.hidden} × {site.width}. Make a new plan for this encoder."
                )
            if any(type(index) is not int for index in kept):
                raise DgmrError(f"the plan's kept indices of site {name} are not all integers. Correct the plan.")
            if not kept or list(kept) != sorted(set(kept)):
                raise DgmrError(
                    f"the plan's kept indices of site {name} are not ascending, contain a duplicate, or there are "
                    "none. Correct the plan."
                )
            if kept[0] < 0 or kept[-1] >= site.hidden:
                raise DgmrError(
                    f"the plan keeps neuron {kept[0] if kept[0] < 0 else kept[-1]} of site {name}. Its neurons are 0 "
                    f"to {site.hidden - 1}."
                )
            weight_hash = hashes[name] if name in hashes else weight_sha256(model, site)
            if planned.sha256 != weight_hash:
                raise DgmrError(
                    f"the plan was made for another checkpoint: the weights of {site.producers[0]} differ. Make a new "
                    "plan for this one."
                )

    def cost(self, costs: Mapping[str, Cost]) -> dict[str, int]:
        """Return the tower's cost after pruning, for each entry of ``costs``."""
        removed = {name: site.hidden - len(site.kept) for name, site in self.sites.items()}
        return {key: cost.without(removed) for key, cost in costs.items()}

    def __str__(self) -> str:
        name_width = max(len("site"), *(len(name) for name in self.sites))
        lines = [
            f"{self.encoder} · {self.criterion}",
            f"{'site':<{name_width}}  {'width':>6} {'hidden':>7} {'kept':>7}",
        ]
        lines += [
            f"{name:<{name_width}}  {s.width:>6} {s.hidden:>7} {len(s.kept):>7}" for name, s in self.sites.items()
        ]
        return "\n".join(lines)


def weight_sha256(model: nn.Module, site: Site) -> str:
    """Return the SHA-256 of the weight of the site's first producer, taken over its float32 bytes.

    In float32 the hash is the same whether the checkpoint was loaded in its own dtype or in float32. On the meta device
    the result is ``meta`` and the shape.
    """
    weight = model.get_submodule(site.producers[0]).weight.detach()
    if weight.is_meta:
        return f"meta {tuple(weight.shape)}"
    return hashlib.sha256(weight.cpu().float().contiguous().view(torch.uint8).numpy()).hexdigest()
