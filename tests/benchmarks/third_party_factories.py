"""Small configurations of third-party architectures, for the export to prove itself on.

Every ``build_*`` is a factory as ``--model package.module:factory`` takes it: it gives the library's own module,
unchanged, so what is exercised is what users have. ``ARCHITECTURES`` adds a signature to each.

Fresh modules are useless as evidence: their weights are so small that outputs hardly depend on inputs, and then no
comparison of outputs sees a fault. ``random_state`` draws weights that keep the variance of what flows through them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LENGTH = {"length": {"minimum": 1, "maximum": 24}}
VOCABULARY = 99
# Variance that a layer adds: what follows (ReLU, GELU, averages over positions) takes it away again.
_GAIN = 2.0


def build_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=5
    )
    return ResNetForImageClassification(config)


def build_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=5, image_size=32)
    return ConvNextForImageClassification(config)


def build_mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, min_depth=8, num_labels=5, image_size=32)
    return MobileNetV2ForImageClassification(config)


def build_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def build_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return SwinForImageClassification(config)


def build_segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=4,
    )
    return SegformerForSemanticSegmentation(config)


def build_clip_vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    return CLIPVisionModelWithProjection(config)


def build_yolos() -> nn.Module:
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=[32, 48],
        patch_size=8,
        num_detection_tokens=6,
        num_labels=3,
    )
    return YolosForObjectDetection(config)


def build_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_text(), num_labels=4))


def build_distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, n_layers=3, n_heads=4, hidden_dim=96, max_position_embeddings=64
    )
    return DistilBertModel(config)


def build_roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForTokenClassification

    return RobertaForTokenClassification(RobertaConfig(**_text(), pad_token_id=1, num_labels=6))


def build_albert() -> nn.Module:
    from transformers import AlbertConfig, AlbertForQuestionAnswering

    return AlbertForQuestionAnswering(AlbertConfig(**_text(), embedding_size=24))


def build_deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        **_text(),
        relative_attention=True,
        position_buckets=16,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
    )
    return DebertaV2Model(config)


def build_modernbert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    config = ModernBertConfig(
        **_text(),
        pad_token_id=0,
        local_attention=8,
        global_attn_every_n_layers=2,
        num_labels=4,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        reference_compile=False,
    )
    return ModernBertForSequenceClassification(config)


def build_t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4)
    return T5EncoderModel(config)


def build_clip_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    # The end token 2 is how older models say: pool where the greatest id stands.
    return CLIPTextModelWithProjection(CLIPTextConfig(**_text(), projection_dim=24, eos_token_id=2, bos_token_id=1))


def build_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def build_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_text(), num_key_value_heads=2))


def build_whisper_encoder() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=16,
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        max_source_positions=40,
    )
    return WhisperEncoder(config)


def build_wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **_text(),
        conv_dim=[24, 24, 24],
        conv_kernel=[10, 3, 3],
        conv_stride=[5, 2, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    return Wav2Vec2ForCTC(config)


def build_patchtst() -> nn.Module:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3,
        context_length=48,
        prediction_length=8,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=64,
        loss="mse",
    )
    return PatchTSTForPrediction(config)


def build_timm_efficientnet() -> nn.Module:
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=5)


def _text() -> dict[str, Any]:
    """What most encoders of texts call their sizes."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A third-party module and what it takes.

    Attributes:
        build: Its factory, in this module.
        signature: The signature's document.
        data: Names of what the signature needs beside it: ``tokenizer``.
    """

    build: Callable[[], nn.Module]
    signature: dict[str, Any]
    data: tuple[str, ...] = field(default=())

    @property
    def factory(self) -> str:
        """Import path of the factory."""
        return f"{self.build.__module__}:{self.build.__name__}"


def tensor_document(
    name: str,
    *shape: int | str,
    dtype: str = "float32",
    low: float | None = None,
    high: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A tensor of a signature; its batch axis comes by itself."""
    bounds = {key: value for key, value in (("minimum", low), ("maximum", high)) if value is not None}
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape], **bounds, **more}


def signature_document(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A signature of the task ``tensor``."""
    return {"format_version": 1, "task": "tensor", "inputs": inputs, "outputs": outputs, **more}


def _image(*outputs: dict[str, Any], height: int = 32, width: int = 32) -> dict[str, Any]:
    return signature_document([tensor_document("pixel_values", 3, height, width, low=-2, high=2)], list(outputs))


def _words(*outputs: dict[str, Any], pad: int = 0, mask: bool = True) -> dict[str, Any]:
    inputs = [tensor_document("input_ids", "length", dtype="int64", low=3, high=VOCABULARY - 1, padding=pad)]
    if mask:
        inputs.append(tensor_document("attention_mask", "length", dtype="int64", low=1, high=1, padding=0))
    return signature_document(inputs, list(outputs), axes=LENGTH)


_LABELS = ["ant", "bee", "cat", "dog", "eel"]
_IMAGE_CLASSES = {
    "format_version": 1,
    "task": "image-classification",
    "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 32, 32]}],
    "outputs": [tensor_document("logits", 5)],
    "labels": _LABELS,
    "preprocessing": {
        "image": {"mode": "RGB", "height": 32, "width": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    },
}
_TEXT_CLASSES = {
    "format_version": 1,
    "task": "text-classification",
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "maximum": VOCABULARY - 1},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"]},
    ],
    "outputs": [tensor_document("logits", 4)],
    "labels": _LABELS[:4],
    "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 24, "pad_id": 0}},
}

ARCHITECTURES = {
    "resnet": Architecture(build=build_resnet, signature=_IMAGE_CLASSES),
    "convnext": Architecture(build=build_convnext, signature=_image(tensor_document("logits", 5))),
    "mobilenetv2": Architecture(build=build_mobilenet, signature=_image(tensor_document("logits", 5))),
    "vit": Architecture(build=build_vit, signature=_IMAGE_CLASSES),
    "swin": Architecture(build=build_swin, signature=_image(tensor_document("logits", 5))),
    "segformer": Architecture(
        build=build_segformer, signature=_image(tensor_document("logits", 4, 16, 24), height=64, width=96)
    ),
    "clip-vision": Architecture(
        build=build_clip_vision,
        signature=_image(tensor_document("image_embeds", 24), tensor_document("last_hidden_state", 17, 48)),
    ),
    "yolos": Architecture(
        build=build_yolos,
        signature=_image(tensor_document("pred_boxes", 6, 4), tensor_document("logits", 6, 4), height=32, width=48),
    ),
    "bert": Architecture(build=build_bert, signature=_TEXT_CLASSES, data=("tokenizer",)),
    "distilbert": Architecture(
        build=build_distilbert, signature=_words(tensor_document("last_hidden_state", "length", 48))
    ),
    "roberta": Architecture(build=build_roberta, signature=_words(tensor_document("logits", "length", 6), pad=1)),
    "albert": Architecture(
        build=build_albert,
        signature=_words(tensor_document("start_logits", "length"), tensor_document("end_logits", "length")),
    ),
    "deberta": Architecture(build=build_deberta, signature=_words(tensor_document("last_hidden_state", "length", 48))),
    "modernbert": Architecture(build=build_modernbert, signature=_words(tensor_document("logits", 4))),
    "t5-encoder": Architecture(
        build=build_t5_encoder, signature=_words(tensor_document("last_hidden_state", "length", 48))
    ),
    "clip-text": Architecture(build=build_clip_text, signature=_words(tensor_document("text_embeds", 24))),
    "gpt2": Architecture(build=build_gpt2, signature=_words(tensor_document("logits", "length", VOCABULARY))),
    "llama": Architecture(build=build_llama, signature=_words(tensor_document("logits", "length", VOCABULARY))),
    "whisper-encoder": Architecture(
        build=build_whisper_encoder,
        signature=signature_document(
            [tensor_document("input_features", 16, 80, low=-1, high=1)], [tensor_document("last_hidden_state", 40, 48)]
        ),
    ),
    # No padding: its convolutions and its normalisation see past the end, so only equal lengths share a batch.
    "wav2vec2": Architecture(
        build=build_wav2vec2,
        signature=signature_document(
            [tensor_document("input_values", "samples", low=-1, high=1)],
            [tensor_document("logits", "frames", VOCABULARY)],
            axes={"samples": {"minimum": 200, "maximum": 800}},
        ),
    ),
    "patchtst": Architecture(
        build=build_patchtst,
        signature=signature_document(
            [tensor_document("past_values", 48, 3, low=-2, high=2)], [tensor_document("prediction_outputs", 8, 3)]
        ),
    ),
    "timm-efficientnet": Architecture(
        build=build_timm_efficientnet,
        signature=signature_document([tensor_document("x", 3, 64, 64, low=-2, high=2)], [tensor_document("logits", 5)]),
    ),
}


def random_state(module: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with which outputs depend on inputs.

    Matrices and kernels keep the variance of what flows through them (2 / fan-in, since what follows halves it),
    embeddings and tables of positions have the variance 1; gains lie about 1, biases about 0.

    Args:
        module: A fresh module; it keeps its own weights.
        seed: Another one gives other weights.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    owners = {
        f"{prefix}.{name}" if prefix else name: owner
        for prefix, owner in module.named_modules()
        for name, _ in owner.named_parameters(recurse=False)
    }
    for name, owner in owners.items():
        if name in state:
            state[name] = _drawn(name, owner, state[name], generator)
    return state


def _drawn(name: str, owner: nn.Module, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=generator)
    kind = type(owner).__name__
    if "parametrizations" in name:  # of weight norm: a length and a direction, right as they come
        return value
    if name.endswith("bias") and value.ndim == 1:
        return 0.1 * noise
    if value.ndim == 1:
        return 1 + 0.1 * noise if "Norm" in kind or "layer_scale" in name else 0.5 * noise
    if isinstance(owner, nn.Embedding) or not hasattr(owner, "weight"):
        return noise
    # The linear layer of GPT-2 has its matrix the other way round.
    fan_in = value.shape[0] if kind == "Conv1D" else value[0].numel()
    return noise * math.sqrt(_GAIN / fan_in)
