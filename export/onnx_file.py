"""Write ONNX files in float32, float16 and int8, and read them with onnxruntime. The batch size is always dynamic."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgmr_tp.errors import DgmrError
from dgmr_tp.export.export_tower import ExportTower, TowerFunction
from dgmr_tp.utils.lazy_imports import require

OPSET = 20
MAX_INLINE_BYTES = 1.9e9
"""Weights above this size go into a second file. A protobuf file cannot exceed 2 GB."""
FLOAT32_OPS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "Gelu")
"""Operators that stay in float32 in a float16 file.

Norms need the range. onnxruntime 1.31 on a CPU, at its default settings, crashes on some graphs in which these
operators are float16.
"""

INPUT_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}
"""Input types of images and token ids that a file may have, as onnxruntime names them."""
CONSTANT_OPS = ("Constant", "ConstantOfShape")
"""Operators that make the infinities of attention masks."""


def write(tower: ExportTower, path: Path) -> None:
    """Export the tower in float32 with torch's dynamo exporter, opset 20."""
    require("onnxscript", "export")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        _errors_only("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower.module,
            (tower.examples[:2],),  # the exporter treats a batch of 1 as a constant
            dynamo=True,
            opset_version=OPSET,
            input_names=[tower.input_name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:
            if value.name in tower.output_names:  # the exporter calls the result of an nn.Embedding "embedding"
                value.name = f"{value.name}_lookup"
        for value, name in zip(graph.outputs, tower.output_names, strict=True):
            value.name = name
        weight_bytes = sum(p.numel() * p.element_size() for p in tower.module.parameters())
        program.save(path, external_data=weight_bytes > MAX_INLINE_BYTES)


def to_float16(source: Path, path: Path) -> None:
    """Convert a float32 ONNX file to float16 weights and matrix products. Inputs and outputs stay float32.

    The operators of :data:`FLOAT32_OPS` stay in float32.
    """
    onnx = require("onnx", "export")
    float16 = require("onnxruntime.transformers.float16", "export")
    float32_ops = [*float16.DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    with _errors_only("onnxruntime.transformers.float16"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = float16.convert_float_to_float16(str(source), keep_io_types=True, op_block_list=float32_ops)
    # A value that two float32 operators read gets two Cast nodes of the same name, which no runtime accepts.
    nodes = list({node.name if node.op_type == "Cast" else i: node for i, node in enumerate(model.graph.node)}.values())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # the converter leaves wrong types in it, which onnx.checker refuses
    # The converter appends its Cast nodes at the end. onnxruntime sorts nodes when it opens a file, and others do not.
    require("onnxruntime.transformers.onnx_model", "export").OnnxModel.graph_topological_sort(model.graph)
    external = _size_bytes(source) > 2 * MAX_INLINE_BYTES
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")


def to_int8(source: Path, path: Path) -> None:
    """Quantize the matrices of a float32 ONNX file to int8. Activations are quantized at run time (dynamically)."""
    quantization = require("onnxruntime.quantization", "export")
    model = require("onnx", "export").load(source)
    del model.graph.value_info[:]  # these intermediate shapes are wrong once the quantizer transposes the matrices
    with _errors_only("root"):
        quantization.quantize_dynamic(
            model,
            path,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=_size_bytes(source) > MAX_INLINE_BYTES,
        )


def read(path: Path, threads: int | None = None) -> TowerFunction:
    """Open the file with onnxruntime on the CPU.

    Files with a fixed batch size are run in batches of that size, the last one padded. Inputs are converted to the
    file's precision, and outputs to float32.

    Args:
        path: an ONNX file of any precision.
        threads: threads of one operator; None lets onnxruntime use one per core.

    Raises:
        DgmrError: a file with external weights is missing, or the file does not have exactly one input of a supported
            type.
        Exception: onnxruntime's own errors for a file that it cannot open.
    """
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Otherwise the idle threads of one session spin and slow down another one that is timed in turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if missing := _missing_weight_files(path):  # onnxruntime does not name them
            raise DgmrError(f"the weights file {', '.join(missing)} is missing next to it") from error
        raise
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise DgmrError(
            f"it has {len(inputs)} inputs ({', '.join(value.name for value in inputs)}), and an encoder has one. "
            "Export the image tower alone."
        )
    name, dtype, batch_size = inputs[0].name, INPUT_DTYPES.get(inputs[0].type), (inputs[0].shape or [None])[0]
    if dtype is None:
        raise DgmrError(
            f"its input {name} is a {inputs[0].type}, and preprocessed inputs are one of {', '.join(INPUT_DTYPES)}. "
            "Export the tower without its preprocessing."
        )

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        if rows.is_floating_point() != dtype.is_floating_point:
            raise ValueError(f"its input {name} is a {inputs[0].type}, and these inputs are {rows.dtype}")
        size = batch_size if isinstance(batch_size, int) else len(rows)
        batches = []
        for batch in rows.to(dtype).split(size):
            count = len(batch)
            if count < size:
                batch = torch.cat([batch, batch[-1:].expand(size - count, *batch.shape[1:])])
            outputs = session.run(None, {name: batch.numpy()})
            batches.append([torch.from_numpy(values)[:count] for values in outputs])
        columns = [torch.cat(values) for values in zip(*batches, strict=True)]
        return tuple(values.float() if values.is_floating_point() else values for values in columns)

    return run


def find_overflow(path: Path, examples: Tensor) -> str | None:
    """Look for a node of a float16 file whose result exceeds float16's range on the examples.

    onnxruntime computes many float16 nodes in float32 on a CPU. The outputs of the file are then finite, although they
    are not on a device with true half precision. This function therefore reads the result of every node, which
    onnxruntime stores in the node's own dtype.

    Args:
        path: the file.
        examples: inputs ``[n, …]``. One at a time is run, because the results of all nodes are held in memory.

    Returns:
        The problem with the name of the first such node, or None.
    """
    onnx, runtime = require("onnx", "export"), require("onnxruntime", "export")
    model = onnx.load(path, load_external_data=False)
    graph, num_outputs = model.graph, len(model.graph.output)
    known = {value.name for value in (*graph.output, *graph.input)}
    names = [name for node in graph.node for name in node.output if name and name not in known]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    instrumented = path.with_name(f".{path.name}.nodes")  # next to the file, because external weights are there
    try:
        onnx.save(model, instrumented)
        session = runtime.InferenceSession(str(instrumented), options, providers=["CPUExecutionProvider"])
    finally:
        instrumented.unlink(missing_ok=True)
    input_name = graph.input[0].name
    output_names = [value.name for value in session.get_outputs()]
    assert len(output_names) == num_outputs + len(names)
    initializers = {tensor.name: tensor for tensor in graph.initializer}

    def is_finite(name: str, results: dict[str, Any]) -> bool:
        if name in initializers:
            return bool(np.isfinite(onnx.numpy_helper.to_array(initializers[name], str(path.parent))).all())
        value = results.get(name)
        return value is None or not np.issubdtype(value.dtype, np.floating) or bool(np.isfinite(value).all())

    for example in examples.split(1):
        results = dict(zip(output_names, session.run(None, {input_name: example.numpy()}), strict=True))
        for node in graph.node:
            # Attention masks contain infinities. An overflow is an infinity that no input of the node contains.
            if all(is_finite(name, results) for name in node.output) or node.op_type in CONSTANT_OPS:
                continue
            if all(is_finite(name, results) for name in node.input if name):
                return f"its node {node.name} ({node.op_type}) exceeds float16's range of 65504"
    return None


def _missing_weight_files(path: Path) -> list[str]:
    """Return the external weight files that an ONNX file names and that do not exist."""
    onnx = require("onnx", "export")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # not an ONNX file
        return []
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    names = {entry.value for entry in entries if entry.key == "location"}
    return sorted(name for name in names if not (path.parent / name).exists())


def _size_bytes(source: Path) -> int:
    """Return the size of an ONNX file and its external weights."""
    return sum(path.stat().st_size for path in source.parent.glob(f"{source.name}*"))


@contextlib.contextmanager
def _errors_only(*loggers: str) -> Iterator[None]:
    """Show only errors of the named loggers."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
