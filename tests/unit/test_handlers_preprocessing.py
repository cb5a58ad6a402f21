import pytest

from handlers.document import Section
from handlers.errors import SignatureError
from handlers.preprocessing import TextPreprocessing

TEXT = {"tokenizer": "tokenizer.json", "max_length": 16, "pad_id": 0}


def read(**changes):
    return TextPreprocessing.from_section(Section({**TEXT, **changes}, "text"))


def test_longer_texts_are_cut_off_by_default_and_documents_stay_as_they_were():
    assert read() == read(too_long="truncate")
    assert read().to_document() == TEXT


def test_refusing_them_is_written_down():
    assert read(too_long="refuse").to_document() == {**TEXT, "too_long": "refuse"}


@pytest.mark.parametrize("value", ["cut", "", True, 5])
def test_there_is_no_third_way(value):
    with pytest.raises(SignatureError, match=r"text\.too_long"):
        read(too_long=value)
