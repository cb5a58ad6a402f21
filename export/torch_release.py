"""Which torch this is, where releases that are supported differ in what an export has to do."""

from __future__ import annotations

import torch

TORCH = tuple(int(word) for word in torch.__version__.split(".")[:2])
"""Major and minor number, to be compared with such as ``(2, 11)``."""
