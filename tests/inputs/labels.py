"""Labels, class names, prompts and captions that are given for an accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from inputs import Case, picture, pictures, tar

EVAL = "eval demo --dataset wds/x --root set -o out"
CLIP_BENCHMARK = (
    "clip_benchmark eval --model demo --dataset wds/x --dataset_root set --task zeroshot_classification --no_amp "
    "--num_workers 0 --output out.json"
)
LABELS = ("0", "1", "2")
NAMES = "cat\ndog\nhorse\n"
PROMPTS = "a photo of a {c}.\n"


def members(labels: tuple[str | None, ...], suffix: str = "cls", name: str = "{}") -> dict[str, bytes]:
    content = {}
    for index, label in enumerate(labels):
        content[f"{name.format(index)}.png"] = picture(index)
        if label is not None:
            content[f"{name.format(index)}.{suffix}"] = label.encode()
    return content


def dataset(
    labels: tuple[str | None, ...] = LABELS,
    files: Mapping[str, str | bytes] | None = None,
    root: str = "set",
    **options: str,
) -> Callable[[Path], None]:
    """Return a function that writes a webdataset directory with some of its files replaced."""

    def make(folder: Path) -> None:
        tar(folder / root / "test" / "0.tar", members(labels, **options))
        defaults = {"classnames.txt": NAMES, "zeroshot_classification_templates.txt": PROMPTS, "test/nshards.txt": "1"}
        for name, content in {**defaults, **(files or {})}.items():
            (folder / root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def tar_of(content: dict[str, bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        dataset()(folder)
        tar(folder / "set" / "test" / "0.tar", content)

    return make


def shards_missing(folder: Path) -> None:
    dataset()(folder)
    (folder / "set" / "test" / "nshards.txt").write_text("2")


def own_prompts(prompts: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        dataset()(folder)
        (folder / "own.json").write_text(json.dumps({"x": prompts}))

    return make


def saved_classes(folder: Path) -> None:
    dataset()(folder)
    torch.save(torch.ones(128, 2), folder / "classes.pt")


def knn_with_empty_label(folder: Path) -> None:
    tar(folder / "set.tar", members(("0", "1") * 5 + (" \n",)))


def classes_for_compare(name: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pictures(folder, ["images/0.png"])
        (folder / "classnames.txt").write_text(NAMES)
        (folder / name).write_text(content)

    return make


def one_output(folder: Path) -> None:
    pictures(folder, [f"images/{name}/0.png" for name in ("cat", "dog")])
    torch.save({"weight": torch.ones(1, 128), "bias": torch.ones(1)}, folder / "head.pt")


TEMPLATES = "zeroshot_classification_templates.txt"
WRONG = {
    "fewer names than labels": (dataset(files={"classnames.txt": "cat\ndog\n"}), "are 0 to 2, but there are 2 classes"),
    "labels from one": (dataset(("1", "2", "3")), "are 1 to 3, but there are 3 classes, 0 to 2. Labels count from 0."),
    "one class name": (dataset(("0", "0"), {"classnames.txt": "cat"}), "names 1 classes. Give at least two"),
    "empty line in class names": (
        dataset(files={"classnames.txt": "cat\n\nhorse\n"}),
        "the name of class 1 in set/classnames.txt is empty",
    ),
    "class names of another encoding": (
        dataset(files={"classnames.txt": "caf\u00e9\nbar\nzoo".encode("latin-1")}),
        "cannot read the class names set/classnames.txt",
    ),
    "empty prompts": (dataset(files={TEMPLATES: "\n"}), "has no prompts. Write one per line"),
    "empty label": (dataset(("0", "1", "")), "the label of set/test/0.tar:2.png is not a number: its .cls is empty"),
    "word for a label": (
        dataset(("0", "1", "cat")),
        "0.tar:2.png is not a number: its .cls is 'cat'. Write the number",
    ),
    "no label": (dataset(("0", "1", None)), "0.tar:2.png is not a number: it has no .cls"),
    "shard missing": (shards_missing, "set/test/1.tar does not exist"),
    "number of shards missing": (dataset(files={"test/nshards.txt": ""}), "does not contain the number of shards"),
    "damaged image": (
        tar_of(members(LABELS) | {"1.png": b"no picture"}),
        "the image set/test/0.tar:1.png does not decode",
    ),
    "no shards": (dataset(files={"test/nshards.txt": "0"}), "does not contain the number of shards (it says 0)"),
    "form feed in a class name": (
        dataset(files={"classnames.txt": "cat\x0cx\ndog\n"}),
        "are 0 to 2, but there are 2 classes",
    ),
    "underscore in a label": (dataset(("0", "1", "0_2")), "0.tar:2.png is not a number: its .cls is '0_2'"),
    "unknown kind": (dataset(files={"dataset_type.txt": "retreival"}), "dataset_type.txt states the kind 'retreival'"),
}
RIGHT = {
    "class names with a byte order mark": dataset(files={"classnames.txt": b"\xef\xbb\xbf" + NAMES.encode()}),
    "dots in names": dataset(name="22.0{}"),
    "side files of macOS": tar_of(
        members(LABELS) | {f"__MACOSX/._{index}.png": b"\0\5\x16\7" for index in range(3)} | {"._0.png": b"\0\5\x16\7"}
    ),
    "several files of a sample": tar_of(members(LABELS) | {"0.seg.png": picture(), "0.json": b"{}"}),
}

BY_BOTH = ("one class name", "word for a label")
"""Cases that are tried with clip_benchmark's command line too."""


def arrays(change: Callable[[np.ndarray], np.ndarray], classes: object = None) -> Callable[[Path], None]:
    """Return a function that writes embeddings, changed embeddings, and class embeddings."""

    def make(folder: Path) -> None:
        old = np.random.default_rng(0).standard_normal((120, 16), np.float32)
        np.save(folder / "old.npy", old)
        np.save(folder / "new.npy", change(old))
        torch.save(classes, folder / "classes.pt")

    return make


CASES = [
    *[Case(name, EVAL, make, says=says) for name, (make, says) in WRONG.items()],
    *[Case(name, EVAL, make, code=0, says="acc1", leaves=("out",)) for name, make in RIGHT.items()],
    *[Case(f"{name}, clip_benchmark", CLIP_BENCHMARK, WRONG[name][0], says=WRONG[name][1]) for name in BY_BOTH],
    Case("one shard and two workers", f"{EVAL} --workers 2", dataset(), code=0, says="acc1", leaves=("out",)),
    Case(
        "one shard and two workers, clip_benchmark",
        CLIP_BENCHMARK.replace("workers 0", "workers 2"),
        dataset(),
        code=0,
        leaves=("out.json",),
    ),
    Case(
        "damaged image and two workers",
        f"{EVAL} --workers 2",
        tar_of(members(LABELS) | {"1.png": b"no picture"}),
        says="dgmr-tp: the image set/test/0.tar:1.png does not decode",
    ),
    Case(
        "kind in capitals",
        EVAL,
        dataset(("a cat",) * 10, {"dataset_type.txt": "Retrieval\n"}, suffix="txt"),
        code=0,
        says="image_retrieval_recall@1",
        leaves=("out",),
    ),
    Case(
        "few images with captions",
        EVAL,
        dataset(("a cat", "a dog"), {"dataset_type.txt": "retrieval"}, suffix="txt"),
        says="has 2 images, and recall@10 needs at least 10",
    ),
    Case(
        "image without caption",
        EVAL,
        dataset(("a cat", "\n"), {"dataset_type.txt": "retrieval"}, suffix="txt"),
        says="the image set/test/0.tar:1.png has no caption",
    ),
    Case(
        "braces in the root",
        EVAL.replace("root set", "root 'a{1}'"),
        dataset(root="a{1}"),
        code=0,
        says="acc1",
        leaves=("out",),
    ),
    Case(
        "name in the root", EVAL.replace("root set", "root 'se{dataset}'"), dataset(root="sex"), code=0, leaves=("out",)
    ),
    Case(
        "own names are no JSON",
        f"{EVAL} --classnames set/classnames.txt",
        dataset(),
        says="cannot read set/classnames.txt",
    ),
    Case("own prompts are empty", f"{EVAL} --templates own.json", own_prompts([]), says="own.json has no entry for x"),
    Case(
        "own prompts of some classes",
        f"{EVAL} --templates own.json",
        own_prompts({"cat": ["a cat"]}),
        says="for 2 of 3",
    ),
    Case(
        "fewer own class names",
        f"{EVAL} --classnames own.json",
        own_prompts(["a", "b"]),
        says="but there are 2 classes",
    ),
    Case(
        "saved classes of another data set",
        f"{EVAL} --load-classifier classes.pt",
        saved_classes,
        says="classes.pt has the embeddings of 2 classes, but wds/x in set has 3",
    ),
    Case(
        "weights that a model does not take",
        f"{CLIP_BENCHMARK} --pretrained openai",
        dataset(),
        says="--pretrained openai is not used, because demo has weights of its own",
    ),
    Case(
        "empty label for neighbors",
        "eval demo --knn-train set.tar --knn-test set.tar -o out",
        knn_with_empty_label,
        says="set.tar:10.png has no class: its .cls is empty",
    ),
    Case(
        "empty class names for a comparison",
        "compare demo demo --images images --classes classnames.txt -o out",
        classes_for_compare("classnames.txt", "\n"),
        says="classnames.txt names 0 classes",
    ),
    Case(
        "empty prompts for a comparison",
        "compare demo demo --images images --classes classnames.txt -o out",
        classes_for_compare(TEMPLATES, ""),
        says=f"{TEMPLATES} has no prompts",
    ),
    Case(
        "byte order of another machine",
        "compare old.npy new.npy -o out",
        arrays(lambda old: old.astype(">f4")),
        code=0,
        says="keep the index: neighbors 100.0 %",
        leaves=("out",),
    ),
    Case(
        "bits of float16 as integers",
        "compare old.npy new.npy -o out",
        arrays(lambda old: old.astype(np.float16).view(np.uint16)),
        says="new.npy holds uint16 values",
    ),
    Case(
        "complex numbers", "compare old.npy new.npy -o out", arrays(lambda old: old + 0j), says="holds complex64 values"
    ),
    Case(
        "dictionary as class embeddings",
        "compare old.npy new.npy --classes classes.pt -o out",
        arrays(lambda old: old, classes={"a": 1}),
        says="it is not a tensor",
    ),
    Case(
        "class embeddings of zeros",
        "compare old.npy new.npy --classes classes.pt -o out",
        arrays(lambda old: old, classes=torch.zeros(16, 3)),
        says="or a class is all zeros",
    ),
    Case(
        "classifier with one output",
        "eval demo --head-test images --head head.pt -o out",
        one_output,
        says="the classifier has one output",
    ),
]
