"""Recipes and ``--set`` options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from inputs import Case

RECIPE = "name: test\nmodel: demo\nimages: IMAGES\nprune:\n  mlp_ratio: 1\n"
DRY = "run r.yaml --dry-run"


def recipe(old: str = "", new: str = "") -> Callable[[Path], object]:
    """Return a function that writes ``RECIPE`` with ``old`` replaced by ``new`` to ``r.yaml``."""
    assert old in RECIPE
    return lambda folder: (folder / "r.yaml").write_text(RECIPE.replace(old, new, 1), "utf-8")


def append(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "r.yaml").write_text(RECIPE + text, "utf-8")


def accepted(name: str, make: Callable[[Path], object], says: str, command: str = DRY) -> Case:
    return Case(name, command, make, code=0, says=says)


def sizes(value: str) -> Callable[[Path], object]:
    return recipe("mlp_ratio: 1", f"mlp_ratio: {value}")


def _laughs(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (folder / "r.yaml").write_text(RECIPE + "\n".join(lines), "utf-8")


def _cycle_by_another_path(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "r.yaml").write_text("base: sub/../r.yaml\n", "utf-8")


CASES = [
    Case("recipe: key twice", DRY, append("seed: 1\nseed: 2\n"), says="r.yaml, line 7: the key seed is given twice"),
    Case(
        "recipe: nested key twice",
        DRY,
        recipe("  mlp_ratio: 1", "  mlp_ratio: 1\n  mlp_ratio: 2"),
        says="line 6: the key mlp_ratio is given twice, first in line 5",
    ),
    Case(
        "recipe: block number twice",
        DRY,
        append("distill: {steps: 1, batch_size: 1, base_lr: 1, loss: {layers: {1: 1, 01: 2}}}\n"),
        says="line 6: the key 1 is given twice",
    ),
    Case("recipe: yes for a number", DRY, sizes("yes"), says="line 5: prune.mlp_ratio"),
    Case("recipe: on for a number", DRY, sizes("on"), says="got 'on'"),
    Case("recipe: true for a number", DRY, sizes("true"), says="true and false are not numbers, got True"),
    Case("recipe: true in a list of numbers", DRY, sizes("[true, 2]"), says="true and false are not numbers"),
    Case("recipe: true for a seed", DRY, append("seed: true\n"), says="line 6: seed: true and false are not numbers"),
    Case(
        "recipe: true in a budget",
        DRY,
        recipe("mlp_ratio: 1", "budget: {params: true}"),
        says="line 5: prune.budget: true and false are not numbers",
    ),
    Case("recipe: yes for a boolean", DRY, append("export: {text: yes, formats: [onnx]}\n"), code=0, says="text: true"),
    Case("recipe: time for a number", DRY, sizes("1:30"), says="got '1:30'"),
    Case("recipe: date for a number", DRY, append("seed: 2026-01-01\n"), says="got '2026-01-01'"),
    accepted("recipe: date as a name", recipe("name: test", "name: 2026-01-01"), "name: '2026-01-01'"),
    accepted("recipe: leading zero", append("seed: 010\n"), "seed: 10"),
    accepted("recipe: octal", append("seed: 0o10\n"), "seed: 8"),
    accepted("recipe: exponent", append("recover: {damping: 1e-2}\n"), "damping: 0.01"),
    accepted("recipe: byte order mark", recipe("name: test", "\ufeffname: test"), "name: test"),
    accepted(
        "recipe: merge key",
        append("recover: &r {images: 20}\ntune_text:\nscenes:\nevaluate: {knn: {<<: {train: a}, test: b}}\n"),
        "train: a",
    ),
    Case("recipe: NaN", DRY, sizes(".nan"), says="line 5: prune.mlp_ratio: Input should be a finite number"),
    Case(
        "recipe: infinity", DRY, append("recover: {damping: .inf}\n"), says="recover.damping: Input should be a finite"
    ),
    Case(
        "recipe: nan as a text",
        DRY,
        append("recover: {damping: nan}\n"),
        says="recover.damping: Input should be a finite",
    ),
    Case("recipe: NaN in a budget", DRY, recipe("mlp_ratio: 1", "budget: {params: .nan}"), says="finite number"),
    Case(
        "recipe: negative weight of a block",
        DRY,
        append("distill: {steps: 1, batch_size: 1, base_lr: 1, loss: {layers: {1: -1}}}\n"),
        says="distill.loss.layers.1: Input should be greater than or equal to 0, got -1",
    ),
    Case(
        "recipe: tolerance of zero",
        DRY,
        append("export: {tolerance: {onnx: 0}}\n"),
        says="export.tolerance.onnx: Input should be greater than 0",
    ),
    Case(
        "recipe: format twice",
        DRY,
        append("export: {formats: [onnx, onnx]}\n"),
        says="export.formats: onnx is given twice",
    ),
    Case("recipe: alias to itself", DRY, append("evaluate: &e {datasets: [*e]}\n"), says="line 6: an alias refers to"),
    Case("recipe: aliases that multiply", DRY, _laughs, says="aliases stand for more than 100,000 values"),
    Case("recipe: nested deeply", DRY, append("seed: " + "[" * 3000 + "\n"), says="nested deeper than 100"),
    Case(
        "recipe: tag of Python",
        DRY,
        append("seed: !!python/object/apply:os.getpid []\n"),
        says="line 6: the tag !!python",
    ),
    Case("recipe: own tag", DRY, append("seed: !env SEED\n"), says="line 6: the tag !env is not allowed"),
    Case(
        "recipe: number of thousands of digits",
        DRY,
        append("seed: " + "9" * 5000 + "\n"),
        says="r.yaml: Exceeds the limit",
    ),
    Case("recipe: key that is a list", DRY, append("? [a]\n: b\n"), says="line 6: the key is not a name"),
    Case("recipe: control character", DRY, append("seed: \x07\n"), says="r.yaml: this is not YAML"),
    Case("recipe: two documents", DRY, append("---\nseed: 1\n"), says="this is not YAML: but found another document"),
    Case(
        "recipe: UTF-16",
        DRY,
        lambda folder: (folder / "r.yaml").write_text(RECIPE, "utf-16"),
        says="a YAML file in UTF-8",
    ),
    Case("recipe: directory", "run d", lambda folder: (folder / "d").mkdir(), says="the recipe d is a directory"),
    Case("recipe: extends itself by another path", DRY, _cycle_by_another_path, says="the recipe extends itself"),
    Case("recipe: empty name", "run r.yaml", recipe("test", "''"), says="line 1: name: the value is empty"),
    Case("recipe: name outside runs", "run r.yaml", recipe("test", "../../up"), says="without slashes"),
    Case("recipe: name of the parent", "run r.yaml", recipe("test", ".."), says="without slashes"),
    Case("recipe: name with a control character", "run r.yaml", recipe("test", '"a\\tb"'), says="without slashes"),
    Case("recipe: name too long", "run r.yaml", recipe("test", "n" * 300), says="up to 200 bytes"),
    Case("recipe: empty path", DRY, recipe("IMAGES", "''"), says="line 3: images: the value is empty"),
    Case("recipe: empty weights", DRY, recipe("demo", "{source: 'timm:x', pretrained: ''}"), says="the value is empty"),
    Case(
        "recipe: file where a directory is needed",
        "run r.yaml",
        append(
            "evaluate: {datasets: [{dataset: wds/x, root: r.yaml}]}\nscenes: {images: 9, classes: 9, captions: 10}\n"
        ),
        says="images: IMAGES does not exist",
    ),
    Case(
        "recipe: directory where a file is needed",
        "run r.yaml --set images=. --set 'distill={steps: 1, batch_size: 1, base_lr: 1, deepspeed: .}'",
        recipe(),
        says="distill.deepspeed: . is not a file. Correct the path.",
    ),
    Case("--set: key twice", f"{DRY} --set seed=1 --set seed=2", recipe(), says="--set seed is given more than once"),
    Case(
        "--set: duplicate key in a value",
        f"{DRY} --set 'recover={{images: 20, images: 30}}'",
        recipe(),
        says="images is given twice",
    ),
    Case(
        "--set: yes for a number",
        f"{DRY} --set prune.mlp_ratio=yes",
        recipe(),
        says="--set prune.mlp_ratio: prune.mlp_ratio",
    ),
    Case(
        "--set: NaN",
        f"{DRY} --set recover.damping=.nan",
        recipe(),
        says="--set recover.damping: recover.damping: Input should be a finite",
    ),
    Case("--set: alias to itself", f"{DRY} --set 'recover=&a [*a]'", recipe(), says="an alias refers to"),
    Case(
        "--set: tag",
        f"{DRY} --set 'seed=!!binary aGk='",
        recipe(),
        says="--set seed=!!binary aGk=: the tag !!binary is not",
    ),
    Case("--set: empty part of a key", f"{DRY} --set recover..images=20", recipe(), says="write it as key=value"),
    Case("--set: base", f"{DRY} --set base=quickstart", recipe(), says="a recipe is extended in a file only"),
    Case("--set: name outside runs", "run r.yaml --set name=../x", recipe(), says="--set name: name: the name is also"),
    accepted("--set: exponent", recipe(), "damping: 0.001", f"{DRY} --set recover.damping=1e-3"),
]
