"""A plan: which hidden neurons of each site stay. What passes from deciding to doing, as plain JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dgmr_tp.errors import DgmrError
from dgmr_tp.pruning.cost import Cost
from dgmr_tp.pruning.sites import Site

FORMAT = 1


@dataclass(frozen=True)
class SitePlan:
    """The decision for one site."""

    width: int
    """Token width."""
    hidden: int
    """Hidden width before."""
    kept: tuple[int, ...]
    """Indices kept, ascending; the hidden width after is their number."""
    sha256: str
    """Of the first producer's weight before pruning: the plan fits this checkpoint and no other."""


@dataclass(frozen=True)
class Plan:
    """The decision for an encoder. ``print(plan)`` is a table; the JSON may be edited by hand and applied."""

    encoder: str
    criterion: str
    sites: dict[str, SitePlan]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of :meth:`to_json`.

        Raises:
            DgmrError: the text is no plan of this format.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise DgmrError(f"this plan has another format than {FORMAT}; make it again with dgmr-tp plan")
            sites = {
                name: SitePlan(**{**site, "kept": tuple(site["kept"])}) for name, site in data.pop("sites").items()
            }
            return cls(sites=sites, **data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DgmrError(f"this is no plan: {type(error).__name__}: {error}; make one with dgmr-tp plan") from error

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan from a file; errors name the file."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise DgmrError(f"cannot read the plan {path}: {error}") from error
        except DgmrError as error:
            raise DgmrError(f"{path}: {error}") from error

    def check(self, model: nn.Module, sites: list[Site]) -> None:
        """Refuse a plan that does not fit ``model``: unknown sites, other widths, another checkpoint,
        duplicate, unordered or out-of-range indices.

        Raises:
            DgmrError: names the site and what does not fit.
        """
        found = {site.name: site for site in sites}
        if unknown := [name for name in self.sites if name not in found]:
            raise DgmrError(
                f"the plan names a site {unknown[0]!r} that this encoder does not have; its sites: {', '.join(found)}"
            )
        for name, planned in self.sites.items():
            site, kept = found[name], planned.kept
            if (planned.hidden, planned.width) != (site.hidden, site.width):
                raise DgmrError(
                    f"the plan takes site {name} to be {planned.hidden} × {planned.width}, this encoder's is {site.hidden} × {site.width}"
                )
            if any(type(index) is not int for index in kept):
                raise DgmrError(f"the plan's kept indices of site {name} are not all whole numbers")
            if not kept or list(kept) != sorted(set(kept)):
                raise DgmrError(
                    f"the plan's kept indices of site {name} are not ascending, hold a duplicate, or are none"
                )
            if kept[0] < 0 or kept[-1] >= site.hidden:
                raise DgmrError(
                    f"the plan keeps neuron {kept[0] if kept[0] < 0 else kept[-1]} of site {name}, which has 0 to {site.hidden - 1}"
                )
            if planned.sha256 != weight_sha256(model, site):
                raise DgmrError(
                    f"the plan was made for another checkpoint: the weights of {site.producers[0]} differ; make a new plan for this one"
                )

    def cost(self, costs: Mapping[str, Cost]) -> dict[str, int]:
        """What the tower costs after the cut, in each of ``costs``."""
        cut = {name: site.hidden - len(site.kept) for name, site in self.sites.items()}
        return {key: cost.without(cut) for key, cost in costs.items()}

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
    """SHA-256 of the bytes, as float32, of the site's first producer's weight; of its shape alone on the meta device.

    As float32, so that a plan fits the checkpoint whether it was opened in its own type or not.
    """
    weight = model.get_submodule(site.producers[0]).weight.detach()
    if weight.is_meta:
        return f"meta {tuple(weight.shape)}"
    return hashlib.sha256(weight.cpu().float().contiguous().view(torch.uint8).numpy()).hexdigest()
