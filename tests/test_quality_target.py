"""The smallest size that meets a quality target. The tests measure the target again on the held-out images."""

import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compress import rank
from conftest import call_command, recipe
from families import FAMILIES
from PIL import Image

from dgmr_tp import DgmrError, open_model
from dgmr_tp.compression.quality_target import prune_to_target
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.pipeline.report import collect
from dgmr_tp.pipeline.run import Run
from dgmr_tp.pruning.cost import parameters


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality_target") / "model"
    FAMILIES["open_clip"](directory)
    opened = open_model(str(directory))
    opened.module.eval()
    return opened


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality_target") / "scenes"
    scenes.write_classification(directory, 240, seed=11)
    return directory


def held_out(images, model, count):
    """Return the calibration images, the ``count`` held-out images, and the labels of both."""
    pictures, labels = Images.find(images).sample_labeled(160 + count, 0, model.preprocess)
    return pictures[:-count], pictures[-count:], labels


def test_min_cosine_holds_on_images_that_were_not_used_and_the_next_smaller_size_breaks_it(model, images):
    result = prune_to_target(model, images, min_cosine=0.9999, num_calibration_images=160, held_out=80)
    _, held_out_images, _ = held_out(images, model, 80)
    with torch.no_grad():
        cosine = F.cosine_similarity(result.pruned.model.tower(held_out_images), model.tower(held_out_images)).double()
    size = parameters(result.pruned.model.tower)
    [last] = [trial for trial in result.trials if trial.parameters == size]
    assert last.met and last.value == pytest.approx(float(cosine.mean()), abs=1e-7)
    assert 0.9999 <= last.bound < last.value
    low = cosine[torch.randint(80, (4000, 80), generator=torch.Generator().manual_seed(1))].mean(1).quantile(0.025)
    assert last.bound == pytest.approx(float(low), abs=1e-5)
    total = parameters(model.tower)
    missed_sizes = [trial.parameters for trial in result.trials if not trial.met]
    assert size < 0.6 * total and 0 < size - max(missed_sizes) < total / 50
    assert all((trial.bound >= 0.9999) == trial.met for trial in result.trials)
    looser_result = prune_to_target(model, images, min_cosine=0.999, num_calibration_images=160, held_out=80)
    assert parameters(looser_result.pruned.model.tower) < size


def test_max_drop_is_about_a_k_nn_classifier(model, images):
    result = prune_to_target(model, images, max_drop=0.05, num_calibration_images=160, held_out=80)
    bank, held_out_images, labels = held_out(images, model, 80)

    def correct_answers(tower):
        with torch.no_grad():
            bank_embeddings, test_embeddings = (
                F.normalize(tower(part), dim=-1).double().numpy() for part in (bank, held_out_images)
            )
        correct = []
        for embedding, label in zip(test_embeddings, labels[160:], strict=True):
            nearest = np.argsort(-(bank_embeddings @ embedding))[:20]
            votes = {}
            for index in nearest:
                votes[labels[index]] = votes.get(labels[index], 0) + np.exp(bank_embeddings[index] @ embedding / 0.07)
            correct.append(max(votes, key=votes.get) == label)
        return np.array(correct)

    size = parameters(result.pruned.model.tower)
    [last] = [trial for trial in result.trials if trial.parameters == size]
    drop = correct_answers(model.tower).mean() - correct_answers(result.pruned.model.tower).mean()
    assert last.value == pytest.approx(drop, abs=0.013) and last.bound <= 0.05 and last.bound >= last.value


def test_rankings_and_multiples_are_used(model, images):
    pictures = list(held_out(images, model, 80)[0].split(64))
    ranked_here = prune_to_target(model, images, min_cosine=0.9999, num_calibration_images=160, held_out=80, round_to=8)
    with_rankings = prune_to_target(
        model,
        images,
        min_cosine=0.9999,
        num_calibration_images=160,
        held_out=80,
        round_to=8,
        rankings=rank(model, "output", pictures),
    )
    assert ranked_here.pruned.plan == with_rankings.pruned.plan
    assert all(
        len(site.kept) % 8 == 0 or len(site.kept) == site.hidden for site in ranked_here.pruned.plan.sites.values()
    )


def test_what_cannot_be_promised_is_said(model, images, tmp_path, monkeypatch):
    for index in range(70):
        Image.fromarray(scenes.Scene.draw(1, index).image()).save(tmp_path / f"{index}.png")
    for options, message in (
        ({}, "there is no quality target. Give either min_cosine or max_drop"),
        ({"min_cosine": 0.9, "max_drop": 0.1}, "got min_cosine, max_drop. Keep one"),
        ({"min_cosine": 1.5}, "min_cosine = 1.5 is out of range. It must be between 0 and 1"),
        ({"min_cosine": 0.9}, "holds 70 images, fewer than 512 held-out images"),
        ({"min_cosine": 0.9, "held_out": 1}, "held_out = 1 is too small. Hold out at least 50 images"),
        ({"max_drop": 0.1, "held_out": 50}, "not every image in .* has a class"),
    ):
        with pytest.raises(DgmrError, match=message):
            prune_to_target(model, tmp_path, **options)
    # With more steps, the search would find a size so close to the dense tower that it meets any target.
    monkeypatch.setattr("dgmr_tp.compression.quality_target.MAX_TRIALS", 1)
    with pytest.raises(DgmrError, match=r"min_cosine = 0.99999 is not met even at .* parameters"):
        prune_to_target(model, images, min_cosine=0.99999, num_calibration_images=160, held_out=80)


def test_classes_come_from_folders_and_from_shards(tmp_path, images):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(scenes.Scene.draw(1, len(name)).image()).save(tmp_path / name / "0.png")
    Image.fromarray(scenes.Scene.draw(1, 9).image()).save(tmp_path / "loose.png")
    assert [record.class_name() for record in Images.find(tmp_path).records] == ["cat", "dog", None]
    with tarfile.open(tmp_path / "with_dots.tar", "w") as tar:
        tar.add(tmp_path / "loose.png", "./a.png")
        (tmp_path / "a.cls").write_text("7")
        tar.add(tmp_path / "a.cls", "./a.cls")
    assert [record.class_name() for record in Images.find(tmp_path / "with_dots.tar").records] == ["7"]
    shards = Images.find(images).records
    assert [record.class_name() for record in shards] == [
        str(scenes.Scene.draw(11, i).label) for i in range(len(shards))
    ]


def test_a_ranking_that_may_know_the_judges_is_refused(model, images):
    rankings = rank(model, "output", list(held_out(images, model, 80)[0].split(64)))
    with pytest.raises(DgmrError, match="holds 240 readable images, fewer than 200 for calibration and 80 held out"):
        prune_to_target(model, images, min_cosine=0.9, num_calibration_images=200, held_out=80, rankings=rankings)


def test_a_recipe_finds_the_size_and_its_recovered_encoder_keeps_the_promise(model, images, tmp_path):
    model.save(tmp_path / "model", None)
    changes = {
        "prune": {"criterion": "output", "min_cosine": [0.999, 0.9999], "held_out": 80},
        "recover": {"images": 160},
        "model": str(tmp_path / "model"),
        "images": str(images),
        "scenes": None,
        "distill": None,
        "evaluate": None,
        "compare": None,
        "export": None,
    }
    run = Run(recipe(**changes), tmp_path / "run")
    run.run(say=lambda line: None)
    pictures, _ = Images.find(images).sample_labeled(240, 0, model.preprocess)
    dense = run.context.dense.tower.eval()
    sizes = {}
    for limit in (0.999, 0.9999):
        recovered = open_model(str(run.run_directory.folder(f"recover/min_cosine-{limit}") / "model")).tower.eval()
        with torch.no_grad():
            cosine = float(F.cosine_similarity(recovered(pictures[160:]), dense(pictures[160:])).mean())
        target = run.run_directory.figures(f"prune/min_cosine-{limit}")["quality_target"]
        assert limit <= target["bound"] < target["value"] == pytest.approx(cosine, abs=1e-6)
        sizes[limit] = parameters(recovered)
    assert sizes[0.999] < sizes[0.9999] < parameters(dense)
    report = collect(run.run_directory.path, "small", run.figures)
    assert (
        f"mean cosine {target['value']:.4f} on held-out images, at least {target['bound']:.4f}"
        in report.sizes[1].quality_target
    )


def test_a_recipe_that_cannot_be_judged_stops_before_anything_runs(images, tmp_path):
    (tmp_path / "one").mkdir()
    Image.fromarray(scenes.Scene.draw(1, 0).image()).save(tmp_path / "one" / "0.png")
    quality_target = {"criterion": "output", "max_drop": 0.01}
    for source, held_out, message in (
        (images, 200, r"holds 240, but recover.images and prune.held_out together are 260"),
        (tmp_path / "one", 0, "not every image in .* has a class"),
    ):
        if not held_out:
            for index in range(1, 120):
                (tmp_path / "one" / f"{index}.png").write_bytes((tmp_path / "one" / "0.png").read_bytes())
        unjudgeable = recipe(
            images=str(source),
            prune={**quality_target, "held_out": held_out or 50},
            distill=None,
            scenes=None,
            evaluate=None,
            compare=None,
        )
        with pytest.raises(DgmrError, match=message):
            Run(unjudgeable, tmp_path / "run").run()
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prune", "recover", "message"),
    [
        ({"min_cosine": 0.98}, {}, "set criterion: output"),
        ({"criterion": "output", "min_cosine": 1.5}, {}, "min_cosine must be below 1, got 1.5"),
        ({"criterion": "output", "max_drop": 0}, {}, "max_drop must be above 0"),
        ({"criterion": "output", "max_drop": 0.01}, None, "add the section recover"),
        ({"mlp_ratio": 1, "held_out": 60}, {}, "held_out belongs to min_cosine or max_drop"),
    ],
)
def test_a_recipe_that_promises_what_nobody_can_judge_is_refused(prune, recover, message):
    with pytest.raises(DgmrError, match=message):
        recipe(prune=prune, recover=recover, distill=None)


@pytest.mark.slow
def test_the_command(tmp_path, images):
    result = call_command(
        "prune",
        "--min-cosine",
        "0.98",
        "--recover",
        images,
        "--calibration-images",
        "160",
        "--held-out",
        "80",
        "-o",
        tmp_path / "out",
    )
    assert result.returncode == 0 and "mean cosine" in result.stdout and "missed" in result.stdout, result.stderr
    assert parameters(open_model(str(tmp_path / "out")).tower) < 1_200_000
    for command, message in (
        (("--max-drop", "1%", "-o", tmp_path / "a"), "Give --recover IMAGES"),
        (("--max-drop", "little", "--recover", images, "-o", tmp_path / "a"), "Write it as 1% or 0.01"),
    ):
        result = call_command("prune", *command)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
