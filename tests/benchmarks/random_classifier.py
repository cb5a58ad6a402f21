"""The last layer of models with random weights, which are measured as if they were trained."""

import torch
from torch import Tensor, nn

# Of the logits, from sample to sample: sure of most answers, as a trained model is.
SPREAD = 6.0


@torch.no_grad()
def tell_apart(classifier: nn.Linear, features: Tensor) -> None:
    """Give a layer random weights whose logits tell samples apart, each class about as often as another.

    Args:
        classifier: Maps features to logits.
        features: [N, F] float32, of samples like those that are measured.
    """
    weight = torch.randn(classifier.weight.shape) / features.std(0).clamp_min(1e-3)
    weight *= (SPREAD / ((features - features.mean(0)) @ weight.T).std(0))[:, None]
    classifier.weight.copy_(weight)
    classifier.bias.copy_(-weight @ features.mean(0))
