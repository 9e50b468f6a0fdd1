"""The commands in one application, and the end of the process for each kind of error."""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from dgmr_tp import __version__
from dgmr_tp.cli import evaluation, models, pruning, runs
from dgmr_tp.errors import DgmrError, Preempted, first_line
from dgmr_tp.utils.progress import show_progress

ASCII = {"→": "->", "×": "x", "·": "-", "–": "-", "−": "-", "…": "..."}
"""Characters of the output, and what replaces them on a terminal that cannot show them."""

app = typer.Typer(
    help="Prune the MLPs of large vision transformers, recover them in closed form, distill, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (runs, pruning, evaluation, models):
    app.add_typer(group.app)


def _print_version(given: bool) -> None:
    if given:
        print(f"dgmr-tp {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run_command() -> None:
    """Run the command of ``sys.argv``, and exit."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    register_ascii_errors()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="dgmr_tp_ascii")
    try:
        with _show_log(), show_progress():
            _refuse_empty(sys.argv[1:])
            app(_expand_home(sys.argv[1:]), standalone_mode=True)
    except Preempted as error:
        _exit(str(error), error.code)
    except (DgmrError, OSError) as error:  # OSError: no space, no permission, no such directory; it names the file
        _exit(str(error), 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's class; torch is not imported for every command
            raise
        _exit(
            f"out of memory on the GPU: {first_line(error).rstrip('.')}. Take fewer images (--calibration-images, "
            "recover.images), a smaller batch size, or set CUDA_VISIBLE_DEVICES= to compute on the CPU.",
            2,
        )


@contextlib.contextmanager
def _show_log() -> Iterator[None]:
    """Print what the package logs, in the main process (rank 0) only."""
    logger = logging.getLogger("dgmr_tp")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("dgmr-tp: %(message)s"))
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def register_ascii_errors() -> None:
    """Register ``errors="dgmr_tp_ascii"`` for streams whose encoding lacks characters of the output."""
    codecs.register_error("dgmr_tp_ascii", _replace)


def _exit(message: str, code: int) -> None:
    print(f"dgmr-tp: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise DgmrError if an argument is empty, as that of a shell variable that is not set."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not argument.strip():
            before = f" after {arguments[place - 1]}" if place else ""
            raise DgmrError(f"the argument{before} is empty. Give a value; a shell variable that is not set is empty.")
        if option.startswith("--") and equals and not value.strip():
            raise DgmrError(f"{option} is empty. Give a value; a shell variable that is not set is empty.")


def _expand_home(arguments: list[str]) -> list[str]:
    """Return the arguments with ``~`` replaced after ``--option=``, where shells leave it."""
    return [
        re.sub(r"^(--[\w-]+=)(~[^/]*)", lambda match: match[1] + os.path.expanduser(match[2]), argument)
        for argument in arguments
    ]


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace one character that the encoding of a stream does not have."""
    assert isinstance(error, UnicodeEncodeError)
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return bytes([ord(character) - 0xDC00]), end
    return ASCII.get(character, character.encode("ascii", "backslashreplace").decode()), end
