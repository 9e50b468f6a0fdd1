"""The report of a run: its page in a browser without network, and its table in a terminal."""

import io
import json
import os
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from dgmr_tp.pipeline.report import collect, print_table, write_html

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


needs_a_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ,
    reason="the report is tested in Chromium. Install it (apt-get install chromium).",
)


def browse(path, *options):
    """Open a file in headless Chromium and return the finished process."""
    assert CHROMIUM, "Chromium is not installed"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=2000",
    ]
    return subprocess.run([CHROMIUM, *flags, *options, path.as_uri()], capture_output=True, text=True, timeout=120)


@needs_a_browser
def test_the_report_shows_its_figures_in_a_browser(small_run):
    directory, printed = small_run
    page = directory / "report.html"
    dom = browse(page, "--dump-dom").stdout
    text = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", dom, flags=re.S))
    for heading in (
        "Neurons kept",
        "Distillation",
        "Exported files",
        "Your index of old embeddings",
        "verified",
        "mlp_ratio 1, distilled",
        "scenes top-1",
        "captions image→text R@5",
    ):
        assert heading in text, heading
    assert "<polyline" in dom and dom.count("data:image/jpeg;base64") == 8
    table = re.search(r"^dense +([\d.]+) +([\d.]+) +([\d.]+)", printed, re.M)
    assert f"{table[1]} M" in text and table[3] in text
    assert not re.search(r"https?://(?!www\.w3\.org)", page.read_text()), "the report must work without network"


def test_the_errors_of_tuned_blocks_are_shown(small_run, tmp_path):
    page = (small_run[0] / "report.html").read_text()
    [first, *_] = json.loads((small_run[0] / "recover/mlp_ratio-1/manifest.json").read_text())["figures"]["sites"]
    assert "block, tuned" in page and f"<td>{first['tuned_error']:.4f}</td>" in page
    assert first["tuned_error"] <= first["block_error"]
    untuned = {"site": "a", "num_kept": 1, "hidden": 2}
    data = collect(tmp_path, "run", {"prune/a": {"sites": [untuned]}, "recover/a": {"sites": [untuned]}})
    assert data.sizes[0].shortage is None
    short = [{**untuned, "site": "b", "images_needed": 1707}, untuned]
    data = collect(tmp_path, "run", {"prune/a": {"sites": [untuned]}, "recover/a": {"sites": short}})
    console = Console(file=io.StringIO(), width=80)
    print_table(data, console)
    page = write_html(data, tmp_path / "report.html").read_text()
    for text in (console.file.getvalue(), page):
        assert "oo few calibration images for 1 of 2 MLPs; 1,707 are enough" in text
    assert "block, tuned" not in write_html(data, tmp_path / "report.html").read_text()


@needs_a_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_window(small_run, tmp_path, width):
    """The page does not scroll sideways on a phone. A script in a copy of the page measures its width."""
    probe = "<script>onload=()=>{document.title=document.documentElement.scrollWidth+' '+innerWidth}</script>"
    page = tmp_path / "probe.html"
    page.write_text((small_run[0] / "report.html").read_text().replace("</head>", f"{probe}</head>"))
    result = browse(page, "--dump-dom", f"--window-size={width},900")
    scroll, window = map(int, re.search(r"<title>(\d+) (\d+)</title>", result.stdout).groups())
    assert scroll <= window
    assert "Uncaught" not in result.stderr


def test_curves_are_drawn_and_where_they_come_from_is_said(tmp_path):
    distill_figures = {"losses": [[1, 1.0], [2, 0.1], [3, 0.01]], "scores": [[1, 0.5], [2, 0.9], [3, 0.7]]}
    distill_figures |= {"knn": [[1, 0.25], [3, 0.5]], "teacher": {"knn": 0.625}, "broken_images": {"<a>.png": "cut"}}
    details = {
        "loss_class_token": [[1, 1.0], [3, 0.1]],
        "loss_patches": [[1, 1.0]],
        "gradient_norm": [[1, 0.1], [3, 1.0]],
    }
    distill_figures |= {"details": details}
    figures = {"prune/a": {}, "distill/a": distill_figures, "tune_text/a": {"losses": [[1, 2.0]]}}
    figures["evaluate/dense"] = {"dense": {"k-NN": {"knn@20": 0.5, "images_left_out": 3}}}
    data = collect(tmp_path, "run", figures, ["wds/flickr30k"])
    text = write_html(data, tmp_path / "report.html").read_text()
    assert 'points="186.7,1.0 373.3,75.5 560.0,150.0"' in text, "losses on a logarithmic scale"
    assert (
        'points="186.7,150.0 373.3,1.0 560.0,75.5"' in text and "mean cosine to the teacher on held-out images" in text
    )
    assert 'points="186.7,150.0 560.0,1.0"' in text and "k-NN accuracy on held-out images; the teacher: 62.5 %" in text
    assert "tuned is not zero-shot on flickr30k." in text
    assert "loss, class token, logarithmic" in text and "norm of the gradient" in text
    assert "loss, patches" not in text and "images per second" not in text, "a single point is not a curve"
    assert "1 images did not decode in training and were replaced by others, the first: &lt;a&gt;.png." in text
    assert "k-NN: 3 images do not decode and are left out." in text


def test_many_data_sets_are_printed_whole_at_80_columns(tmp_path):
    names = ["imagenet1k", "imagenet-a", "imagenet-r", "imagenetv2", "imagenet_sketch", "objectnet", "mscoco_captions"]
    accuracies = {name: {"acc1": 0.101 + i / 10} for i, name in enumerate(names)}
    prune_figures = {
        "dense": {"parameters": 4350 * 10**6, "flops": 2264 * 10**9},
        "pruned": {"parameters": 1237 * 10**6, "flops": 654 * 10**9},
    }
    figures = {
        "evaluate/dense": {"dense": accuracies},
        "evaluate/mlp_ratio-1": {"recovered": accuracies},
        "prune/mlp_ratio-1": prune_figures,
    }
    stream = io.StringIO()
    print_table(collect(tmp_path, "run", figures), Console(file=stream, width=80))
    text = stream.getvalue()
    lines = [line for line in text.splitlines() if not line.startswith("measured by")]
    assert "…" not in text and max(map(len, lines)) <= 80
    for i, name in enumerate(names):
        assert name in text and "\n".join(lines).count(f"{10.1 + 10 * i:.1f}") == 2
    assert text.count("4350.00") == text.count("1237.00") == 1


def test_nothing_that_was_measured_is_missing(tmp_path):
    """The training did not help, images were skipped, and an exported format and metrics are unknown to the tables."""
    size, broken = "mlp_ratio-1", {"a.png": "cut", "b.png": "cut"}
    known = {"wds/a": {"acc1": 0.111, "acc5": 0.222}, "k-NN": {"knn@20": 0.333}, "linear head": {"head@1": 0.444}}
    probe = {"wds/p": {"lp_acc1": 0.555, "images_left_out": 1}}
    figures = {
        "rank/all": {"broken_images": broken},
        f"prune/{size}": {},
        f"recover/{size}": {"sites": [], "broken_images": broken},
        f"distill/{size}": {"best_step": 0, "scores": [[0, 0.9], [2, 0.7]], "broken_images": {"c.png": "cut"}},
        f"tune_text/{size}": {"losses": [[1, 2.0], [2, 1.0]]},
        "evaluate/dense": {"dense": {**known, **probe}},
        f"evaluate/{size}": {"distilled": {**known, "wds/later": {"acc1": 0.666}}},
        f"export/{size}": {"towers": {}, "metrics": {"tflite": {"wds/a": {"acc1": 0.777}}}},
        f"compare/{size}": None,
    }
    report = collect(tmp_path, "run", figures)
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", write_html(report, tmp_path / "report.html").read_text()))
    stream = io.StringIO()
    print_table(report, Console(file=stream, width=80))
    printed = " ".join(stream.getvalue().split())
    for text in (page, printed):
        for value in ("11.1", "33.3", "44.4", "55.5", "66.6", "77.7", "tflite", "lp_acc1", "later"):
            assert value in text, value
        assert "22.2" not in text
        kept = "the start was kept: no step improved its score of 0.9000 on the held-out images"
        assert f"mlp_ratio 1, distillation: {kept}" in text
        assert "the held-out score fell from 0.9000 to 0.7000 in the first 2 steps" in text
    assert "mlp_ratio 1, distilled wds/a acc5 0.2220" in page
    assert "a top-1 clip_benchmark" in page and "k-NN top-1 dgmr-tp" in page and "linear head top-1 dgmr-tp" in page
    assert "measured by clip_benchmark: wds/" not in printed and "measured by dgmr-tp: k-NN, linear head" in printed
    assert "skipped: 2 in rank, 2 in recover, 1 in distill." in page
    assert "mlp_ratio 1, rank: 2 images did not decode" in printed and "wds/p: 1 images do not decode" in printed


def test_the_report_says_which_step_a_distillation_kept(tmp_path):
    def page(**training) -> str:
        figures = {"prune/a": {}, "distill/a": {"losses": [[1, 2.0], [2, 1.0]], **training}}
        return write_html(collect(tmp_path, "run", figures), tmp_path / "report.html").read_text()

    scores = [[0, 0.9], [10, 0.91], [20, 0.95], [30, 0.94]]
    text = page(best_step=20, scores=scores)
    assert "Step 20 of 30 was kept: its held-out score is 0.9500, after 0.9000 at the start." in text
    assert "the start was kept" not in text and "fell" not in text
    text = page(best_step=30, scores=[[0, 0.9], [10, 0.8], [30, 0.95]])
    assert "Step 30 of 30 was kept" in text and "fell from 0.9000 to 0.8000 in the first 10 steps" in text
    assert "was kept" not in page(best_step=30, scores=scores, ema=0.9), "an average is not of one step"
    assert "was kept" not in page(best_step=30), "nothing was measured"


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    prune_figures = {
        "dense": {"parameters": 10, "flops": 20},
        "pruned": {"parameters": 5, "flops": 10},
        "sites": [{"site": "blocks.0.mlp", "width": 2, "hidden": 8, "num_kept": 2}],
    }
    data = collect(
        tmp_path,
        "<begun>",
        {"prune/mlp_ratio-1": prune_figures, "recover/mlp_ratio-1": None, "evaluate/dense": None},
    )
    text = write_html(data, tmp_path / "report.html").read_text()
    assert "−50.0 %" in text and "blocks.0.mlp" in text and "&lt;begun&gt;" in text
