"""ONNX: torch's dynamo exporter, dynamic batch, run by onnxruntime; in half precision and in eight bits too."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dgmr_tp.errors import DgmrError
from dgmr_tp.export.export_tower import Part, Run
from dgmr_tp.utils.lazy_imports import require

OPSET = 20
LARGE = 1.9e9
"""Bytes of weights above which they go into a second file: protobuf ends at 2 GB."""


def write(part: Part, path: Path) -> None:
    """In float32, opset 20.

    The example's batch must be larger than 1: the exporter takes a 1 for a constant.
    """
    require("onnxscript", "export")
    batch = torch.export.Dim("batch")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        _quiet("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            part.module,
            (part.examples[:2],),
            dynamo=True,
            opset_version=OPSET,
            input_names=[part.input],
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.name in part.outputs:  # what the exporter calls the result of a torch embedding
                value.name = f"{value.name}_lookup"
        for value, name in zip(graph.outputs, part.outputs, strict=True):
            value.name = name
        weights = sum(p.numel() * p.element_size() for p in part.module.parameters())
        program.save(path, external_data=weights > LARGE)


def to_half(source: Path, path: Path) -> None:
    """Weights and matrix products in float16, inputs and outputs in float32.

    Norms and GELUs stay in float32: norms need the range, and onnxruntime 1.31 on a CPU, at its default settings, crashes on some graphs
    in which they are float16.
    """
    onnx = require("onnx", "export")
    float16 = require("onnxruntime.transformers.float16", "export")
    kept = [
        *float16.DEFAULT_OP_BLOCK_LIST,
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "RMSNormalization",
        "Gelu",
    ]
    with _quiet("onnxruntime.transformers.float16"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = float16.convert_float_to_float16(str(source), keep_io_types=True, op_block_list=kept)
    # A value that goes to two of these is cast twice, by nodes of one name, which no runtime takes.
    nodes = list({node.name if node.op_type == "Cast" else i: node for i, node in enumerate(model.graph.node)}.values())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path, save_as_external_data=_bytes(source) > 2 * LARGE, location=f"{path.name}.data")


def to_int8(source: Path, path: Path) -> None:
    """Matrices in int8; activations are quantised as they come (dynamic quantisation)."""
    quantization = require("onnxruntime.quantization", "export")
    model = require("onnx", "export").load(source)
    del model.graph.value_info[:]  # shapes between the nodes, which no longer hold once matrices are transposed
    with _quiet("root"):
        quantization.quantize_dynamic(
            model,
            path,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=_bytes(source) > LARGE,
        )


def read(path: Path, threads: int | None = None) -> Run:
    """The file, run by onnxruntime on the CPU."""
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Idle threads of one session would otherwise spin and slow down another, as when two are timed in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if missing := _missing_data(path):  # the runtime does not say which
            raise DgmrError(f"its weights are in {', '.join(missing)}, which must lie beside it") from error
        raise
    [name] = [value.name for value in session.get_inputs()]
    return lambda inputs: tuple(torch.from_numpy(found) for found in session.run(None, {name: inputs.numpy()}))


def _missing_data(path: Path) -> list[str]:
    """The files of weights that an ONNX file names and that are not there."""
    onnx = require("onnx", "export")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # no ONNX file at all
        return []
    named = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return sorted(name for name in named if not (path.parent / name).exists())


def runtime_version() -> str:
    """Of the onnxruntime, or onnxruntime-gpu, that verified the file."""
    return require("onnxruntime", "export").__version__


def _bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.parent.glob(f"{source.name}*"))


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
