"""A tokenizer, trained on the texts at hand and kept as one tokenizer.json: from texts to token ids."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from models.errors import TokenizerError

PAD_ID = 0
"""Fills up shorter texts of a batch."""

UNK_ID = 1
"""Stands for a text that has no token at all."""

FILE_NAME = "tokenizer.json"

_PAD, _UNK = "[PAD]", "[UNK]"
_BYTES = 256
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class TextTokenizer:
    """Byte-level BPE: frequent words are one token, rarer ones several, and no text is out of vocabulary.

    Not WordPiece, whose training in the `tokenizers` library gives other vocabularies from run to run.

    Args:
        tokenizer: one with [PAD] = 0, [UNK] = 1 and a longest text; `train` and `from_bytes` make it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        truncation = tokenizer.truncation
        if tokenizer.token_to_id(_PAD) != PAD_ID or tokenizer.token_to_id(_UNK) != UNK_ID or not truncation:
            raise TokenizerError(
                f"The tokenizer must have {_PAD} = {PAD_ID}, {_UNK} = {UNK_ID} and a truncation; train a new one."
            )
        self._max_length = int(truncation["max_length"])

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, max_length: int, lower_case: bool = True) -> Self:
        """Learns a vocabulary; the same texts give the same bytes in every process.

        Args:
            texts: what to learn from: the training split only.
            vocab_size: most tokens it may have; fewer if the texts have not that many pairs that occur twice.
            max_length: longer texts are cut off after so many tokens.
            lower_case: make no difference between upper and lower case.

        Raises:
            TokenizerError: when a size is impossible.
        """
        smallest = _BYTES + 2
        if vocab_size < smallest:
            raise TokenizerError(
                f"The vocabulary's size is {vocab_size}; it must be at least {smallest}, to hold every byte."
            )
        if max_length < 1:
            raise TokenizerError(f"The longest text has {max_length} tokens; it must have at least 1.")
        tokenizer = Tokenizer(models.BPE(unk_token=_UNK))
        # NFKC: full-width letters, ligatures and no-break spaces are no other words. White space counts once, as
        # else runs of blanks would be tokens.
        steps = [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lower_case else [])])
        # A blank in front: the first word is then the same token as further on.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[_PAD, _UNK],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with _one_thread():
            tokenizer.train_from_iterator(texts, trainer)
        tokenizer.enable_truncation(max_length)
        # The library would find special tokens in texts, so that anybody could write padding into one. Without their
        # entry there, "[PAD]" is five characters; it keeps its id.
        content = {**json.loads(tokenizer.to_str()), "added_tokens": []}
        return cls(Tokenizer.from_str(json.dumps(content)))

    @classmethod
    def from_bytes(cls, content: bytes, *, source: str = FILE_NAME) -> Self:
        """Reads a tokenizer.json.

        Args:
            content: the file's bytes.
            source: where they come from, for messages.

        Raises:
            TokenizerError: for bytes that are no tokenizer, or one that was not trained here.
        """
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exceptions
            raise TokenizerError(
                f"{source} is no tokenizer that can be read ({error}); take the one that was saved with the weights."
            ) from error
        try:
            return cls(tokenizer)
        except TokenizerError as error:
            raise TokenizerError(
                f"{source} is not a tokenizer that torchport trained; take the one that was saved with the weights."
            ) from error

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding table for its ids."""
        return self._tokenizer.get_vocab_size()

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self._max_length

    @property
    def pad_id(self) -> int:
        """Fills up shorter texts of a batch."""
        return PAD_ID

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turns texts into token ids, at least 1 and at most `max_length` for each text, without padding."""
        with _one_thread():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids or [UNK_ID] for encoding in encodings]

    def to_bytes(self) -> bytes:
        """The content of tokenizer.json."""
        return self._tokenizer.to_str(pretty=True).encode()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the library from starting threads: loader workers that are forked later would lose them, and warn of it."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
