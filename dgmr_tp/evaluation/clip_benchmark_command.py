"""clip_benchmark's command line, with our models as a further model type.

clip_benchmark has no plug-ins, but its command line reads the model types from a dictionary. Only the ``dgmr-tp
clip_benchmark`` command uses this module. Evaluations of our own call clip_benchmark's functions; see
:mod:`dgmr_tp.evaluation.zero_shot`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dgmr_tp.errors import DgmrError, first_line
from dgmr_tp.evaluation.checked_metrics import checked_metrics
from dgmr_tp.evaluation.linear_probe import linear_probe
from dgmr_tp.utils.lazy_imports import require

MODEL_TYPE = "dgmr_tp"
Loader = Callable[..., tuple[nn.Module, Callable[[Any], Tensor], Callable[[list[str]], Tensor] | None]]
"""Loader of a model type: ``(model_name, pretrained, cache_dir, device)`` to model, transform and tokenizer."""


def run_clip_benchmark(arguments: Sequence[str], load: Loader) -> None:
    """Run clip_benchmark's command line with the given arguments.

    ``--model_type`` defaults to ``dgmr_tp``. ``--pretrained`` then defaults to ``none``.

    Args:
        arguments: arguments of the command, such as ``["eval", "--model", "demo", …]``.
        load: loads the models of type ``dgmr_tp``.

    Raises:
        DgmrError: any error that clip_benchmark raised, as one sentence.
    """
    cli = require("clip_benchmark.cli", "eval")
    command = ["clip_benchmark", *arguments]
    names_type = any(argument.partition("=")[0] == "--model_type" for argument in arguments)
    if command[1:2] == ["eval"] and not names_type:
        command += ["--model_type", MODEL_TYPE]
        if not any(argument.startswith("--pretrained") for argument in arguments):
            command += ["--pretrained", "none"]  # clip_benchmark would report its default, which is not used
    with _registered(load), checked_metrics("the data set"), patch.object(sys, "argv", command):
        try:
            cli.main()
        except DgmrError as error:  # a worker's error has its traceback before the message
            raise DgmrError(first_line(error)) from error
        except Exception as error:
            raise DgmrError(f"clip_benchmark: {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _registered(load: Loader) -> Iterator[None]:
    """Register the model type ``dgmr_tp`` and, without a GPU, our linear probe."""
    cli, models = require("clip_benchmark.cli", "eval"), require("clip_benchmark.models", "eval")
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(models.TYPE2FUNC, {MODEL_TYPE: load}))
        if not torch.cuda.is_available():
            stack.enter_context(patch.object(cli.linear_probe, "evaluate", linear_probe))
        models.MODEL_TYPES.append(MODEL_TYPE)
        stack.callback(models.MODEL_TYPES.remove, MODEL_TYPE)
        yield
