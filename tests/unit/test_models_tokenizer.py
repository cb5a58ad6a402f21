"""The tokenizer: the same texts give the same bytes, every text has tokens, and forks stay silent."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import TokenizerError
from models.tickets import generate_tickets
from models.tokenizer import PAD_ID, UNK_ID, TextTokenizer

ROOT = Path(__file__).parents[2]
TEXTS = generate_tickets(seed=1, count=300).texts


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, vocab_size=600, max_length=16)


def test_the_same_texts_give_the_same_bytes_in_every_process(tokenizer: TextTokenizer) -> None:
    code = (
        "import hashlib, json, sys; from models.tokenizer import TextTokenizer;"
        "content = TextTokenizer.train(json.load(sys.stdin), vocab_size=600, max_length=16).to_bytes();"
        "print(hashlib.sha256(content).hexdigest())"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            input=json.dumps(TEXTS),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == hashlib.sha256(tokenizer.to_bytes()).hexdigest()


def run_alone(code: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    code = (
        "import os; from models.tokenizer import TextTokenizer;"
        "t = TextTokenizer.train(['a b c'] * 99, vocab_size=300, max_length=4); t.encode_batch(['a'] * 99);" + code
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_forks_after_its_use_are_silent_and_work() -> None:
    done = run_alone(
        "pid = os.fork();"
        "print(t.encode_batch(['a b'] * 99)[0] == t.encode_batch(['a b'])[0], flush=True);"
        "pid and os.waitpid(pid, 0)"
    )
    assert done.stdout.count("True") == 2
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc, which is Linux only")
def test_no_threads_are_left_that_a_fork_would_lose() -> None:
    assert run_alone("print(len(os.listdir('/proc/self/task')))").stdout.strip() == "1"


@pytest.mark.parametrize("before", [None, "true"])
def test_the_environment_stays_as_it_was(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)

    tokenizer.encode_batch(["a"])

    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_ids_lie_in_the_vocabulary_and_the_longest_text_is_cut(tokenizer: TextTokenizer) -> None:
    rows = tokenizer.encode_batch(TEXTS)

    assert tokenizer.vocab_size == 600
    assert max(map(len, rows)) == tokenizer.max_length == 16
    assert min(min(row) for row in rows) > UNK_ID
    assert max(max(row) for row in rows) < tokenizer.vocab_size


def test_padding_and_the_empty_text_have_ids_of_their_own(tokenizer: TextTokenizer) -> None:
    document = json.loads(tokenizer.to_bytes())

    assert tokenizer.pad_id == PAD_ID == document["model"]["vocab"]["[PAD]"] == 0
    assert UNK_ID == document["model"]["vocab"]["[UNK]"] == 1
    assert tokenizer.encode_batch(["", " \t\n"]) == [[UNK_ID], [UNK_ID]]


@pytest.mark.parametrize("text", ["日本語", "🙂", "\u200b", "\x00", "Straße"])
def test_no_text_is_out_of_vocabulary(tokenizer: TextTokenizer, text: str) -> None:
    (row,) = tokenizer.encode_batch([text])

    assert row
    assert UNK_ID not in row


def test_white_space_and_letter_forms_make_no_other_tokens(tokenizer: TextTokenizer) -> None:
    plain, *others = tokenizer.encode_batch(
        ["my order", "  my \n\n order ", "my\u00a0order", "\uff4d\uff59 order", "MY Order"]
    )

    assert others == [plain] * 4


def test_case_can_matter() -> None:
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=600, max_length=16, lower_case=False)

    lower, upper = tokenizer.encode_batch(["order", "ORDER"])

    assert lower != upper


def test_the_first_word_is_the_same_token_as_any_other(tokenizer: TextTokenizer) -> None:
    first, second = tokenizer.encode_batch(["order", "my order"])

    assert second[-len(first) :] == first


def test_bytes_give_the_same_tokenizer_back(tokenizer: TextTokenizer) -> None:
    again = TextTokenizer.from_bytes(tokenizer.to_bytes())

    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (again.vocab_size, again.max_length) == (600, 16)
    assert again.to_bytes() == tokenizer.to_bytes()


def test_special_tokens_cannot_be_written_into_a_text(tokenizer: TextTokenizer) -> None:
    (row,) = tokenizer.encode_batch(["a [PAD] b [UNK]"])

    assert PAD_ID not in row
    assert UNK_ID not in row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"^run/tokenizer.json is no tokenizer that can be read \(.*\); take the one that was saved"),
        (b"\xff\x00", r"is no tokenizer that can be read"),
        (b'{"model": 1}', r"is no tokenizer that can be read"),
        (
            b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
            b'"pre_tokenizer":null,"post_processor":null,"decoder":null,'
            b'"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}',
            r"^run/tokenizer.json is not a tokenizer that torchport trained; take the one that was saved",
        ),
    ],
)
def test_other_bytes_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        TextTokenizer.from_bytes(content, source="run/tokenizer.json")


def test_truncated_bytes_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TokenizerError, match="is no tokenizer that can be read"):
        TextTokenizer.from_bytes(tokenizer.to_bytes()[:-9])


@pytest.mark.parametrize(
    ("vocab_size", "max_length", "message"),
    [(257, 8, "size is 257; it must be at least 258"), (300, 0, "has 0 tokens; it must have at least 1")],
)
def test_impossible_sizes_are_refused(vocab_size: int, max_length: int, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        TextTokenizer.train(["a"], vocab_size=vocab_size, max_length=max_length)
