"""The bridge to clip_benchmark gives clip_benchmark's numbers, and they are right."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgmr_tp import DgmrError, open_model
from dgmr_tp.data import scenes
from dgmr_tp.data.scenes import CLASSNAMES, TEMPLATES, Scene
from dgmr_tp.evaluation.zero_shot import CLIPWithEncoder, evaluate
from dgmr_tp.pruning.cost import flops, parameters


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
    return evaluate(clip, model.preprocess, model.tokenizer, dataset="wds/test", root=root, output=output, name="test", **options)


def test_top1_is_what_a_direct_computation_gives(demo, data, tmp_path):
    drawn = [Scene.draw(7, i) for i in range(120)]
    from PIL import Image

    images = torch.stack([demo.preprocess(Image.fromarray(scene.image())) for scene in drawn])
    with torch.no_grad():
        embedding = F.normalize(demo.module.encode_image(images), dim=-1)
        classes = []
        for name in CLASSNAMES:
            prompts = F.normalize(demo.module.encode_text(demo.tokenizer([t.format(c=name) for t in TEMPLATES])), dim=-1)
            classes.append(F.normalize(prompts.mean(0), dim=0))
    top1 = np.mean((embedding @ torch.stack(classes).T).argmax(1).numpy() == [scene.label for scene in drawn])
    metrics = run(demo, demo.module, data / "classes", tmp_path / "a" / "r.json")
    assert metrics["acc1"] == pytest.approx(top1, abs=1e-9)
    kept = json.loads((tmp_path / "a" / "r.json").read_text())
    assert kept["metrics"] == metrics and kept["task"] == "zeroshot_classification" and kept["model"] == "test"


def test_retrieval_is_found_by_the_folder_and_has_three_recalls(demo, data, tmp_path):
    metrics = run(demo, demo.module, data / "captions", tmp_path / "r.json")
    assert {f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)} <= metrics.keys()
    assert metrics["text_retrieval_recall@1"] <= metrics["text_retrieval_recall@5"] <= metrics["text_retrieval_recall@10"]


def test_another_image_encoder_is_really_used(demo, data, tmp_path):
    same = CLIPWithEncoder(demo.module, demo.module.encode_image)
    constant = CLIPWithEncoder(demo.module, lambda images: torch.ones(len(images), 128))
    accuracy = [run(demo, clip, data / "classes", tmp_path / "r.json")["acc1"] for clip in (demo.module, same, constant)]
    assert accuracy[0] == accuracy[1] and accuracy[2] < 0.1 < accuracy[0]


def test_what_cannot_be_evaluated_is_refused(demo, data, tmp_path):
    with pytest.raises(DgmrError, match="does not exist"):
        run(demo, demo.module, tmp_path / "nowhere", tmp_path / "r.json")
    with pytest.raises(DgmrError, match="clip_benchmark cannot evaluate"):
        run(demo, demo.module, tmp_path, tmp_path / "r.json")
    with pytest.raises(DgmrError, match="no text tower"):
        evaluate(nn.Linear(2, 2), None, None, dataset="wds/x", root=data, output=tmp_path / "r.json", name="vit")
    with pytest.raises(DgmrError, match="refused"):
        run(demo, demo.module, data / "classes", tmp_path / "r.json", task="juggling")
    assert not list(tmp_path.iterdir())


def test_flops_and_parameters_follow_the_arithmetic(tower):
    width, hidden, tokens, patches = 48, 192, 17, 16
    block = 4 * width * width + 2 * width * hidden
    macs = 3 * (tokens * block + 2 * tokens * tokens * width) + patches * 3 * 64 * width
    assert flops(tower, 32) == pytest.approx(2 * macs, rel=0.01)
    assert parameters(tower) == sum(tensor.numel() for tensor in tower.state_dict().values())
