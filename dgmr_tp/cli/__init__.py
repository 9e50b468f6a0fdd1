"""The command line. Every command is one call into the library; a user error is one message and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import typer

from dgmr_tp.cli import evaluation, models, pruning, runs
from dgmr_tp.errors import DgmrError, Preempted, first_line
from dgmr_tp.utils.progress import show_progress

app = typer.Typer(
    help="Prune the MLPs of large vision transformers, recover them in closed form, distill, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (runs, pruning, evaluation, models):
    app.add_typer(group.app)


def main() -> None:
    """Run ``dgmr-tp``."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _refuse_empty(sys.argv[1:])
        with show_progress():
            app(standalone_mode=True)
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


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise DgmrError if an argument is empty, as that of a shell variable that is not set."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not argument.strip():
            before = f" after {arguments[place - 1]}" if place else ""
            raise DgmrError(f"the argument{before} is empty. Give a value; a shell variable that is not set is empty.")
        if option.startswith("--") and equals and not value.strip():
            raise DgmrError(f"{option} is empty. Give a value; a shell variable that is not set is empty.")


def _exit(message: str, code: int) -> None:
    print(f"dgmr-tp: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
