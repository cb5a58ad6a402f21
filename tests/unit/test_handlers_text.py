import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from handlers.decoder import build_decoder
from handlers.errors import LoadError, RequestError
from handlers.preprocessing import TextPreprocessing
from handlers.request import Part
from handlers.signature import TEXT_CLASSIFICATION, Signature
from handlers.tensors import Axis, TensorSpec
from handlers.text import MAX_TEXT_CHARS, TextDecoder, load_tokenizer

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "[CLS]": 4}
MAX_LENGTH = 4


def signature(dtype="int64", mask=True, highest=4, too_long="truncate"):
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    highs = {"input_ids": highest, "attention_mask": 1}
    return Signature(
        task=TEXT_CLASSIFICATION,
        inputs=tuple(
            TensorSpec(name=name, dtype=dtype, shape=("batch", "length"), minimum=0, maximum=highs[name], padding=0)
            for name in names
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 2)),),
        labels=("no", "yes"),
        axes={"length": Axis(minimum=1, maximum=MAX_LENGTH)},
        text=TextPreprocessing(tokenizer="tokenizer.json", max_length=MAX_LENGTH, pad_id=0, too_long=too_long),
    )


def words(unknown="[UNK]"):
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def folder_of(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(words(), tmp_path_factory)


def decode(folder, *parts, max_samples=4, **options):
    decoder = build_decoder(signature(**options), max_samples=max_samples, folder=folder)
    return decoder.decode([Part(value=value, content_type=kind) for value, kind in parts])


def ids(folder, text, **options):
    (sample,) = decode(folder, ({"inputs": text}, "application/json"), **options).samples
    return sample["input_ids"].tolist()


def refusal(folder, *parts, **options):
    with pytest.raises(RequestError) as caught:
        decode(folder, *parts, **options)
    assert caught.value.message.isprintable()
    assert caught.value.message.endswith(".")
    return caught.value.status, caught.value.code


def attempt(folder, value, kind):
    """Status and samples; anything but a RequestError goes through."""
    try:
        return 200, decode(folder, (value, kind)).samples
    except RequestError as error:
        return error.status, []


class TestTokens:
    @pytest.mark.parametrize("dtype", ["int64", "int32"])
    def test_ids_and_mask_have_the_signature_s_dtype(self, folder, dtype):
        (sample,) = decode(folder, ({"inputs": "good bad"}, "application/json"), dtype=dtype).samples
        assert list(sample) == ["input_ids", "attention_mask"]
        assert (sample["input_ids"].dtype, sample["input_ids"].tolist()) == (np.dtype(dtype), [2, 3])
        assert (sample["attention_mask"].dtype, sample["attention_mask"].tolist()) == (np.dtype(dtype), [1, 1])

    def test_a_model_without_a_mask_gets_none(self, folder):
        (sample,) = decode(folder, ({"inputs": "good"}, "application/json"), mask=False).samples
        assert list(sample) == ["input_ids"]

    def test_longer_texts_are_cut_off(self, folder):
        assert ids(folder, "good bad good bad good bad") == [2, 3, 2, 3]

    @pytest.mark.parametrize(("words", "cut"), [(1, False), (MAX_LENGTH, False), (MAX_LENGTH + 1, True), (5000, True)])
    def test_a_cut_text_is_marked(self, folder, words, cut):
        decoded = decode(folder, ({"inputs": ["good", "bad " * words]}, "application/json"))
        assert decoded.truncated == ({1} if cut else set())

    def test_a_signature_may_refuse_longer_texts_instead(self, folder):
        long = ({"inputs": ["good"] * 2 + ["bad " * (MAX_LENGTH + 1)]}, "application/json")
        assert refusal(folder, long, too_long="refuse") == (422, "too_many_tokens")
        fitting = ({"inputs": "bad " * MAX_LENGTH}, "application/json")
        assert len(decode(folder, fitting, too_long="refuse").samples[0]["input_ids"]) == MAX_LENGTH

    @pytest.mark.parametrize("body", [b"\xef\xbb\xbfgood", "\ufeffgood"])
    def test_a_byte_order_mark_is_no_part_of_the_text(self, folder, body):
        (sample,) = decode(folder, (body, "text/plain")).samples
        assert sample["input_ids"].tolist() == [2]

    @pytest.mark.parametrize("text", ["", "   ", "\n"])
    def test_a_text_without_a_token_is_one_unknown_token(self, folder, text):
        assert ids(folder, text) == [1]

    def test_or_is_refused_by_a_tokenizer_that_has_none(self, tmp_path_factory):
        tokenizer = Tokenizer(models.BPE({"a": 0}, []))
        where = folder_of(tokenizer, tmp_path_factory)
        assert refusal(where, ({"inputs": ""}, "application/json")) == (422, "empty_text")

    def test_special_tokens_are_added_and_kept_when_cut(self, tmp_path_factory):
        tokenizer = words()
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 4)])
        where = folder_of(tokenizer, tmp_path_factory)
        assert ids(where, "good bad good bad") == [4, 2, 3, 2]
        assert ids(where, "") == [4]

    def test_padding_of_the_tokenizer_is_switched_off(self, tmp_path_factory):
        tokenizer = words()
        tokenizer.enable_padding(length=4)
        assert ids(folder_of(tokenizer, tmp_path_factory), "good") == [2]

    @pytest.mark.parametrize(("own", "length"), [(2, 2), (400, MAX_LENGTH)])
    def test_the_shorter_truncation_holds(self, tmp_path_factory, own, length):
        tokenizer = words()
        tokenizer.enable_truncation(own)
        assert len(ids(folder_of(tokenizer, tmp_path_factory), "good " * 9)) == length

    def test_truncation_keeps_its_direction(self, tmp_path_factory):
        tokenizer = words()
        tokenizer.enable_truncation(400, direction="left")
        assert ids(folder_of(tokenizer, tmp_path_factory), "good good good good bad") == [2, 2, 2, 3]

    def test_a_token_beyond_the_model_s_is_refused(self, folder):
        assert refusal(folder, ({"inputs": "bad"}, "application/json"), highest=2) == (422, "out_of_range")


class TestForms:
    @pytest.mark.parametrize(
        ("value", "kind", "many", "count"),
        [
            (b'{"inputs": "good"}', "application/json", False, 1),
            (b' {"inputs": "good"}', "", False, 1),
            ({"inputs": ["good", "bad"]}, "application/json", True, 2),
            ({"inputs": ["good"]}, "application/json", True, 1),
            ({"instances": ["good", "bad", ""]}, "application/json", True, 3),
            ("good", "text/plain", False, 1),
            ("{}", "text/plain", False, 1),
            ("gut, schön".encode(), "text/plain", False, 1),
            (b"good", "", False, 1),
            (b"good", "application/octet-stream", False, 1),
        ],
    )
    def test_forms_that_are_taken(self, folder, value, kind, many, count):
        decoded = decode(folder, (value, kind))
        assert (decoded.many, len(decoded.samples)) == (many, count)

    @pytest.mark.parametrize("key", ["inputs", "instances"])
    def test_parameters_stand_beside_the_texts(self, folder, key):
        decoded = decode(folder, ({key: ["good"], "parameters": {"top_k": 1}}, "application/json"))
        assert decoded.parameters.top_k == 1

    @pytest.mark.parametrize(
        ("parameters", "status", "code"),
        [({"top_k": 3}, 422, "wrong_parameter"), ({"k": 3}, 422, "unknown_parameter"), ([], 400, "wrong_parameters")],
    )
    def test_wrong_parameters_are_refused(self, folder, parameters, status, code):
        document = {"inputs": "good", "parameters": parameters}
        assert refusal(folder, (document, "application/json")) == (status, code)

    def test_multipart_is_one_text_a_field(self, folder):
        decoded = decode(folder, ("good", "text/plain"), (b"bad", "multipart/form-data"))
        assert decoded.many
        assert [sample["input_ids"].tolist() for sample in decoded.samples] == [[2], [3]]

    @pytest.mark.parametrize(
        ("parts", "status", "code"),
        [
            ([], 400, "empty_request"),
            ([(b"", "text/plain")], 400, "empty_request"),
            ([("", "text/plain")], 400, "empty_request"),
            ([("good", "text/html")], 415, "unsupported_type"),
            ([(b"\xff", "text/plain")], 400, "not_utf8"),
            ([(b"\xff", "")], 415, "unsupported_type"),
            ([(b"good", "image/png")], 415, "unsupported_type"),
            ([("good", "application/json")], 400, "wrong_body"),
            ([({"inputs": 1}, "application/json")], 400, "not_text"),
            ([({"inputs": None}, "application/json")], 400, "not_text"),
            ([({"inputs": {"text": "a"}}, "application/json")], 400, "not_text"),
            ([({"inputs": ["a", 1]}, "application/json")], 400, "not_text"),
            ([({"instances": [["a"]]}, "application/json")], 400, "not_text"),
            ([({"inputs": []}, "application/json")], 422, "no_samples"),
            ([({"inputs": ["a"] * 5}, "application/json")], 413, "too_many_samples"),
            ([("a", "text/plain")] * 5, 413, "too_many_samples"),
            ([({"inputs": "a" * (MAX_TEXT_CHARS + 1)}, "application/json")], 413, "text_too_long"),
            ([({"inputs": ["a" * MAX_TEXT_CHARS] * 8 + ["a"]}, "application/json")], 413, "text_too_long"),
            ([(b'{"inputs": "\\ud800"}', "application/json")], 400, "not_unicode"),
            ([("a", "text/plain"), (b"\x89PNG\xff", "image/png")], 415, "unsupported_type"),
        ],
    )
    def test_a_bad_request_gets_its_own_status_and_code(self, folder, parts, status, code):
        assert refusal(folder, *parts, max_samples=4 if code == "too_many_samples" else 9) == (status, code)

    @given(
        st.recursive(
            st.none() | st.integers() | st.text(st.characters(codec=None)) | st.text(st.characters(categories=["Cs"])),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        )
    )
    def test_any_json_is_decoded_or_refused(self, folder, value):
        for document in (value, {"inputs": value}, {"instances": value}):
            status, samples = attempt(folder, document, "application/json")
            assert 200 <= status < 500
            assert all(1 <= len(sample["input_ids"]) <= MAX_LENGTH for sample in samples)

    @given(st.binary(max_size=40), st.sampled_from(["", "text/plain", "application/json", "a/b"]))
    def test_any_body_is_decoded_or_refused(self, folder, data, kind):
        assert 200 <= attempt(folder, data, kind)[0] < 500


class TestLoading:
    TEXT = signature().text

    def test_without_the_library_the_remedy_is_told(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(LoadError, match="pip install tokenizers"):
            load_tokenizer(folder, self.TEXT)

    @pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", json.dumps([1]).encode()])
    def test_a_file_that_cannot_be_read_is_a_load_error(self, tmp_path, content):
        if content is not None:
            (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(LoadError, match=r"tokenizer\.json is no tokenizer that can be read"):
            load_tokenizer(tmp_path, self.TEXT)

    def test_without_a_folder_there_is_no_tokenizer(self):
        with pytest.raises(LoadError, match="needs its tokenizer"):
            build_decoder(signature(), max_samples=4)

    def test_the_library_starts_no_threads_of_its_own(self, folder, monkeypatch):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        TextDecoder(signature(), load_tokenizer(folder, self.TEXT), max_samples=1)
        import os

        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
