"""A GPU gives the CPU's result. Run by ``pytest -m gpu``; skipped without a device."""

import pytest
import torch
from gpu import WEIGHT_TOLERANCE, same_result

from dgmr_tp.pruning.output_selection import SELECTION_RULES, _Greedy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("criterion", ["dgmr", "l2", "output"])
def test_the_same_neurons_stay_and_the_weights_agree(criterion):
    result = same_result(criterion)
    assert result["kept_in_common"] == 1 and result["largest_difference"] <= WEIGHT_TOLERANCE


@pytest.mark.parametrize("rule", SELECTION_RULES.values())
def test_no_pick_waits_for_the_device(rule):
    activations = torch.randn(300, 200, dtype=torch.float64, device="cuda")
    greedy = _Greedy(activations.T @ activations, torch.randn(8, 200, dtype=torch.float64, device="cuda"), rule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen, _ = greedy.pick_block(64)
        with pytest.raises(RuntimeError, match="synchroniz"):
            chosen.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
