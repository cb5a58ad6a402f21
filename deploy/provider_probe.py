"""Runs a tiny model on what computes here, in a process of its own: ``python -m deploy.provider_probe NAME``.

NAME is a provider of ONNX Runtime, or ``torch`` for torch's CUDA. A provider that is listed may still not start, and
ONNX Runtime then takes another one without an error. Why it did not start is only on its stderr, written by C++; and a
broken driver may end the whole process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

TORCH = "torch"

_CUDA_PROVIDER = "CUDAExecutionProvider"
# Large enough for the matrix units. Whole numbers up to 3: their products are exact in every precision.
_SIZE = 256


def tiny_graph() -> bytes:
    """A graph of one addition: ``y = x + x`` on ``[1]`` float32."""
    import onnx  # noqa: PLC0415  # torch's own probe does without

    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "tiny", value[:1], value[1:])
    # IR 8 and opset 17 load in every ONNX Runtime that torchport supports.
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    serialised: bytes = model.SerializeToString()
    return serialised


def probe_provider(provider: str) -> dict[str, Any]:
    """Compute the tiny graph with a provider, on each GPU if it is the one for them.

    Returns:
        ``providers``: what the session really has, the first one in charge. ``gpus``: how many were tried. ``wrong``:
        those whose result was wrong.
    """
    import numpy as np  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415
    import torch  # noqa: PLC0415  # a CUDA build of torch loads the CUDA libraries that the provider needs

    gpus = torch.cuda.device_count() if provider == _CUDA_PROVIDER else 0
    providers: list[str] = []
    wrong = []
    for index in range(max(gpus, 1)):
        options = {"device_id": str(index)} if gpus else {}
        session = onnxruntime.InferenceSession(tiny_graph(), providers=[(provider, options)])
        providers = session.get_providers()
        (result,) = session.run(["y"], {"x": np.array([21], np.float32)})
        if result.tolist() != [42.0]:
            wrong.append(index)
    return {"providers": providers, "gpus": gpus, "wrong": wrong}


def probe_torch() -> dict[str, Any]:
    """Compute a matrix product on each GPU that torch sees.

    Returns:
        ``gpus``: for each its name, compute capability, free and total bytes, and whether the product was right.
    """
    import torch  # noqa: PLC0415

    left, right = (torch.randint(0, 4, (_SIZE, _SIZE), dtype=torch.float32) for _ in range(2))
    expected = left @ right
    gpus = []
    for index in range(torch.cuda.device_count()):
        product = left.to(f"cuda:{index}") @ right.to(f"cuda:{index}")
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "free": free,
                "total": total,
                "right": bool(torch.equal(product.cpu(), expected)),
            }
        )
    return {"gpus": gpus}


def main() -> None:
    """Print what was found as JSON."""
    name = sys.argv[1]
    print(json.dumps(probe_torch() if name == TORCH else probe_provider(name)))


if __name__ == "__main__":
    main()
