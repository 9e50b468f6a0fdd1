"""Compatibility with an index of old embeddings, checked against a naive search and against labels."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call_command

from dgmr_tp import DgmrError, open_model, prune
from dgmr_tp.cli.evaluation import compare
from dgmr_tp.data import scenes
from dgmr_tp.data.images import Images
from dgmr_tp.evaluation.class_embeddings import class_embeddings
from dgmr_tp.evaluation.index_compatibility import (
    VERDICTS,
    CompareConfig,
    ComparedEncoder,
    Thresholds,
    compare_embeddings,
    compare_encoders,
)
from dgmr_tp.pruning import ImageEncoder


def draw_embeddings(rows=400, width=24, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, width, generator=generator)
    return old, old + noise * torch.randn(rows, width, generator=generator)


def naive_shares(old, new, query_rows, index_rows, count):
    """Return the shares of the reference neighbors, by sorting all cosines in float64."""
    rows = {"old": old.double(), "new": new.double()}
    unit_rows = {name: embeddings / embeddings.norm(dim=1, keepdim=True) for name, embeddings in rows.items()}

    def neighbor_order(query_encoder, index_encoder):
        cosines = unit_rows[query_encoder][query_rows] @ unit_rows[index_encoder][index_rows].T
        return cosines.argsort(dim=1, descending=True)

    reference = neighbor_order("old", "old")[:, :count]
    shares = {}
    for way in (("new", "old"), ("old", "new"), ("new", "new")):
        neighbors = neighbor_order(*way)[:, :count]
        both = (reference[:, :, None] == neighbors[:, None, :]).any(-1)
        shares[way] = (float(both.double().mean()), float(both[:, 0].double().mean()))
    return shares


def test_overlaps_are_those_of_a_search_written_out():
    old, new = draw_embeddings(rows=700, noise=0.4)
    result = compare_embeddings(old, new, queries=150, seed=3)
    order = np.random.default_rng(3).permutation(700)
    for count in (10, 100):
        shares = naive_shares(old, new, order[:150], order[150:], count)
        for way, (overlap, first) in zip(result["ways"].values(), shares.values(), strict=True):
            assert way[f"overlap@{count}"] == pytest.approx(overlap, abs=1e-9)
            assert count == 100 or way["recall@10"] == pytest.approx(first, abs=1e-9)
    assert 0.2 < result["ways"]["new queries, old index"]["overlap@10"] < 0.9
    cosines = F.cosine_similarity(old, new).numpy()
    assert result["cosine"]["mean"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert result["cosine"]["p5"] == pytest.approx(np.percentile(cosines, 5), abs=1e-6)
    assert [worst["row"] for worst in result["worst"]] == np.argsort(cosines)[:8].tolist()
    assert result["images"] == 700 and result["queries"] == 150
    few = compare_embeddings(old[:200], new[:200])
    assert few["ways"]["new queries, old index"]["overlap@100"] is None, (
        "all of an index of 100 are among its first 100"
    )


def test_decisions_are_compared_by_the_old_classifier():
    old, new = draw_embeddings(noise=0.5)
    classifier = torch.randn(24, 7, generator=torch.Generator().manual_seed(1))
    result = compare_embeddings(old, new, classifier=classifier)
    same = ((old @ classifier).argmax(1) == (new @ classifier).argmax(1)).float().mean()
    assert result["agreement"] == pytest.approx(float(same)) and 0.3 < result["agreement"] < 0.99
    assert result["score"] == min(
        result["agreement"], *(result["ways"][way]["recall@10"] for way in list(result["ways"])[:2])
    )
    assert compare_embeddings(old, new)["agreement"] is None


def test_the_verdict_follows_the_limits(tmp_path):
    old, _ = draw_embeddings()
    assert compare_embeddings(old, old)["verdict"] == "keep the index" and compare_embeddings(old, old)["score"] == 1
    assert compare_embeddings(old, draw_embeddings(seed=5)[0])["verdict"] == "re-embed before you deploy"
    score = compare_embeddings(old, draw_embeddings(noise=0.5)[1])["score"]
    assert 0 < score < 1
    for (keep, convenient), verdict in (((score, 0), 0), ((1, score), 1), ((1, 1), 2)):
        thresholds = Thresholds(keep=keep, convenient=convenient)
        result = compare_embeddings(old, draw_embeddings(noise=0.5)[1], thresholds=thresholds)
        assert result["verdict"] == VERDICTS[verdict]
    for build in (Thresholds, partial(CompareConfig, images="x")):
        with pytest.raises(ValueError, match=r"convenient = 0\.9 is above keep = 0\.8"):
            build(keep=0.8, convenient=0.9)
    for options, message in (({"keep": 0.8}, "convenient = 0.9 is above keep = 0.8"), ({"keep": 2}, "--keep: ")):
        with pytest.raises(DgmrError, match=re.escape(message)):
            compare("old.npy", "new.npy", tmp_path / "out", **options)


def test_a_turned_space_breaks_an_index_that_re_embedding_would_mend():
    old, _ = draw_embeddings()
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(2))).Q
    result = compare_embeddings(old, old @ turn)
    assert result["verdict"] == "re-embed before you deploy"
    assert (
        result["ways"]["new queries, new index"]["recall@10"] == 1
        and result["ways"]["new queries, old index"]["recall@10"] < 0.5
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_embeddings_does_not_matter(scale):
    old, new = draw_embeddings()
    expected, scaled = compare_embeddings(old, new), compare_embeddings(old, new * scale)
    assert scaled["ways"] == expected["ways"] and scaled["verdict"] == expected["verdict"]


def test_what_cannot_be_compared_is_refused():
    old, new = draw_embeddings()
    for before, after, message in (
        (old, new[:, :8], "cannot share an index"),
        (old[:50], new[:50], "at least 100"),
        (old, new / 0, "not finite"),
        (old, new[:-1], "not of the same images"),
        (old, new * (torch.arange(len(new)) != 3)[:, None], "image 3 by the new encoder is all zeros"),
        (old[:1].expand(len(old), -1), new, "all embeddings of the old encoder are the same"),
    ):
        with pytest.raises(DgmrError, match=message):
            compare_embeddings(before, after)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "images"
    scenes.write_classification(root, 500, seed=31)
    return root


def test_verdicts_on_a_good_and_on_a_bad_encoder_are_right(pictures):
    """The labels confirm the verdicts: the share of the first ten neighbors with the query's class."""
    old = open_model("demo")
    calibration = torch.stack([old.preprocess(record.read()) for record in Images.find(pictures).records[:192]])
    good = prune(old, list(calibration.split(64)), criterion="output", keep_ratio=0.8).model
    bad = prune(old, criterion="random", mlp_ratio=0.25).model
    classifier = class_embeddings(old, pictures)
    side = lambda model: ComparedEncoder(ImageEncoder(model.adapter).eval(), model.preprocess)  # noqa: E731
    results = {
        name: compare_encoders(side(old), side(new), pictures, classifier=classifier)
        for name, new in (("good", good), ("bad", bad))
    }
    assert (results["good"]["verdict"], results["bad"]["verdict"]) == ("keep the index", "re-embed before you deploy")
    images = torch.stack([old.preprocess(record.read()) for record in Images.find(pictures).records])
    labels = torch.tensor([int(record.class_name()) for record in Images.find(pictures).records])
    with torch.no_grad():
        rows = {
            name: F.normalize(ImageEncoder(model.adapter)(images), dim=-1)
            for name, model in (("old", old), ("good", good), ("bad", bad))
        }
    precision = {}
    for name, queries in rows.items():
        near = (queries[:200] @ rows["old"][200:].T).topk(10).indices + 200
        precision[name] = float((labels[near] == labels[:200, None]).float().mean())
    assert precision["good"] > precision["old"] - 0.01 and precision["bad"] < precision["old"] / 2
    worst = results["bad"]["worst"][0]
    assert worst["thumbnail"].startswith("data:image/jpeg;base64,") and worst["name"].endswith(".png")
    assert worst["cosine"] == pytest.approx(float((rows["old"] * rows["bad"]).sum(1).min()), abs=1e-4)


def test_classes_are_read_from_a_file_a_folder_or_saved_embeddings(pictures, tmp_path):
    demo = open_model("demo")
    embeddings = class_embeddings(demo, pictures)
    assert embeddings.shape[1] == 64
    (tmp_path / "names.txt").write_text("red circle\n\nblue square\n")
    assert class_embeddings(demo, tmp_path / "names.txt").shape == (embeddings.shape[0], 2)
    torch.save(embeddings, tmp_path / "classes.pt")
    assert torch.equal(class_embeddings(demo, tmp_path / "classes.pt"), embeddings)
    (tmp_path / "one.txt").write_text("red circle\n")
    (tmp_path / "broken.pt").write_bytes(b"no")
    for name, message in (
        ("one.txt", "names 1 classes"),
        ("none.txt", "cannot read the class names"),
        ("broken.pt", "cannot read the class"),
    ):
        with pytest.raises(DgmrError, match=message):
            class_embeddings(demo, tmp_path / name)


def test_the_command_compares_embeddings_that_are_there_already(tmp_path):
    old, new = draw_embeddings(noise=0.05)
    np.save(tmp_path / "old.npy", old.numpy())
    np.save(tmp_path / "new.npy", new.numpy())
    np.save(tmp_path / "flat.npy", new.numpy().ravel())
    (tmp_path / "empty.npy").touch()
    done = call_command("compare", tmp_path / "old.npy", tmp_path / "new.npy", "-o", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.startswith("keep the index: neighbors 100.0 %\n"), done.stderr
    assert json.loads((tmp_path / "out" / "compatibility.json").read_text()) == compare_embeddings(old, new)
    assert "Keep the index" in (tmp_path / "out" / "compatibility.html").read_text()
    for arguments, message in (
        (("old.npy", "flat.npy"), "rows and columns"),
        (("old.npy", "nowhere.npy"), "cannot read the embeddings"),
        (("old.npy", "empty.npy"), "cannot read the embeddings"),
        (("old.npy", "demo"), "both be .npy"),
        (("demo", "demo"), "Pass --images"),
    ):
        with pytest.raises(DgmrError, match=message):
            compare(*(str(tmp_path / name) if "." in name else name for name in arguments), out_dir=tmp_path / "no")
    assert not (tmp_path / "no").exists()
