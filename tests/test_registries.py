"""A criterion and a loss are added by one registry entry each; recipes, commands and training accept them."""

import torch
import torch.nn.functional as F
import torch_pruning as tp
from compress import make_plan
from conftest import call_command, pictures, recipe, redraw, timm_tower

from dgmr_tp import open_model, prune
from dgmr_tp.compression.criteria import CRITERIA, WeightCriterion
from dgmr_tp.distillation.losses import LOSSES, DistillationLoss, FeatureTap, Loss
from dgmr_tp.encoders import adapt


class LastNeurons(tp.importance.Importance):
    """Keep the neurons with the highest index."""

    def __call__(self, group, **_):
        return torch.arange(len(group[0].idxs), dtype=torch.float64)


def test_a_criterion_is_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(CRITERIA, "last", WeightCriterion("the last neurons", LastNeurons))
    model = open_model("demo")
    plan = make_plan(model, "last", keep=8)
    assert {site.kept for site in plan.sites.values()} == {tuple(range(504, 512))}
    assert prune(model, criterion="last", keep=8).plan == plan != prune(model, criterion="l2", keep=8).plan
    assert recipe(prune={"criterion": "last", "keep": 8}).prune.criterion == "last"
    listed = call_command("criteria").stdout
    assert "the last neurons" in listed and all(name in listed for name in CRITERIA)
    done = call_command("prune", "--criterion", "last", "--keep", "8", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    refused = call_command("prune", "--criterion", "typo", "--keep", "8", "-o", tmp_path / "other")
    assert refused.returncode == 2 and "unknown criterion 'typo'. Use one of dgmr, " in refused.stderr


def test_a_loss_is_one_entry(monkeypatch):
    def cosine_distance(student, teacher):
        return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()

    monkeypatch.setitem(LOSSES, "embedding_cosine", Loss("embedding", cosine_distance))
    config = recipe(
        distill={"steps": 1, "batch_size": 8, "base_lr": 1, "loss": {"terms": {"embedding_cosine": 2}}}
    ).distill
    assert isinstance(config.loss, DistillationLoss) and config.loss.weight("embedding_cosine") == 2
    student, teacher = redraw(timm_tower(), seed=0), redraw(timm_tower(), seed=1)
    images = pictures(4)
    with torch.no_grad():
        terms = config.loss(*(FeatureTap(adapt(tower), config.loss)(images) for tower in (student, teacher)))
        expected = 1 - F.cosine_similarity(student(images), teacher(images)).double().mean()
    assert set(terms) == {"class_token", "patches", "embedding_cosine"}
    assert torch.isclose(terms["embedding_cosine"].double(), expected, atol=1e-6) and expected > 0.01
    total = terms["class_token"] + terms["patches"] + 2 * terms["embedding_cosine"]
    assert torch.isclose(config.loss.total(terms), total) and not torch.isclose(terms["embedding_cosine"], total)
