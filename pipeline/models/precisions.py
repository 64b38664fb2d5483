"""An ONNX file in fewer bits: weights of 16 bits, or products of 8 bits."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from pipeline.models.exported import ABOUT

SMALL = 1024  # numbers; tensors of fewer stay as they are: norms, biases, initial slots
# Slots go round and round in it, so that errors would add up, and it is hardly a hundredth of the products.
RECURRENT = "model.processor."


def write_half(source: Path, path: Path) -> None:
    """Weights stored in 16 bits, computed with in 32: half the file, no other speed.

    Raises:
        ValueError: a weight that is too large for 16 bits.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load(source)
    casts = []
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALL:
            continue
        name, largest = tensor.name, float(np.abs(values).max())
        if largest > np.finfo(np.float16).max:
            raise ValueError(f"{name} holds {largest:.3g}, more than 16 bits can: there is no fp16 form")
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    _save(proto, path, "fp16")


def write_int8(source: Path, path: Path) -> None:
    """Products with weights in 8 bits, those of slot attention and predictor excepted; activations are scaled anew in
    each product (dynamic quantization), so that no calibration is needed."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(source)
    kept = [node.name for node in proto.graph.node if node.name.startswith(RECURRENT)]
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises, by the root logger, a step that our graph has had
    try:
        quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=kept,
            weight_type=QuantType.QUInt8,  # signed ones saturate on processors without VNNI
        )
    finally:
        logger.setLevel(level)
    _save(onnx.load(path), path, "int8")


def _save(proto, path: Path, precision: str) -> None:  # type: ignore[no-untyped-def]
    """Writes a file that says which precision it has."""
    for entry in proto.metadata_props:
        if entry.key == ABOUT:
            entry.value = json.dumps({**json.loads(entry.value), "precision": precision})
    path.write_bytes(proto.SerializeToString())
