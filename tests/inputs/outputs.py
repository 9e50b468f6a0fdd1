"""Outputs that cannot be written, and files of this package that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from inputs import Case, pictures

PRUNE = "prune --mlp-ratio 1"
LONG = "n" * 240


def _text(name: str, content: str = "{}") -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")

    return make


def _dangling(folder: Path) -> None:
    (folder / "out").symlink_to(folder / "nowhere")


def _images(folder: Path) -> None:
    pictures(folder, [f"im/{i}.png" for i in range(12)])


def _left_over(folder: Path) -> None:
    (folder / ".out.partial" / "trunk").mkdir(parents=True)
    (folder / ".out.partial" / "open_clip_model.safetensors").write_bytes(b"half")
    (folder / ".out.partial" / "lock").touch()


def _left_over_rankings(folder: Path) -> None:
    _images(folder)
    (folder / ".r.safetensors.partial").write_bytes(b"half")


def _exported_elsewhere(folder: Path) -> None:
    (folder / "out" / ".export.partial" / "image onnx").mkdir(parents=True)
    (folder / "out" / "export.json").write_text('{"towers": []}')


RUN = {"name": "r", "model": "demo", "images": ".", "prune": {"keep": [8]}}


def _damaged_manifest(folder: Path) -> None:
    (folder / "run/prune/keep-8").mkdir(parents=True)
    (folder / "run/recipe.json").write_text(json.dumps(RUN))
    (folder / "run/prune/keep-8/manifest.json").write_text("[]")


CASES = [
    Case("output in a directory that does not exist", f"{PRUNE} -o no/out", says="no for out does not exist. Make it"),
    Case("output below a file", f"{PRUNE} -o f/out", _text("f"), says="f is a file. Name another output."),
    Case("output over a dangling link", f"{PRUNE} -o out", _dangling, says="out is a link to"),
    Case("output with a name that is too long", f"{PRUNE} -o {LONG}", says="is too long for"),
    Case("plan over a directory", "plan -o .", says="Invalid value for '--out' / '-o': . is not a file"),
    Case("plan below a file", "plan -o f/p.json", _text("f"), says="f is a file. Name another output."),
    Case("plan in a directory that does not exist", "plan -o no/p.json", says="does not exist. Make it first."),
    Case("plan over a plan", "plan -o p.json", _text("p.json", "old"), code=0),
    Case("rankings below a file", "rank --images . -o f/r", _text("f"), says="f is a file. Name another output."),
    Case("search below a file", "amp --images . -o f/r", _text("f"), says="f is a file. Name another output."),
    Case("stream below a file", f"{PRUNE} --stream -o f/o", _text("f"), says="f is a file. Name another output."),
    Case("results below a file", "eval demo --knn-train . --knn-test . -o f/o", _text("f"), says="f is a file."),
    Case("comparison below a file", "compare demo demo --images . -o f/o", _text("f"), says="f is a file."),
    Case("export below a file", "export demo -o f/o", _text("f"), says="f is a file. Name another output."),
    Case("run below a file", "run quickstart -o f/o", _text("f"), says="f is a file. Name another output."),
    Case("recipe below a file", "recipes copy quickstart f/r.yaml", _text("f"), says="f is a file."),
    Case(
        "staging directory of a killed process",
        f"{PRUNE} -o out",
        _left_over,
        code=0,
        says="parameters",
        leaves=("out",),
    ),
    Case(
        "staging file of a killed process",
        "rank --images im --calibration-images 12 -o r.safetensors",
        _left_over_rankings,
        code=0,
        says="written: r.safetensors",
        leaves=("r.safetensors",),
    ),
    Case(
        "export.json of another program",
        "export demo -o out --formats torchscript",
        _exported_elsewhere,
        says="out/export.json is damaged: AttributeError",
    ),
    Case("plan that is no JSON", f"{PRUNE[:5]} -o out --plan p", _text("p", "nothing"), says="p: this is not a plan"),
    Case("plan that is a list", "prune -o out --plan p", _text("p", "[1]"), says="p: this is not a plan"),
    Case("plan nested deeply", "prune -o out --plan p", _text("p", "[" * 100_000), says="p: this is not a plan"),
    Case(
        "plan in Latin-1",
        "prune -o out --plan p",
        lambda folder: (folder / "p").write_bytes(b'{"a": "\xe9"}'),
        says="p is not a text in UTF-8",
    ),
    Case("rankings that are a text", "plan --rankings r", _text("r", "x" * 99), says="cannot read the rankings r"),
    Case("manifest that is a list", "report run", _damaged_manifest, says="manifest.json is damaged: TypeError"),
    Case("recipe.json that is a list", "report run", _text("run/recipe.json", "[1]"), says="recipe.json is damaged"),
    Case("recipe.json that is empty", "report run", _text("run/recipe.json", ""), says="recipe.json is damaged"),
    Case(
        "export.json that is no JSON",
        "eval f/model.onnx --knn-train . --knn-test .",
        lambda folder: (_text("f/export.json", "{")(folder), _text("f/model.onnx", "")(folder)),
        says="f/model.onnx",
    ),
]
