"""A linear classifier over the tokens of a text and, if asked, its pairs of neighbours."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAIR_MULTIPLIERS = (31337, 7919)
"""Of the first and the second token of a pair, in the hash that chooses its row. Both are prime: with a number of rows
that is a multiple of neither, each token alone decides among all rows; with a multiple, one of them hardly matters."""

# Adam moves every weight by about the learning rate, whatever its gradient; a linear model over single tokens needs
# several times the step of an encoder.
_SCALE = 5.0


class BagOfTokens(nn.Module):
    """Each token, and each pair of neighbours, adds its own weight to every class.

    The sum is divided by the square root of how many there are, so that long texts are surer than short ones, but not
    in proportion. Pairs share the rows of a hash table (the hashing trick, Weinberger et al., arXiv:0902.2206).

    Shapes (B = batch, T = tokens, K = classes):
        input  input_ids [B, T] int64
        input  is_text [B, T] bool, false for padding
        output [B, K] float32 logits

    Args:
        vocab_size: tokens in the vocabulary.
        num_classes: length of the logits.
        pair_buckets: rows for pairs of neighbours, and no multiple of a number in `PAIR_MULTIPLIERS`; 0 for none.
    """

    def __init__(self, vocab_size: int, num_classes: int, *, pair_buckets: int = 0) -> None:
        super().__init__()
        self.pair_buckets = pair_buckets
        self.first_multiplier, self.second_multiplier = PAIR_MULTIPLIERS  # TorchScript knows no global numbers
        self.scale = _SCALE
        self.token_weights = nn.Embedding(vocab_size, num_classes)
        self.pair_weights = nn.Embedding(pair_buckets, num_classes) if pair_buckets else None
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero: without a hidden layer there is no symmetry to break."""
        nn.init.zeros_(self.token_weights.weight)
        if self.pair_weights is not None:
            nn.init.zeros_(self.pair_weights.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input_ids: Tensor, is_text: Tensor) -> Tensor:
        """Maps token ids [B, T] to logits [B, K]."""
        present = is_text.unsqueeze(-1).to(self.bias.dtype)  # [B, T, 1]
        total = (self.token_weights(input_ids) * present).sum(dim=1)
        count = present.sum(dim=1)
        if self.pair_weights is not None:
            # Filled up before the cut: of T - 1, exporters with a dynamic length must know whether it is 1.
            second = F.pad(input_ids, (0, 1))[:, 1:]
            both = present * F.pad(present, (0, 0, 0, 1))[:, 1:]
            mixed = input_ids * self.first_multiplier + second * self.second_multiplier
            bucket = torch.remainder(mixed, self.pair_buckets)
            total = total + (self.pair_weights(bucket) * both).sum(dim=1)
            count = count + both.sum(dim=1)
        logits: Tensor = self.scale * total / count.clamp(min=1).sqrt() + self.bias
        return logits
