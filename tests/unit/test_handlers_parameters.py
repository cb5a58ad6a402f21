import pytest

from handlers.errors import RequestError
from handlers.parameters import Parameters, query_parameters, read_parameters


@pytest.mark.parametrize(
    ("value", "expected"), [(None, None), ({}, None), ({"top_k": None}, None), ({"top_k": 1}, 1), ({"top_k": 3}, 3)]
)
def test_what_is_read(value, expected):
    assert read_parameters(value, classes=3) == Parameters(top_k=expected)


@pytest.mark.parametrize(
    ("value", "status", "message"),
    [
        ([], 400, "The parameters must be an object of names and values, not a list."),
        ("top_k", 400, "The parameters must be an object of names and values, not a string."),
        ({"topk": 3}, 422, "Unknown parameters: 'topk'; this model takes top_k."),
        ({"top_k": 0}, 422, "top_k must be a whole number from 1 to 3."),
        ({"top_k": 4}, 422, "top_k must be a whole number from 1 to 3."),
        ({"top_k": 2.0}, 422, "top_k must be a whole number from 1 to 3."),
        ({"top_k": True}, 422, "top_k must be a whole number from 1 to 3."),
        ({"top_k": "2"}, 422, "top_k must be a whole number from 1 to 3."),
        ({"top_k": 10**400}, 422, "top_k must be a whole number from 1 to 3."),
    ],
)
def test_what_is_refused(value, status, message):
    with pytest.raises(RequestError) as caught:
        read_parameters(value, classes=3)
    assert (caught.value.status, caught.value.message) == (status, message)


def test_a_model_without_classes_takes_none():
    with pytest.raises(RequestError, match=r"Unknown parameters: 'top_k'; this model takes none\."):
        read_parameters({"top_k": 1}, classes=0)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, None),
        ({"token": b"x"}, None),
        ({"top_k": bytearray(b"3"), "token": b"x"}, {"top_k": 3}),
        ({"top_k": "3"}, {"top_k": 3}),
        ({"top_k": b"-3"}, {"top_k": "-3"}),
        ({"top_k": b"9" * 5000}, {"top_k": "9" * 5000}),
        ({"top_k": b"\xff"}, {"top_k": "\ufffd"}),
        ({"top_k": b""}, {"top_k": ""}),
    ],
)
def test_numbers_of_a_query_are_read_as_numbers(query, expected):
    assert query_parameters(query) == expected
