"""Prints docs/recipe.md: every key of a recipe, its default and its meaning, from dgmr_tp/recipe.py.

python docs/recipe_keys.py > docs/recipe.md
"""

from __future__ import annotations

import json
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dgmr_tp.pipeline.recipe import Recipe

HEAD = """# Every key of a recipe

A recipe is a YAML file. `name`, `model`, `images` and `prune` have to be there; every other section may be left out, and its stage
with it. `model: NAME` is short for `model: {source: NAME}`. `${NAME}` in a value is taken from the environment, paths are relative to
where the command runs, and `scenes:NAME` is one of the sets that the section `scenes` generates. An unknown key is refused, with the
nearest one that is known. `dgmr-tp run RECIPE --dry-run` checks a recipe without weights or data.

The stages, which are also the names for `--until` and `--redo`: scenes, rank, prune, recover, distill, tune_text, evaluate, compare,
export. They run in this order, but for the original, which is evaluated first. Each has its own folder in the run directory.
"""


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as ``list[Dataset]`` or ``KNN | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections(part)]


def takes(annotation: Any) -> str:
    """What a key takes, in words."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        first, *others = (part for part in get_args(annotation) if part is not type(None))
        return takes(first) + (", or a list" if others else "")
    if get_origin(annotation) is list:
        return f"a list: {takes(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "numbers by key"
    if sections(annotation):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ({}, []) or isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def plain(text: str | None) -> str:
    """A docstring as one line of Markdown."""
    text = re.sub(r":(?:func|class|mod|data):`~?([\w.]+)`", r"`\1`", " ".join((text or "").split()))
    return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")


def tables(model: type[BaseModel], name: str) -> list[str]:
    lines = [
        f"## {name}" if name else "## The recipe",
        "",
        plain(model.__doc__),
        "",
        "| key | takes | default | |",
        "|---|---|---|---|",
    ]
    inner = []
    for key, field in model.model_fields.items():
        lines.append(f"| `{key}` | {takes(field.annotation)} | {default(field)} | {plain(field.description)} |")
        inner += [
            line for part in sections(field.annotation) for line in ["", *tables(part, f"{name}.{key}".lstrip("."))]
        ]
    return [*lines, *inner]


def page() -> str:
    return "\n".join([HEAD, *tables(Recipe, "")]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
