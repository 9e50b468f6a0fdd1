"""Print docs/recipe.md: every key of a recipe, its default and its meaning, from the recipe's section classes.

python docs/recipe_keys.py > docs/recipe.md
"""

from __future__ import annotations

import json
import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dgmr_tp.pipeline.recipe import Recipe
from dgmr_tp.pipeline.stages import STAGE_NAMES
from dgmr_tp.utils.config import DataPath, NameIn

HEAD = f"""# Every key of a recipe

A recipe is a YAML file. `model`, `images` and `prune` are required. Every other section may be left out, and its stage
with it.

- `model: NAME` is short for `model: {{source: NAME}}`.
- `base: NAME` extends another recipe, given by a name or by a path relative to the file. Sections are merged key by
  key, and `null` restores a key's default. `name` is not inherited.
- `dgmr-tp run RECIPE --set key=value` sets a dotted key, such as `distill.steps=100`, after `base`.
- `${{NAME}}` in a value is replaced by the environment variable. Paths are relative to the working directory, and
  `~` at their start is the home directory.
- Values follow YAML 1.2: `yes` is a text, `010` is 10, and `1e-3` is a number. Numbers must be finite.
- `scenes:NAME` is a data set that the section `scenes` generates.

An unknown key is an error that names the nearest valid one. `dgmr-tp run RECIPE --dry-run` checks a recipe without
weights or data, and shows it resolved.

The stages run in this order, and these are the names for `--until` and `--redo`: {", ".join(STAGE_NAMES)}.
Only the evaluation of the dense model runs earlier, right after `scenes`. Each stage has its own folder in the run
directory.
"""


def sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes inside an annotation such as ``list[DatasetConfig]`` or ``KNNConfig | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections(part)]


def takes(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe the values that a key accepts."""
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    for mark in metadata:
        if isinstance(mark, NameIn):
            return ", ".join(f"`{name}`" for name in mark.registry)
        if isinstance(mark, DataPath):
            return "path"
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
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[annotation]


def default(field: FieldInfo) -> str:
    """Format a key's default."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ({}, []) or isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


def plain(text: str | None) -> str:
    """Turn a docstring into one line of Markdown."""
    text = re.sub(r":(?:func|class|mod|data|meth):`~?([\w.]+)`", r"`\1`", " ".join((text or "").split()))
    return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")


def tables(model: type[BaseModel], name: str) -> list[str]:
    """Return the lines of a section's table and of those of its inner sections."""
    heading = f"## {name}" if name else "## The recipe"
    lines = [heading, "", plain(model.__doc__), "", "| key | takes | default | |", "|---|---|---|---|"]
    inner = []
    for key, field in model.model_fields.items():
        value = takes(field.annotation, tuple(field.metadata))
        lines.append(f"| `{key}` | {value} | {default(field)} | {plain(field.description)} |")
        for part in sections(field.annotation):
            inner += ["", *tables(part, f"{name}.{key}".lstrip("."))]
    return [*lines, *inner]


def page() -> str:
    """Return docs/recipe.md."""
    return "\n".join([HEAD, *tables(Recipe, "")]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
