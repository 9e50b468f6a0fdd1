"""The command line. Every command is one call into the library; a user's mistake is one sentence and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from dgmr_tp.cli import evaluation, models, pruning, recipes
from dgmr_tp.errors import DgmrError, Preempted, first_line
from dgmr_tp.utils.progress import show_progress

app = typer.Typer(
    help="Prune the MLPs of large vision transformers, recover them in closed form, distil, measure, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (recipes, pruning, evaluation, models):
    app.add_typer(group.app)


def main() -> None:
    """Entry point of ``dgmr-tp``."""
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with show_progress():
            app(standalone_mode=True)
    except Preempted as error:
        print(f"dgmr-tp: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except (DgmrError, OSError) as error:  # OSError: no space, no permission, no such folder; it names the file
        print(f"dgmr-tp: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for every command
            raise
        less = "fewer images (--count, recover.images), a smaller batch size, or CUDA_VISIBLE_DEVICES= to compute on the CPU"
        print(f"dgmr-tp: out of memory on the GPU: {first_line(error)}; take {less}", file=sys.stderr, flush=True)
        sys.exit(2)
