import pytest

from handlers.document import Section, shown
from handlers.errors import SignatureError


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [None, 1, "text", [], [1], {1: 2}, True])
def test_a_section_is_a_mapping_with_string_keys(value):
    with pytest.raises(SignatureError, match="signature must be a mapping"):
        Section(value, "signature")


def test_a_missing_field_is_named_with_its_path():
    with pytest.raises(SignatureError, match=r"^signature\.inner\.name is missing$"):
        Section({"inner": {}}, "signature").section("inner").string("name")


@pytest.mark.parametrize("value", ["", 1, None, ["a"], True])
def test_a_string_is_text_and_not_empty(value):
    with pytest.raises(SignatureError, match=r"s\.name must be a non-empty string"):
        Section({"name": value}, "s").string("name")


def test_a_choice_lists_what_is_known():
    with pytest.raises(SignatureError, match=r"s\.task is 'x'; choose one of: a, b"):
        Section({"task": "x"}, "s").string("task", choices=("a", "b"))


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "1", None, 10**400])
def test_an_integer_keeps_its_bounds(value):
    with pytest.raises(SignatureError, match=r"s\.n must be a whole number from 1 to 10"):
        Section({"n": value}, "s").integer("n", minimum=1, maximum=10)


@pytest.mark.parametrize("value", [1, 10])
def test_the_bounds_of_an_integer_are_included(value):
    assert Section({"n": value}, "s").integer("n", minimum=1, maximum=10) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1", None, 10**400])
def test_a_number_is_finite(value):
    with pytest.raises(SignatureError, match=r"s\.x must be a finite number"):
        Section({"x": value}, "s").number("x")


def test_an_item_of_a_list_is_named_with_its_index():
    with pytest.raises(SignatureError, match=r"s\.x\[1\] must be a finite number"):
        Section({"x": [1, "2"]}, "s").numbers("x")


def test_numbers_keep_their_length_and_bounds():
    section = Section({"x": [0.5, 2.0]}, "s")
    assert section.numbers("x", length=2, minimum=0.5, maximum=2.0) == (0.5, 2.0)
    with pytest.raises(SignatureError, match="must have 3 items, not 2"):
        section.numbers("x", length=3)
    with pytest.raises(SignatureError, match=r"s\.x\[1\] must lie from 0 to 1, not 2"):
        section.numbers("x", minimum=0, maximum=1)


@pytest.mark.parametrize(("value", "message"), [(["a", "a"], "lists 'a' twice"), (["a", 1], r"x\[1\] must be")])
def test_strings_are_distinct_texts(value, message):
    with pytest.raises(SignatureError, match=message):
        Section({"x": value}, "s").strings("x")


def test_an_unknown_field_is_refused_with_the_nearest_known_one():
    section = Section({"lable": 1}, "s")
    assert not section.has("label")
    with pytest.raises(SignatureError, match=r"s\.lable is not a known field; did you mean 'label'\?"):
        section.finish()


def test_an_unknown_field_that_resembles_none_gets_the_list():
    section = Section({"a": "1", "qqq": 1}, "s")
    section.string("a")
    with pytest.raises(SignatureError, match=r"s\.qqq is not a known field; the fields here are: a"):
        section.finish()


def test_null_counts_as_absent():
    assert not Section({"a": None}, "s").has("a")


@pytest.mark.parametrize(
    "value", ["x" * 1000, 1 << 100_000, deep_list(100_000), ["\n" * 100]], ids=["text", "number", "list", "lines"]
)
def test_what_is_shown_is_short_and_on_one_line(value):
    assert len(shown(value)) <= 60
    assert "\n" not in shown(value)


def test_a_hostile_key_does_not_break_the_message():
    section = Section({"a\n\ud800" + "b" * 1000: 1}, "s")
    with pytest.raises(SignatureError) as caught:
        section.finish()
    message = str(caught.value)
    assert len(message) < 200
    assert "\n" not in message
    message.encode()
