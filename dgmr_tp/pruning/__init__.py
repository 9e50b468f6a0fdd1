"""The algorithms: score the hidden neurons of MLPs, choose the ones to keep, prune the rest, and refit.

They work on modules and tensors and depend on torch, torch-pruning, numpy and scipy only.
"""

from dgmr_tp.pruning.adapter import Block, ImageEncoder, TowerAdapter, last_state
from dgmr_tp.pruning.allocation import Amount
from dgmr_tp.pruning.importance import DGMRImportance, PrecomputedScores
from dgmr_tp.pruning.output_selection import Ranking, rank_tower
from dgmr_tp.pruning.plan import Plan, SitePlan
from dgmr_tp.pruning.pruner import MLPPruner
from dgmr_tp.pruning.recovery import SiteRecovery, recover
from dgmr_tp.pruning.selection import Selection, select_diverse_rows
from dgmr_tp.pruning.sites import Site, find_sites

__all__ = [
    "Amount",
    "Block",
    "DGMRImportance",
    "ImageEncoder",
    "MLPPruner",
    "Plan",
    "PrecomputedScores",
    "Ranking",
    "Selection",
    "Site",
    "SitePlan",
    "SiteRecovery",
    "TowerAdapter",
    "find_sites",
    "last_state",
    "rank_tower",
    "recover",
    "select_diverse_rows",
]
