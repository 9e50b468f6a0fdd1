"""ONNX: torch's dynamo exporter, dynamic batch, run by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dgmr_tp.extras import require

OPSET = 20


def write(module: nn.Module, example: Tensor, path: Path) -> None:
    """Export ``module`` (``image`` ``[batch, 3, height, width]`` to ``embedding`` ``[batch, dimension]``).

    The example's batch must be larger than 1: the exporter takes a 1 for a constant.
    """
    require("onnxscript", "export")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (example,), dynamo=True, opset_version=OPSET, input_names=["image"], dynamic_shapes=({0: batch},), verbose=False
        )
        assert program is not None
        graph = program.model.graph
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.name == "embedding":  # what the exporter calls the result of a torch embedding
                value.name = "embedding_lookup"
        graph.outputs[0].name = "embedding"
        program.save(path, external_data=sum(p.numel() * p.element_size() for p in module.parameters()) > 1.9e9)


def read(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """The file as a function of a CPU tensor, run by onnxruntime."""
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads of one session would otherwise spin and slow down another, as when two are timed in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["embedding"], {"image": images.float().numpy()})[0])


def runtime_version() -> str:
    """Of the onnxruntime, or onnxruntime-gpu, that verified the file."""
    return require("onnxruntime", "export").__version__


@contextlib.contextmanager
def _quiet(*loggers: str):  # type: ignore[no-untyped-def]
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
