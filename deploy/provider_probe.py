"""Starts one ONNX Runtime provider on a tiny graph, in a process of its own: ``python -m deploy.provider_probe NAME``.

A provider that is listed may still not start, and ONNX Runtime then takes another one without an error. Why it did
not start is only on its stderr, written by C++; and a broken driver may end the whole process.
"""

from __future__ import annotations

import json
import sys

import onnx
import onnxruntime
import torch  # noqa: F401  # a CUDA build of torch loads the CUDA libraries that ONNX Runtime's provider needs


def tiny_graph() -> bytes:
    """A graph of one addition: ``y = x + x`` on ``[1]`` float32."""
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "tiny", value[:1], value[1:])
    # IR 8 and opset 17 load in every ONNX Runtime that torchport supports.
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    serialised: bytes = model.SerializeToString()
    return serialised


def main() -> None:
    """Print ``{"providers": [...]}``: the providers that the session really has, the first one in charge."""
    session = onnxruntime.InferenceSession(tiny_graph(), providers=[sys.argv[1]])
    print(json.dumps({"providers": session.get_providers()}))


if __name__ == "__main__":
    main()
