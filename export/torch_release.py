"""Which torch this is, where releases that are supported differ in what an export has to do."""

from __future__ import annotations

import torch

MAJOR, MINOR = (int(word) for word in torch.__version__.split(".")[:2])
IS_BEFORE_2_11 = (MAJOR, MINOR) < (2, 11)
