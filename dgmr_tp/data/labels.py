"""Class names, prompts and numeric labels, and what must hold for them before an accuracy is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dgmr_tp.errors import DgmrError, first_line

CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
PLACEHOLDER = "{c}"
"""Stands for the class name in a prompt."""


def read_class_names(path: Path, *, numbered: bool = True) -> list[str]:
    """Read class names, one per line.

    Args:
        path: a text file.
        numbered: labels are numbers of lines, so that no line may be empty. Otherwise, empty lines are left out.

    Raises:
        DgmrError: the file cannot be read, or as :func:`check_class_names`.
    """
    names = [name for name in _read_lines(path, "class names") if name or numbered]
    check_class_names(names, path)
    return names


def read_prompts(path: Path) -> list[str]:
    """Read prompts such as ``a photo of a {c}.``, one per line.

    Raises:
        DgmrError: the file cannot be read, it is empty, or a prompt is wrong.
    """
    prompts = [line for line in _read_lines(path, "prompts") if line]
    _check_prompts(prompts, path)
    return prompts


def check_class_names(names: Sequence[str], origin: str | Path) -> None:
    """Check class names.

    Args:
        names: one per class, in the order of the classes' numbers.
        origin: the file or data set of the names, for messages.

    Raises:
        DgmrError: there are fewer than two, or one is empty.
    """
    if len(names) < 2:
        raise DgmrError(f"{origin} names {len(names)} classes. Give at least two, one per line.")
    if blank := [number for number, name in enumerate(names) if not str(name).strip()]:
        raise DgmrError(
            f"the name of class {blank[0]} in {origin} is empty. A line gives a class its number, so write a name into "
            "each line."
        )


def check_prompts(prompts: Sequence[str] | Mapping[str, Sequence[str]], names: Sequence[str], origin: str) -> None:
    """Check the prompts of a data set: one list for all classes, or a list per class.

    Raises:
        DgmrError: a class has no prompt, or a prompt is wrong.
    """
    if not isinstance(prompts, Mapping):
        _check_prompts(prompts, origin)
    elif missing := [name for name in names if not prompts.get(name)]:
        raise DgmrError(
            f"{origin} has no prompts for {len(missing)} of {len(names)} classes; the first: {missing[0]!r}. Give each "
            "class a list of prompts."
        )


def check_label_range(labels: Iterable[int], count: int, origin: str | Path) -> None:
    """Check that numeric labels are numbers of classes.

    Args:
        labels: the labels.
        count: number of classes.
        origin: the data set, for messages.

    Raises:
        DgmrError: a label is negative, or not below ``count``.
    """
    low, high = min(labels), max(labels)
    if low < 0 or high >= count:
        hint = "Labels count from 0. " if (low, high) == (1, count) else ""
        raise DgmrError(
            f"the labels of {origin} are {low} to {high}, but there are {count} classes, 0 to {count - 1}. {hint}Give "
            "one class name for each label."
        )


def _read_lines(path: Path, content: str) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at form feeds and the like
    except (OSError, UnicodeDecodeError) as error:
        raise DgmrError(f"cannot read the {content} {path}: {first_line(error)}. Give a text file in UTF-8.") from error
    lines = [line.strip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _check_prompts(prompts: Sequence[str], origin: str | Path) -> None:
    if not prompts:
        raise DgmrError(f"{origin} has no prompts. Write one per line, such as a photo of a {PLACEHOLDER}.")
    for prompt in prompts:
        try:
            names_class = prompt.format(c="\0") != prompt.format(c="")
        except (LookupError, ValueError):  # another placeholder, or single braces
            names_class = False
        if not names_class:
            raise DgmrError(
                f"the prompt {prompt!r} of {origin} does not contain {PLACEHOLDER}, which stands for the class name. "
                "Correct it."
            )
