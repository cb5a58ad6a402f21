"""Stock TorchServe's own way to serve a traced module: its BaseHandler, and what one has to write around it.

TorchServe's BaseHandler loads the module, moves batches to the GPU, runs them and brings them back. Its only ready-made
handlers are for pictures, whose preprocessing this one does without torchvision, and for torchtext. TorchServe imports
this file by its bare name out of the archive; nothing of torchport is in it.
"""

import io
import json

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

_MEAN = np.float32((0.485, 0.456, 0.406))
_STD = np.float32((0.229, 0.224, 0.225))


class Handler(BaseHandler):
    """Texts as token ids in JSON, padded to the longest of their batch; or pictures of the model's own size."""

    def preprocess(self, data):
        """The batch on the device."""
        bodies = [row.get("body") or row.get("data") for row in data]
        if isinstance(bodies[0], bytes | bytearray) and not bytes(bodies[0]).startswith(b"{"):
            return torch.from_numpy(np.stack([_pixels(bytes(body)) for body in bodies])).to(self.device)
        documents = [json.loads(body) if isinstance(body, bytes | bytearray) else body for body in bodies]
        rows = [torch.tensor(next(iter(document["inputs"].values()))) for document in documents]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)

    def postprocess(self, data):
        """The most probable class of each row."""
        logits = data[0] if isinstance(data, tuple | list) else data
        probabilities, classes = torch.softmax(logits.float(), 1).max(1)
        return [
            {"class": index, "probability": probability}
            for index, probability in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]


def _pixels(data):
    """[3, H, W] float32, normalised."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32) / 255
    return ((pixels - _MEAN) / _STD).transpose(2, 0, 1)
