"""Folders, tars and URLs that are given as images."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from inputs import Case, picture, pictures, tar

PLAN = "plan --criterion l1 --images"
"""The fastest command that reads images."""
FLAT = [f"images/{index}.png" for index in range(3)]
CLASSES = [f"images/{name}/{index}.png" for name in ("cat", "dog") for index in range(6)]
KNN = "eval demo --knn-train images --knn-test images -o out"
RECIPE = {"name": "r", "model": "demo", "images": "images", "prune": {"mlp_ratio": 1}}


def with_file(names: list[str], place: str, content: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pictures(folder, names)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)

    return make


def claims_size(width: int, height: int) -> bytes:
    """Return a PNG whose header states a size that its data does not have."""
    data = bytearray(picture())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def thin() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (200_000, 1)).save(data, "PNG")
    return data.getvalue()


def shards(folder: Path) -> None:
    for shard in range(2):
        tar(folder / "train" / f"{shard}.tar", {f"{index}.png": picture(index) for index in range(6)})


def classes_in_a_tar(folder: Path) -> None:
    names = [f"train/{name}/images/{index}.png" for name in ("cat", "dog") for index in range(6)]
    tar(folder / "images.tar", {f"./{name}": picture(index) for index, name in enumerate(names)})


def tar_with_link(folder: Path) -> None:
    with tarfile.open(folder / "images.tar", "w") as archive:
        for name, target in (("0.png", ""), ("1.png", "/data/1.png")):
            entry = tarfile.TarInfo(name)
            data = b"" if target else picture()
            entry.size, entry.type, entry.linkname = len(data), tarfile.SYMTYPE if target else tarfile.REGTYPE, target
            archive.addfile(entry, io.BytesIO(data))


def dangling_link(folder: Path) -> None:
    pictures(folder, FLAT)
    (folder / "images" / "4.png").symlink_to(folder / "moved" / "4.png")


def recipe(base: str | None = None, **changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pictures(folder, FLAT)
        content = {**RECIPE, **changes}
        (folder / "r.yaml").write_text(json.dumps(content))
        if base:
            (folder / "r.yaml").rename(folder / base)
            (folder / "r.yaml").write_text(json.dumps({"base": base}))

    return make


def trusted_recipe(folder: Path) -> None:
    recipe(images="pipe:touch ran; cat train/{0..1}.tar", recover={"images": 10})(folder)
    shards(folder)


def run_directory(folder: Path) -> None:
    distill = {"processes": 1, "steps": 1, "batch_size": 2, "base_lr": 1e-3}
    content = {**RECIPE, "model": {"source": "demo"}, "images": "pipe:touch ran", "distill": distill}
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps(content))


CASES = [
    Case(
        "folders inside class folders",
        KNN,
        lambda folder: pictures(folder, [name.replace("/", "/x/").replace("images/x", "images") for name in CLASSES]),
        code=0,
        says="images: the first level of folders gives 2 classes, not the levels below (cat/x)",
        leaves=("out",),
    ),
    Case(
        "one class folder",
        KNN,
        lambda folder: pictures(folder, [f"images/all/{index}.png" for index in range(12)]),
        says="all 12 images of images have one class, all, and an accuracy needs at least 2. Give the folder whose",
    ),
    Case(
        "one class for a quality target",
        "prune --recover images --max-drop 5% --held-out 50 --calibration-images 10 -o out",
        lambda folder: pictures(folder, [f"images/all/{index}.png" for index in range(60)]),
        says="have one class, all",
    ),
    Case(
        "one class for a classifier",
        "eval demo --head-train images --head-test images -o out",
        lambda folder: pictures(folder, [f"images/all/{index}.png" for index in range(12)]),
        says="have one class, all",
    ),
    Case(
        "too few images for neighbors",
        KNN,
        lambda folder: pictures(folder, [f"images/{name}/0.png" for name in ("cat", "dog")]),
        says="images has 2 images that decode, and 10 neighbors are the fewest that vote",
    ),
    Case(
        "classes in a tar",
        KNN.replace("images", "images.tar"),
        classes_in_a_tar,
        code=0,
        says="knn@10",
        leaves=("out",),
    ),
    Case("unset variable", 'prune --recover "" -o out', says="the argument after --recover is empty"),
    Case("unset variable after =", "rank --images= -o ranks", says="--images is empty"),
    Case(
        "unset variable as a path", 'eval demo --knn-train "" --knn-test ""', says="the argument after --knn-train is"
    ),
    Case("unset variable in a recipe", "run r.yaml", recipe(images=" "), says="images: the value is empty"),
    Case(
        "unset variable deep in a recipe",
        "run r.yaml",
        recipe(evaluate={"knn": {"train": "", "test": "images"}}),
        says="evaluate.knn.train: the value is empty",
    ),
    Case("unset variable for a model", "run r.yaml", recipe(model=""), says="model.source: the value is empty"),
    Case("braces", f"{PLAN} 'train/{{0..1}}.tar'", shards, code=0, says="GFLOPs per image"),
    Case("braces and no such shard", f"{PLAN} 'train/{{0..2}}.tar'", shards, says="train/2.tar does not exist"),
    Case("braces in a folder's name", f"{PLAN} 'a{{1}}'", lambda f: pictures(f, ["a{1}/0.png"]), code=0, says="GFLOPs"),
    Case("braces in a recipe", "run r.yaml --dry-run", recipe(images="images/{0,1}.png"), code=0, says="images"),
    Case(
        "pixels without end",
        f"{PLAN} images",
        with_file(FLAT, "images/bomb.png", claims_size(60_000, 60_000)),
        code=0,
        says="skipped 1 images that do not decode and 0 files that are not images the first image: images/bomb.png:",
    ),
    Case(
        "a line of pixels",
        f"{PLAN} images",
        with_file(FLAT, "images/line.png", thin()),
        code=0,
        says="images/line.png: its sides of 200000 and 1 pixels differ by a factor of more than 100",
    ),
    Case(
        "photos of a telephone",
        f"{PLAN} images",
        with_file([], "images/1.HEIC", b"\0\0\0\x18ftypheic"),
        says="images contains no image (1 other files): .heic 1.",
    ),
    Case(
        "other files next to classes",
        KNN,
        with_file(CLASSES, "images/cat/1.json", b"{}"),
        code=0,
        says="images: 1 other files: .json 1",
        leaves=("out",),
    ),
    Case("link to nothing", f"{PLAN} images", dangling_link, code=0, says="images/4.png: [Errno 2]"),
    Case("link in a tar", f"{PLAN} images.tar", tar_with_link, code=0, says="1 other files: link in a tar 1"),
    Case("name of a tar in capitals", f"{PLAN} A.TAR", lambda f: tar(f / "A.TAR", {"0.png": picture()}), code=0),
    Case(
        "URL where images are numbered",
        "eval demo --knn-train https://host/{0..3}.tar --knn-test images -o out",
        says="https://host/{0..3}.tar is a URL of shards",
    ),
    Case(
        "URL in a key that takes files",
        "run r.yaml",
        recipe(compare={"images": "pipe:touch ran"}),
        says="compare.images: a URL of shards is not read here",
    ),
    Case(
        "shell command in a recipe",
        "run r.yaml",
        recipe(images="pipe:touch ran", recover={}),
        says="images: pipe:touch ran runs a shell command on this machine. Read it, and give --trust-recipe",
    ),
    Case(
        "dry run of a recipe with a shell command",
        "run r.yaml --dry-run",
        recipe(images="pipe:touch ran", recover={}),
        code=0,
        says="shell command, needs --trust-recipe: images",
    ),
    Case(
        "shell command in a recipe that is trusted",
        "run r.yaml --trust-recipe -o run",
        trusted_recipe,
        code=0,
        says="recover/mlp_ratio-1: done",
        leaves=("run", "ran"),
    ),
    Case(
        "shell command in a URL",
        "run r.yaml",
        recipe(images="https://host/'; touch ran; '.tar"),
        says="runs a shell command",
    ),
    Case(
        "shell command in the recipe that is extended",
        "run r.yaml",
        recipe("b.yaml", images="pipe:touch ran"),
        says="runs a shell command",
    ),
    Case(
        "shell command by --set",
        "run r.yaml --set images='pipe:touch ran'",
        recipe(),
        says="images: pipe:touch ran runs a shell command",
    ),
    Case("shell command in a run directory", "distill run", run_directory, says="images: pipe:touch ran runs a shell"),
    Case(
        "shell command that the user typed",
        f"{PLAN} 'pipe:cat train/{{0..1}}.tar; touch ran'",
        shards,
        code=0,
        says="GFLOPs per image",
        leaves=("ran",),
    ),
]
