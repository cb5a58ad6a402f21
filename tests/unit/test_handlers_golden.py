import copy

import numpy as np
import pytest

from handlers.errors import GoldenError, SignatureError
from handlers.golden import GoldenSet

DOCUMENT = {
    "rtol": 0.01,
    "atol": 0.1,
    "samples": [
        {"file": "golden/0.png", "content_type": "image/png", "outputs": {"logits": [10.0, 0.0]}, "label": "a"},
        {"file": "golden/1.png", "content_type": "image/png", "outputs": {"logits": [0.0, 10.0]}, "label": "b"},
    ],
}
RIGHT = [[10.0, 0.0], [0.0, 10.0]]


def check(outputs, labels=("a", "b")):
    golden = GoldenSet.from_document(DOCUMENT, "logits")
    return golden.check([np.array(row, dtype=np.float32) for row in outputs], list(labels))


def test_round_trip():
    assert GoldenSet.from_document(DOCUMENT, "logits").to_document() == DOCUMENT


def test_the_right_answers_pass_with_no_difference():
    assert check(RIGHT) == 0.0


def test_the_tolerances_add_up_and_the_largest_difference_is_told():
    # 0.1 + 0.01 * 10 = 0.2 for the first logit, 0.1 for the second.
    assert check([[10.19, 0.09], [0.0, 10.0]]) == pytest.approx(0.19, abs=1e-6)


@pytest.mark.parametrize("row", [[10.21, 0.0], [9.79, 0.0], [10.0, 0.11], [10.0, -0.11]])
def test_a_larger_difference_either_way_is_refused(row):
    with pytest.raises(GoldenError, match=r"golden/0\.png: the output differs .* by up to"):
        check([row, RIGHT[1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(GoldenError):
        check([RIGHT[0], [bad, 10.0]])


def test_another_label_is_refused():
    with pytest.raises(GoldenError, match=r"golden/1\.png: the answer is 'a', the checkpoint's was 'b'"):
        check(RIGHT, "aa")


def test_another_shape_is_refused():
    with pytest.raises(GoldenError, match="shape"):
        check([[10.0, 0.0, 0.0], RIGHT[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(samples=[]), "samples is empty"),
        (lambda d: d.pop("rtol"), "rtol is missing"),
        (lambda d: d.update(extra=1), "extra is not a known field"),
        (lambda d: d["samples"][1]["outputs"].update(logits=[float("nan")]), "must be a finite number"),
        (lambda d: d["samples"][1].update(outputs={"other": [1]}), "logits is missing"),
        (lambda d: d["samples"][1].pop("label"), r"samples\[1\]\.label is missing"),
    ],
)
def test_a_broken_document_is_refused(change, message):
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(SignatureError, match=message):
        GoldenSet.from_document(document, "logits")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_file_that_cannot_be_read_is_a_load_error(tmp_path, content):
    (tmp_path / "golden").mkdir()
    if content is not None:
        (tmp_path / "golden/expected.json").write_bytes(content)
    with pytest.raises(GoldenError, match=r"golden/expected\.json cannot be read"):
        GoldenSet.load(tmp_path, "logits")
