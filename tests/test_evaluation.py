"""Our evaluations give the numbers of clip_benchmark's command line, and those of direct computations."""

import csv
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BIN, call_command, timm_tower
from families import FAMILIES
from inputs import labels
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from dgmr_tp import DgmrError, open_model
from dgmr_tp.cli import evaluation as commands
from dgmr_tp.data import scenes
from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES, Scene
from dgmr_tp.evaluation.clip_benchmark_command import run_clip_benchmark
from dgmr_tp.evaluation.loading import load_encoder
from dgmr_tp.evaluation.zero_shot import CLIPWithEncoder, evaluate
from dgmr_tp.evaluation.zoo import CLASSIFICATION, RETRIEVAL, find_zoo, knn_folders, zoo_figures
from dgmr_tp.export.bundle import export_bundle, failures
from dgmr_tp.export.towers import export_towers
from dgmr_tp.pruning.cost import flops, parameters
from dgmr_tp.utils.modules import state_sha256


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes.write_classification(root / "classes", 120, seed=7)
    scenes.write_retrieval(root / "captions", 60, seed=8)
    return root


@pytest.fixture(scope="module")
def demo():
    model = open_model("demo")
    model.module.eval()
    return model


def run(model, clip, root, output, **options):
    return evaluate(
        clip, model.preprocess, model.tokenizer, dataset="wds/test", root=root, output=output, name="test", **options
    )


def test_top1_is_what_a_direct_computation_gives(demo, data, tmp_path):
    drawn = [Scene.draw(7, i) for i in range(120)]
    images = torch.stack([demo.preprocess(Image.fromarray(scene.image())) for scene in drawn])
    with torch.no_grad():
        embedding = F.normalize(demo.module.encode_image(images), dim=-1)
        classes = []
        for name in CLASSNAMES:
            prompts = F.normalize(
                demo.module.encode_text(demo.tokenizer([t.format(c=name) for t in TEMPLATES])), dim=-1
            )
            classes.append(F.normalize(prompts.mean(0), dim=0))
    top1 = np.mean((embedding @ torch.stack(classes).T).argmax(1).numpy() == [scene.label for scene in drawn])
    metrics = run(demo, demo.module, data / "classes", tmp_path / "a" / "r.json")
    assert metrics["acc1"] == pytest.approx(top1, abs=1e-9)
    stored = json.loads((tmp_path / "a" / "r.json").read_text())
    assert stored["metrics"] == metrics and stored["task"] == "zeroshot_classification" and stored["model"] == "test"


def test_retrieval_is_found_by_the_folder_and_has_three_recalls(demo, data, tmp_path):
    metrics = run(demo, demo.module, data / "captions", tmp_path / "r.json")
    assert {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)} <= metrics.keys()
    assert (
        metrics["text_retrieval_recall@1"] <= metrics["text_retrieval_recall@5"] <= metrics["text_retrieval_recall@10"]
    )


def test_another_image_encoder_is_really_used(demo, data, tmp_path):
    same = CLIPWithEncoder(demo.module, demo.module.encode_image)
    constant = CLIPWithEncoder(demo.module, lambda images: torch.ones(len(images), 128))
    accuracy = [
        run(demo, clip, data / "classes", tmp_path / "r.json")["acc1"] for clip in (demo.module, same, constant)
    ]
    assert accuracy[0] == accuracy[1] and accuracy[2] < 0.1 < accuracy[0]


def test_what_cannot_be_evaluated_is_refused(demo, data, tmp_path):
    with pytest.raises(DgmrError, match="does not exist"):
        run(demo, demo.module, tmp_path / "nowhere", tmp_path / "r.json")
    with pytest.raises(DgmrError, match="clip_benchmark cannot evaluate"):
        run(demo, demo.module, tmp_path, tmp_path / "r.json")
    with pytest.raises(DgmrError, match="no text tower"):
        evaluate(nn.Linear(2, 2), None, None, dataset="wds/x", root=data, output=tmp_path / "r.json", name="vit")
    with pytest.raises(DgmrError, match="unknown task 'juggling'"):
        run(demo, demo.module, data / "classes", tmp_path / "r.json", task="juggling")
    with pytest.raises(DgmrError, match=r"own\.json does not exist"):
        run(demo, demo.module, data / "classes", tmp_path / "r.json", classnames=tmp_path / "own.json")
    assert not list(tmp_path.iterdir())


def test_a_saved_classifier_stands_in_for_the_text_tower(demo, data, tmp_path):
    options = {"dataset": "wds/test", "root": data / "classes"}
    first = run(demo, demo.module, data / "classes", tmp_path / "a.json", save_classifier=tmp_path / "classes.pt")
    vision = CLIPWithEncoder(timm_tower(), demo.module.encode_image)
    saved = {"output": tmp_path / "b.json", "name": "vit", "load_classifiers": [tmp_path / "classes.pt"]}
    assert evaluate(vision, demo.preprocess, None, **options, **saved) == first
    with pytest.raises(DgmrError, match="no text tower"):
        evaluate(vision, demo.preprocess, None, **options, output=tmp_path / "b.json", name="vit")


def test_an_encoder_without_text_tower_has_a_linear_probe(data, tmp_path, capsys):
    FAMILIES["timm ViT"](tmp_path / "vit")
    shutil.copytree(data / "classes", tmp_path / "set")
    shutil.copytree(data / "classes" / "test", tmp_path / "set" / "train")
    options = {"dataset": "wds/test", "root": tmp_path / "set", "out_dir": tmp_path / "out"}
    commands.evaluate([str(tmp_path / "vit")], task="linear_probe", **options)
    assert "lp_acc1_sklearn" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["table.csv", "vit-wds_test-linear_probe.json"]
    with pytest.raises(DgmrError, match="no text tower"):
        commands.evaluate([str(tmp_path / "vit")], **options)
    with pytest.raises(DgmrError, match="Give one model"):
        commands.evaluate(["demo", "demo"], save_classifier=tmp_path / "c.pt", **options)


def test_own_class_names_and_prompts_are_used(demo, data, tmp_path):
    (tmp_path / "names.json").write_text(json.dumps({"test": CLASSNAMES[::-1]}))
    (tmp_path / "prompts.json").write_text(json.dumps({"test": TEMPLATES[:1]}))
    own = {"classnames": tmp_path / "names.json", "templates": tmp_path / "prompts.json"}
    plain = run(demo, demo.module, data / "classes", tmp_path / "r.json")
    turned = run(demo, demo.module, data / "classes", tmp_path / "r.json", **own)
    assert turned["acc1"] < 0.1 < 0.9 < plain["acc1"], "every name belongs to another class"


def test_the_linear_probe_is_scikit_learns_on_the_embeddings(demo, data, tmp_path):
    shutil.copytree(data / "classes", tmp_path / "set")
    scenes.write_classification(tmp_path / "other", 320, seed=9)
    shutil.move(tmp_path / "other" / "test", tmp_path / "set" / "train")
    metrics = run(demo, demo.module, tmp_path / "set", tmp_path / "r.json", task="linear_probe")
    draws = {seed: [Scene.draw(seed, i) for i in range(count)] for seed, count in ((9, 320), (7, 120))}
    with torch.no_grad():
        train_features, test_features = (
            F.normalize(
                demo.module.encode_image(torch.stack([demo.preprocess(Image.fromarray(s.image())) for s in drawn])),
                dim=-1,
            )
            for drawn in draws.values()
        )
    labels, answers = ([scene.label for scene in drawn] for drawn in draws.values())
    probes = [
        LogisticRegression(max_iter=1000, C=c).fit(train_features, labels).score(test_features, answers)
        for c in (1, 10, 100, 1000)
    ]
    assert (
        any(metrics["lp_acc1_sklearn"] == pytest.approx(score, abs=0.01) for score in probes)
        and metrics["lp_acc1_sklearn"] > 0.5
    )


def test_several_models_in_one_table_and_csv(demo, data, tmp_path, capsys):
    images = torch.stack([demo.preprocess(Image.fromarray(Scene.draw(7, i).image())) for i in range(3)])
    options = {
        "model": "demo",
        "preprocess": demo.preprocess_config,
        "formats": ["onnx", "torchscript"],
        "latency_batches": (),
    }
    assert not failures(export_bundle(export_towers(demo, images), tmp_path, **options))
    options = {"dataset": "wds/test", "root": data / "classes", "out_dir": tmp_path / "out"}
    commands.evaluate(["demo", str(tmp_path / "model.onnx")], **options)
    scores = re.findall(r"^ *(demo|model.onnx) +(0\.\d+)", capsys.readouterr().out, re.M)
    assert [name for name, _ in scores] == ["demo", "model.onnx"] and scores[0][1] == scores[1][1]
    with (tmp_path / "out" / "table.csv").open() as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    stored = json.loads((tmp_path / "out" / "demo-wds_test-zeroshot_classification.json").read_text())["metrics"]
    assert float(rows["model.onnx"]["acc1"]) == float(rows["demo"]["acc1"]) == stored["acc1"] > 0.9
    with pytest.raises(DgmrError, match=r"model\.pt contains code"):
        commands.evaluate([str(tmp_path / "model.pt")], **options)
    commands.evaluate([str(tmp_path / "model.pt")], trust_file=True, **options)
    assert re.search(rf"acc1 +{scores[0][1]}", capsys.readouterr().out)
    (tmp_path / "export.json").unlink()
    with pytest.raises(DgmrError, match="Name the model with --text"):
        load_encoder(str(tmp_path / "model.onnx"))


def test_a_file_is_evaluated_with_the_model_that_it_was_exported_from(demo, tmp_path, monkeypatch):
    place, files = tmp_path / "place", tmp_path / "place" / "files"
    demo.save(place / "model")
    model = open_model(str(place / "model"))
    files.mkdir()
    script = torch.jit.trace(nn.Flatten(), torch.rand(2, 3, 64, 64))
    torch.jit.save(script, files / "model.pt")
    entry = {"sha256": {"model.pt": hashlib.sha256((files / "model.pt").read_bytes()).hexdigest()}}
    origin = {"model": "../model", "model_sha256": state_sha256(model.module)}
    bundle = {**origin, "towers": {"image": {"files": {"pt": entry}}}}
    (files / "export.json").write_text(json.dumps(bundle))

    def source(path):
        return load_encoder(str(path), trusted=True).model.source

    (tmp_path / "model").mkdir()  # of the same relative path, in the working directory
    monkeypatch.chdir(tmp_path)
    (files / "sub").mkdir()
    assert source("place/files/model.pt") == source(files / "sub" / ".." / "model.pt") == place / "model"
    (files / "model.pt").rename(files / "renamed.pt")
    assert source("place/files/renamed.pt") == place / "model"
    moved = tmp_path / "elsewhere" / "files"
    shutil.copytree(files, moved)
    with pytest.raises(DgmrError, match=r"exported from \.\./model, and .*elsewhere/model does not exist.*--text"):
        source(moved / "renamed.pt")
    assert load_encoder(str(moved / "renamed.pt"), text="demo", trusted=True).model.name == "demo"
    other = model.copy()
    with torch.no_grad():
        other.text.token_embedding.weight.mul_(1.01)
    other.save(moved.parent / "model")
    with pytest.raises(DgmrError, match=r"elsewhere/model has other weights than the model that .*--text"):
        source(moved / "renamed.pt")
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.rand(2, 3, 64, 64)), files / "renamed.pt")
    with pytest.raises(DgmrError, match=r"no export.json next to it that describes it\. Name the model with --text"):
        source(files / "renamed.pt")


@pytest.mark.parametrize("task", ["zeroshot_classification", "zeroshot_retrieval", "linear_probe"])
def test_the_result_is_the_one_of_clip_benchmarks_own_command_line(demo, data, tmp_path, task):
    root = tmp_path / "set"
    shutil.copytree(data / ("captions" if task == "zeroshot_retrieval" else "classes"), root)
    if task == "linear_probe":
        shutil.copytree(root / "test", root / "train")
    metrics = run(demo, demo.module, root, tmp_path / "ours.json", task=task)
    options = ["--dataset", "wds/test", "--dataset_root", root, "--task", task, "--no_amp", "--recall_k", 1, 5, 10]
    options += ["--model", "test", "--pretrained", "none", "--num_workers", 0, "--output", tmp_path / "theirs.json"]
    load = lambda **_: (demo.module, demo.preprocess, demo.tokenizer)  # noqa: E731
    run_clip_benchmark(["eval", *map(str, options)], load)
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "theirs.json").read_text()
    assert json.loads((tmp_path / "ours.json").read_text())["metrics"] == metrics


def test_clip_benchmarks_own_command_line_knows_our_models(demo, data, tmp_path):
    expected = run(demo, demo.module, data / "classes", tmp_path / "a.json")
    options = ["--dataset", "wds/test", "--dataset_root", data / "classes"]
    options += [
        "--task",
        "zeroshot_classification",
        "--no_amp",
        "--num_workers",
        0,
        "--output",
        tmp_path / "{model}.json",
    ]
    done = call_command("clip_benchmark", "eval", "--model", "demo", "--pretrained", "none", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "demo.json").read_text())["metrics"] == expected
    assert "Models: [('demo', 'none')]" in done.stdout, "every other argument is clip_benchmark's"
    with pytest.raises(DgmrError, match="unknown model 'nowhere'"):
        run_clip_benchmark(
            ["eval", "--model", "nowhere", "--pretrained", "none", *map(str, options)],
            lambda **_: open_model("nowhere"),
        )


def test_with_few_classes_there_is_no_figure_that_is_not_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels.dataset(("0", "1", "2", "2"))(tmp_path)
    ours = call_command("eval", "demo", "--dataset", "wds/x", "--root", "set", "-o", "out")
    theirs = call_command(*shlex.split(labels.CLIP_BENCHMARK))
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    files = (tmp_path / "out" / "demo-wds_x-zeroshot_classification.json", tmp_path / "out.json")
    stored = [json.loads(file.read_text(), parse_constant=pytest.fail) for file in files]
    assert stored[0] == stored[1] and stored[0]["pretrained"] == "none"
    assert stored[0]["metrics"].keys() == {"acc1", "mean_per_class_recall"}


def test_embeddings_that_are_not_finite_have_no_accuracy(demo, data, tmp_path):
    broken = CLIPWithEncoder(demo.module, lambda images: torch.full((len(images), 128), torch.nan))
    for root in ("classes", "captions"):
        with pytest.raises(DgmrError, match="embeddings of the images are not finite"):
            run(demo, broken, data / root, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_the_zoos_three_figures_are_means(tmp_path):
    recalls = {f"{side}_retrieval_recall@{k}": k / 10 for side in ("text", "image") for k in (1, 5, 10)}
    metrics = {name: {"acc1": i / 10} for i, name in enumerate(CLASSIFICATION)} | dict.fromkeys(RETRIEVAL, recalls)
    figures = zoo_figures(metrics, {"knn@10": 0.5, "knn@20": 0.75})
    assert figures == pytest.approx({"zero-shot": 25.0, "retrieval": 100 * 1.6 / 3, "k-NN": 75.0})
    (tmp_path / "imagenet1k").mkdir()
    with pytest.raises(
        DgmrError,
        match=r"lacks imagenet-a, imagenet-r, imagenetv2, imagenet_sketch, objectnet, flickr30k, mscoco_captions\.",
    ):
        find_zoo(tmp_path)
    with pytest.raises(DgmrError, match="needs the directories train and test"):
        knn_folders(tmp_path)


@pytest.mark.slow
def test_the_zoo_in_two_processes_gives_one_processes_numbers(data, tmp_path):
    root = tmp_path / "zoo"
    for name in (*CLASSIFICATION, *RETRIEVAL):
        shutil.copytree(data / ("classes" if name in CLASSIFICATION else "captions"), root / name)
    scenes.write_classification(tmp_path / "train", 800, seed=11)
    shutil.move(tmp_path / "train" / "test", root / "imagenet1k" / "train")
    options = ["eval", "demo", "--suite", "dgmr-zoo", "--data-root", str(root)]
    one = call_command(*options, "-o", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    assert re.search(r"demo +9\d\.\d +\d+\.\d +\d+\.\d", one.stdout) and "EVA-CLIP-E, DGMR 1.24 B" in one.stdout
    program = [
        str(BIN / "torchrun"),
        "--nproc_per_node",
        "2",
        str(BIN / "dgmr-tp"),
        *options,
        "-o",
        str(tmp_path / "two"),
    ]
    two = subprocess.run(
        program, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert two.returncode == 0, two.stderr[-3000:]
    tables = [[line for line in done.stdout.splitlines() if "s left" not in line] for done in (one, two)]
    assert tables[0] == tables[1]
    for path in (tmp_path / "one").glob("*.json"):
        assert (
            json.loads((tmp_path / "two" / path.name).read_text())["metrics"] == json.loads(path.read_text())["metrics"]
        )
    assert len(list((tmp_path / "two").iterdir())) == 10


def test_flops_and_parameters_follow_the_arithmetic(tower):
    width, hidden, tokens, patches = 48, 192, 17, 16
    block = 4 * width * width + 2 * width * hidden
    macs = 3 * (tokens * block + 2 * tokens * tokens * width) + patches * 3 * 64 * width
    assert flops(tower, 32) == pytest.approx(2 * macs, rel=0.01)
    assert parameters(tower) == sum(tensor.numel() for tensor in tower.state_dict().values())
