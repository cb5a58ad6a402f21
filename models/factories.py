"""The model factories that a checkpoint may name."""

import importlib
from collections.abc import Callable

from torch import nn

from models.errors import CheckpointFormatError

ModelFactory = Callable[..., nn.Module]
"""Called with a checkpoint's config as keyword arguments."""

CONV_CLASSIFIER = "models.convnet:build_conv_classifier"
TEXT_CLASSIFIER = "models.text_encoder:build_text_classifier"

_KNOWN = (CONV_CLASSIFIER, TEXT_CLASSIFIER)


def find_factory(import_path: str) -> ModelFactory:
    """Imports a factory by the path that checkpoints name it with.

    Only torchport's own factories: a checkpoint is data, and must not choose what code to call.

    Raises:
        CheckpointFormatError: for any other path.
    """
    if import_path not in _KNOWN:
        raise CheckpointFormatError(
            f"The checkpoint names the model factory {import_path!r}, which is not one of torchport's "
            f"({', '.join(_KNOWN)}); pass your own factory."
        )
    module, _, name = import_path.partition(":")
    factory: ModelFactory = getattr(importlib.import_module(module), name)
    return factory
