"""Faults that exports have had, in this project or in others, each put into an artifact or into what describes it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

DIGITS, TICKETS, MIXER = "digits", "tickets", "mixer"
EARLIER = "tickets-earlier"
FORMATS = {"ts": "torchscript", "onnx": "onnx", "pt2": "pt2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault in one artifact."""

    name: str
    subject: str
    format: str
    precision: str
    module: Callable[[nn.Module], nn.Module] | None = None
    """Gives the module that is converted in place of the right one."""
    graph: Callable[[onnx.ModelProto], None] | None = None
    """Changes the ONNX file."""
    checkpoint: Callable[[dict[str, Any]], None] | None = None
    """Changes what the checkpoint says beside its weights; the artifact is right."""
    run: str | None = None
    """Weights of another training, such as an earlier one of the same recipe."""
    named: bool = False
    """Take evaluation data that names its labels: the checkpoint's own source only counts them."""


class Around(nn.Module):
    """A module with something done to its inputs or its output."""

    def __init__(
        self,
        module: nn.Module,
        before: Callable[..., tuple[Tensor, ...]] = lambda *tensors: tensors,
        after: Callable[[Any], Any] = lambda output: output,
    ) -> None:
        super().__init__()
        self.module = module
        self.before = before
        self.after = after

    def forward(self, *tensors: Tensor) -> Any:
        return self.after(self.module(*self.before(*tensors)))


def before(change: Callable[..., tuple[Tensor, ...]]) -> Callable[[nn.Module], nn.Module]:
    return lambda module: Around(module, before=change)


def after(change: Callable[[Any], Any]) -> Callable[[nn.Module], nn.Module]:
    return lambda module: Around(module, after=change)


def weights(change: Callable[[nn.Module], None]) -> Callable[[nn.Module], nn.Module]:
    """A fault that changes weights or settings in place."""

    def apply(module: nn.Module) -> nn.Module:
        with torch.no_grad():
            change(module)
        return module

    return apply


def _set_eps(kind: type[nn.Module], eps: float) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, kind):
                part.eps = eps

    return change


class AlwaysTraining(nn.Module):
    """A batch norm or dropout that stays in training mode, whatever mode it is put into."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.module, nn.Dropout):
            return nn.functional.dropout(x, self.module.p, training=True)
        return nn.functional.batch_norm(x, None, None, self.module.weight, self.module.bias, training=True)


def _replace(module: nn.Module, kind: type[nn.Module], build: Callable[[nn.Module], nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, build(child))


def _rounded(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype).float())

    return change


def _swap_layers(module: Any) -> None:
    module.layers[0], module.layers[1] = module.layers[1], module.layers[0]


def _swap_heads(module: Any) -> None:
    """The first two heads of the queries change places, and keys and values keep theirs."""
    size = module.layers[0].attention.head_dim
    qkv = module.layers[0].attention.qkv.weight
    qkv[: 2 * size] = torch.cat([qkv[size : 2 * size], qkv[:size]]).clone()


def _head_scale(module: Any) -> None:
    """Attention without its division by the square root of the head's size."""
    for layer in module.layers:
        attention = layer.attention
        rows = attention.num_heads * attention.head_dim
        attention.qkv.weight[:rows] *= attention.head_dim**0.5
        attention.qkv.bias[:rows] *= attention.head_dim**0.5


def _no_position_past(limit: int) -> Callable[[Any], None]:
    def change(module: Any) -> None:
        table = module.position_embedding.weight
        table[limit:] = table[limit - 1].clone()

    return change


def _flip_row(module: Any) -> None:
    module.classifier.weight[1] *= -1


def _negate(module: Any) -> None:
    module.head.weight[2] *= -1


class FirstToken(nn.Module):
    """Pooling of the first token in place of the mean."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inner = self.module
        is_text = attention_mask.bool()
        hidden = inner.token_embedding(input_ids) + inner.position_embedding.weight[: input_ids.size(1)]
        for layer in inner.layers:
            hidden = layer(hidden, is_text[:, None, None, :])
        logits: Tensor = inner.classifier(inner.layer_norm(hidden)[:, 0])
        return logits


def _scale_of(position: int, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Multiply one scale of the weights of a quantised graph."""

    def change(graph: onnx.ModelProto) -> None:
        names = _weight_scales(graph)
        tensor = next(one for one in graph.graph.initializer if one.name == names[position])
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))

    return change


def _weight_scales(graph: onnx.ModelProto) -> list[str]:
    """Initialisers that scale int8 weights, in the order of the graph."""
    constants = {one.name for one in graph.graph.initializer}
    wide = {one.name for one in graph.graph.initializer if one.data_type == onnx.TensorProto.INT8 and len(one.dims) > 1}
    scales = [
        node.input[1]
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in wide and node.input[1] in constants
    ]
    if not scales:  # dynamic quantisation multiplies by the scales after its products
        scales = [one.name for one in graph.graph.initializer if one.name.endswith("_scale") and one.dims]
    return scales


def _labels_reversed(content: dict[str, Any]) -> None:
    content["signature"]["labels"].reverse()


def _image(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["signature"]["preprocessing"]["image"].update(changes)


def _tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        document = json.loads(content["files"]["tokenizer.json"])
        change(document)
        content["files"]["tokenizer.json"] = json.dumps(document)

    return apply


def _keep_case(document: dict[str, Any]) -> None:
    steps = document["normalizer"]["normalizers"]
    document["normalizer"]["normalizers"] = [step for step in steps if step["type"] != "Lowercase"]


def _shift_ids(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {
        token: (i + 1 if 1 < i < len(vocabulary) - 1 else i) for token, i in vocabulary.items()
    }


def _unmasked(content: dict[str, Any]) -> None:
    """Padding that the model takes for text: the mask is filled up with ones, and the ids with another token."""
    content["signature"]["inputs"][1]["padding"] = 1


def _wrong_pad(content: dict[str, Any]) -> None:
    """A model that finds its padding by its id, and a signature with another id."""
    signature = content["signature"]
    signature["inputs"] = signature["inputs"][:1]
    signature["inputs"][0]["padding"] = 1
    signature["preprocessing"]["text"]["pad_id"] = 1


def _shorter(content: dict[str, Any]) -> None:
    """Texts are cut off after eight tokens."""
    content["signature"]["axes"]["length"]["maximum"] = 8
    content["signature"]["preprocessing"]["text"]["max_length"] = 8


def _as(name: str, subject: str, kinds: str, **how: Any) -> list[Fault]:
    """The same fault in several kinds of artifacts, such as ``ts-fp32 onnx-int8``."""
    faults = []
    for kind in kinds.split():
        format, precision = kind.split("-")
        faults.append(Fault(name=name, subject=subject, format=FORMATS[format], precision=precision, **how))
    return faults


def _first_row_again(output: Tensor) -> Tensor:
    return output[:1].expand(output.shape).clone()


def _change_one(module: Any) -> None:
    module.classifier.weight[0, 1] += 0.01


def _nan(module: Any) -> None:
    module.classifier.weight[0, 0] = torch.nan


def _zero_channel(module: Any) -> None:
    module.features[0].conv.weight[3:5] = 0


def _no_bias(name: str) -> Callable[[Any], None]:
    return lambda module: module.get_submodule(name).bias.zero_()


def _causal(module: Any) -> nn.Module:
    for layer in module.layers:
        layer.attention.forward = _causal_attention(layer.attention)
    return module  # type: ignore[no-any-return]


def _causal_attention(attention: Any) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, visible: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        past = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()
        return type(attention).forward(attention, hidden, visible & past)  # type: ignore[no-any-return]

    return forward


FAULTS: tuple[Fault, ...] = (
    *_as("one weight changed", DIGITS, "ts-fp32 onnx-fp32", module=weights(_change_one)),
    *_as("NaN in a weight", DIGITS, "ts-fp32 onnx-fp32", module=weights(_nan)),
    *_as("batch norm eps 1e-3", DIGITS, "ts-fp32 onnx-fp32", module=weights(_set_eps(nn.BatchNorm2d, 1e-3))),
    *_as(
        "batch norm in training mode",
        DIGITS,
        "ts-fp32",
        module=weights(lambda m: _replace(m, nn.BatchNorm2d, AlwaysTraining)),
    ),
    *_as("transposed images", DIGITS, "onnx-fp32 onnx-int8", module=before(lambda x: (x.transpose(2, 3),))),
    *_as("pixels divided by 256", DIGITS, "ts-fp32", module=before(lambda x: ((x + 0.8) * (255 / 256) - 0.8,))),
    *_as("classes reversed", DIGITS, "ts-int8 onnx-int8", module=after(lambda y: y.flip(1))),
    *_as("labels reversed", DIGITS, "onnx-int8", checkpoint=_labels_reversed, named=True),
    *_as("wrong mean", DIGITS, "onnx-int8", checkpoint=_image(mean=[0.45])),
    *_as("wrong std", DIGITS, "ts-fp32", checkpoint=_image(std=[0.45])),
    *_as("zeroed channels", DIGITS, "onnx-int8", module=weights(_zero_channel)),
    *_as("sign of one row", DIGITS, "ts-int8 onnx-int8 pt2-int8", module=weights(_flip_row)),
    *_as("missing bias", DIGITS, "onnx-fp32", module=weights(_no_bias("classifier"))),
    *_as(
        "leaky activation", DIGITS, "ts-fp32", module=weights(lambda m: _replace(m, nn.ReLU, lambda _: nn.LeakyReLU()))
    ),
    *_as("weights rounded to bf16", DIGITS, "onnx-fp32", module=weights(_rounded(torch.bfloat16))),
    *_as("rows in another order", DIGITS, "ts-int8", module=after(lambda y: y.flip(0))),
    *_as("first row for all", DIGITS, "onnx-int8", module=after(_first_row_again)),
    *_as("int8 scale 1.5 times", DIGITS, "onnx-int8", graph=_scale_of(0, 1.5)),
    *_as("stale checkpoint", TICKETS, "ts-int8 onnx-fp32", run=EARLIER),
    *_as("layers swapped", TICKETS, "ts-fp32 onnx-int8 pt2-int8", module=weights(_swap_layers)),
    *_as("layer norm eps 1e-3", TICKETS, "ts-fp32 onnx-fp32", module=weights(_set_eps(nn.LayerNorm, 1e-3))),
    *_as("dropped mask", TICKETS, "ts-int8 onnx-fp32 pt2-int8", module=before(lambda i, m: (i, m | 1))),
    *_as(
        "GELU by tanh",
        TICKETS,
        "ts-fp32 onnx-fp32",
        module=weights(lambda m: _replace(m, nn.GELU, lambda _: nn.GELU("tanh"))),
    ),
    *_as(
        "dropout left on", TICKETS, "ts-int8 ts-fp32", module=weights(lambda m: _replace(m, nn.Dropout, AlwaysTraining))
    ),
    *_as("softmax in place of logits", TICKETS, "ts-int8 onnx-fp32", module=after(lambda y: y.softmax(1))),
    *_as("positions past 32 alike", TICKETS, "ts-fp32 onnx-int8", module=weights(_no_position_past(32))),
    *_as(
        "token ids off by one",
        TICKETS,
        "ts-int8 onnx-int8 pt2-int8",
        module=before(lambda i, m: ((i + 1).clamp(max=500), m)),
    ),
    *_as("heads swapped", TICKETS, "ts-fp32 onnx-fp32", module=weights(_swap_heads)),
    *_as("attention not scaled", TICKETS, "ts-int8 onnx-fp32", module=weights(_head_scale)),
    *_as("first token in place of the mean", TICKETS, "ts-int8 onnx-int8", module=FirstToken),
    *_as("causal attention", TICKETS, "ts-fp32", module=_causal),
    *_as("weights rounded to fp16", TICKETS, "ts-fp32", module=weights(_rounded(torch.float16))),
    *_as("tokenizer keeps upper case", TICKETS, "ts-int8", checkpoint=_tokenizer(_keep_case)),
    *_as("vocabulary off by one", TICKETS, "onnx-int8", checkpoint=_tokenizer(_shift_ids)),
    *_as("mask filled up with ones", TICKETS, "ts-fp32", checkpoint=_unmasked),
    *_as("wrong pad id", TICKETS, "onnx-fp32", checkpoint=_wrong_pad),
    *_as("texts cut off early", TICKETS, "ts-fp32", checkpoint=_shorter),
    *_as(
        "outputs cut to the first step",
        MIXER,
        "ts-fp32",
        module=after(lambda y: {**y, "states": y["states"][:, :1].expand_as(y["states"])}),
    ),
    *_as(
        "inputs read as another unit", MIXER, "ts-int8 onnx-fp32", module=before(lambda s, m, c: (s * 1.8 + 0.32, m, c))
    ),
    *_as("sign of one row", MIXER, "ts-fp32 ts-int8 onnx-int8", module=weights(_negate)),
    *_as("missing bias", MIXER, "ts-fp32", module=weights(_no_bias("lift"))),
    *_as("mask ignored", MIXER, "onnx-fp32 ts-int8", module=before(lambda s, m, c: (s, m | 1, c))),
    *_as(
        "context of the first for all",
        MIXER,
        "onnx-int8",
        module=before(lambda s, m, c: (s, m, c[:1].expand_as(c))),
    ),
    *_as(
        "infinite scores",
        MIXER,
        "ts-fp32",
        module=after(lambda y: {**y, "scores": 1 / (y["scores"] - y["scores"])}),
    ),
)
