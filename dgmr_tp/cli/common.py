"""Parts shared by the commands: the console, kinds of options, and options that several commands take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from dgmr_tp.errors import DgmrError
from dgmr_tp.utils.files import check_output

if TYPE_CHECKING:
    from dgmr_tp.utils.compute import ComputeConfig


class Output(Console):
    """Standard output. A text is never broken into lines, and a table only on a terminal."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False)
        if not self.is_terminal:
            self.width = PIPE_WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, without line breaks in texts."""
        options.setdefault("soft_wrap", all(isinstance(item, str) for item in objects))
        super().print(*objects, **options)


PIPE_WIDTH = 10_000
"""Width of the output in characters when it is not a terminal."""
out = Output()
MODEL_HELP = "open_clip:NAME, timm:NAME, a model directory, hf-hub:ORG/REPO, or demo."
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
PretrainedOption = Annotated[
    str | None,
    typer.Option(
        help="Weights for a NAME: the library's tag, a file, hf-hub:ORG/REPO/FILE, or TAG+FILE; none: random."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device that images run on: cuda or cpu [default: cuda if there is one].")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(help="Precision of forward passes that evaluate [default: bfloat16 on a GPU, float32 on a CPU]."),
]
SaveDtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--save-dtype", help="Dtype of the weights that are written [default: the checkpoint's]."),
]
V = TypeVar("V")


def number_option(
    *names: str,
    help: str,
    above: float = -inf,
    minimum: float = -inf,
    below: float = inf,
    maximum: float = inf,
) -> Any:
    """Return an option that takes a finite number. Every option of type float is made here.

    Args:
        names: names of the option. Default: the parameter's.
        help: help text.
        above, minimum: lower end of the range, exclusive or inclusive.
        below, maximum: upper end of the range, exclusive or inclusive.
    """
    limits = [f"above {above:g}"] if above > -inf else [f"of {minimum:g} or more"] if minimum > -inf else []
    limits += [f"below {below:g}"] if below < inf else [f"up to {maximum:g}"] if maximum < inf else []

    def check(parameter: typer.CallbackParam, value: float | None) -> float | None:
        if value is None:
            return None
        name = parameter.opts[0]
        if not isfinite(value):
            raise DgmrError(f"{name} {value} is not a finite number. Give a number {' and '.join(limits)}.")
        if not (above < value < below and minimum <= value <= maximum):
            raise DgmrError(f"{name} {value:g} is out of range. Give a number {' and '.join(limits)}.")
        return value

    return typer.Option(*names, help=help, callback=check)


def path_option(*names: str, help: str, kind: Literal["file", "directory", "any"]) -> Any:
    """Return an option that takes a path. Every option of type Path is made here.

    Args:
        names: names of the option. Default: the parameter's.
        help: help text.
        kind: what the path must be if it exists.
    """
    return typer.Option(*names, help=help, parser=_path_parser(kind), metavar="PATH")


def path_argument(*, help: str, kind: Literal["file", "directory", "any"]) -> Any:
    """Return an argument that takes a path, as :func:`path_option`."""
    return typer.Argument(help=help, parser=_path_parser(kind), metavar="PATH")


def _path_parser(kind: str) -> Callable[[str], Path]:
    def parse(text: str | Path) -> Path:
        found = Path(text)
        if found.exists() and kind != "any" and found.is_dir() != (kind == "directory"):
            raise typer.BadParameter(f"{text} is not a {kind}. Name a {kind}.")
        return found

    return parse


def names_in(option: str, text: str, registry: Mapping[str, object]) -> list[str]:
    """Return the names of a comma-separated list.

    Raises:
        DgmrError: a name is unknown or given twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in registry:
            raise DgmrError(f"{option} {text} names {name!r}, which is unknown. Use {', '.join(registry)}.")
    return _distinct(option, names)


def numbers_by_name(option: str, text: str, example: str) -> dict[str, float]:
    """Return the numbers of a list such as ``params=0.5,flops=0.4``.

    Raises:
        DgmrError: the text has another form, a number is not finite, or a name is given twice.
    """
    pairs = [[part.strip() for part in entry.split("=")] for entry in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise DgmrError(f"{option} {text} is not NAME=NUMBER. Write it as {example}.")
    _distinct(option, [name for name, _ in pairs])
    return {name: finite_number(option, value, example) for name, value in pairs}


def finite_number(option: str, text: str, example: str) -> float:
    """Return the number that a text states, such as ``0.5`` or ``1e-3``.

    Raises:
        DgmrError: the text is no number, or the number is not finite.
    """
    try:
        value = float(text)
    except ValueError:
        raise DgmrError(f"{option}: {text!r} is not a number. Write it as {example}.") from None
    if not isfinite(value):
        raise DgmrError(f"{option}: {text} is not a finite number. Write it as {example}.")
    return value


def merge_distinct(option: str, mappings: list[dict[str, V]]) -> dict[str, V]:
    """Return the union of mappings, one for each time that an option is given. Raise DgmrError if a key repeats."""
    _distinct(option, [name for mapping in mappings for name in mapping])
    return {name: value for mapping in mappings for name, value in mapping.items()}


def _distinct(option: str, names: list[str]) -> list[str]:
    if repeated := [name for name in names if names.count(name) > 1]:
        raise DgmrError(f"{option} names {repeated[0]} more than once. Give it once.")
    return names


SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-file", help="Open .pt and .pt2 files, which are code, whatever their origin.")
]
TrustRecipeOption = Annotated[
    bool,
    typer.Option("--trust-recipe", help="Run the shell commands in the recipe (pipe: URLs), whatever their origin."),
]


def print_skipped(broken: Mapping[str, str], others: Mapping[str, int]) -> None:
    """Print what reading a source of images skipped, and why."""
    from dgmr_tp.data.images import describe_skipped

    if line := describe_skipped(broken, others):
        out.print(line, soft_wrap=True)


def compute_config(device: str | None, dtype: str | None = None, save_dtype: str | None = None) -> ComputeConfig:
    """Return the options of the same names as a configuration.

    Raises:
        DgmrError: the device does not exist.
    """
    from dgmr_tp.utils.compute import ComputeConfig

    config = ComputeConfig.model_validate({"device": device, "dtype": dtype, "save_dtype": save_dtype})
    config.choose_device()
    return config


def require_new(path: Path, *, replace: bool = False) -> None:
    """Raise DgmrError if an output cannot be written, or its parent directory does not exist.

    Args:
        path: the output.
        replace: an existing file is replaced.
    """
    check_output(path, replace=replace)
    if not path.absolute().parent.is_dir():
        raise DgmrError(f"the directory {path.absolute().parent} for {path.name} does not exist. Make it first.")
