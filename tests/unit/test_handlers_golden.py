import copy
import json

import numpy as np
import pytest

from handlers.errors import GoldenError, SignatureError
from handlers.golden import GoldenSet

DOCUMENT = {
    "rtol": 0.01,
    "atol": {"logits": 0.1},
    "samples": [
        {
            "file": "golden/0.png",
            "content_type": "image/png",
            "outputs": {"logits": "golden/0.logits.npy"},
            "label": "a",
        },
        {
            "file": "golden/1.png",
            "content_type": "image/png",
            "outputs": {"logits": "golden/1.logits.npy"},
            "label": "b",
        },
    ],
}
RIGHT = [[10.0, 0.0], [0.0, 10.0]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "golden").mkdir()
    for i, row in enumerate(RIGHT):
        np.save(tmp_path / f"golden/{i}.logits.npy", np.float32(row))
    return tmp_path


def check(folder, outputs, labels=("a", "b")):
    golden = GoldenSet.from_document(DOCUMENT)
    return golden.check(folder, [{"logits": np.array(row, dtype=np.float32)} for row in outputs], list(labels))


def test_round_trip():
    assert GoldenSet.from_document(DOCUMENT).to_document() == DOCUMENT


def test_the_right_answers_pass_with_no_difference(folder):
    assert check(folder, RIGHT) == 0.0


def test_the_tolerances_add_up_and_the_largest_difference_is_told(folder):
    # 0.1 + 0.01 * 10 = 0.2 for the first logit, 0.1 for the second.
    assert check(folder, [[10.19, 0.09], [0.0, 10.0]]) == pytest.approx(0.19, abs=1e-6)


@pytest.mark.parametrize("row", [[10.21, 0.0], [9.79, 0.0], [10.0, 0.11], [10.0, -0.11]])
def test_a_larger_difference_either_way_is_refused(folder, row):
    with pytest.raises(GoldenError, match=r"golden/0\.png: logits differs .* by up to"):
        check(folder, [row, RIGHT[1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(folder, bad):
    with pytest.raises(GoldenError):
        check(folder, [RIGHT[0], [bad, 10.0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_even_if_it_was_recorded(folder, bad):
    np.save(folder / "golden/0.logits.npy", np.float32([bad, 0]))
    with pytest.raises(GoldenError, match=r"golden/0\.png: the expected logits holds infinity or NaN"):
        check(folder, [[bad, 0.0], RIGHT[1]])


def test_another_label_is_refused(folder):
    with pytest.raises(GoldenError, match=r"golden/1\.png: the answer is 'a', the checkpoint's was 'b'"):
        check(folder, RIGHT, "aa")


def test_another_shape_is_refused(folder):
    with pytest.raises(GoldenError, match="shape"):
        check(folder, [[10.0, 0.0, 0.0], RIGHT[1]])


def test_other_outputs_are_refused(folder):
    golden = GoldenSet.from_document(DOCUMENT)
    outputs = [{"logits": np.float32(row), "more": np.float32(0)} for row in RIGHT]
    with pytest.raises(GoldenError, match="the outputs are logits, more, expected logits"):
        golden.check(folder, outputs, ["a", "b"])


SEVERAL = {
    "rtol": 0.01,
    "atol": {"boxes": 0.5, "count": 0.0, "any": 0.0},
    "samples": [
        {
            "file": "golden/0.json",
            "content_type": "application/json",
            "outputs": {"boxes": "golden/0.boxes.npy", "count": "golden/0.count.npy", "any": "golden/0.any.npy"},
            "label": None,
        }
    ],
}
SEVERAL_RIGHT = {"boxes": np.float32([[1.0, 2.0]]), "count": np.int64(3), "any": np.array([True, False])}


class TestSeveralOutputs:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "golden").mkdir()
        for name, value in SEVERAL_RIGHT.items():
            np.save(tmp_path / f"golden/0.{name}.npy", value)
        return tmp_path

    def check(self, folder, **outputs):
        return GoldenSet.from_document(SEVERAL).check(folder, [{**SEVERAL_RIGHT, **outputs}], [None])

    def test_round_trip(self):
        assert GoldenSet.from_document(SEVERAL).to_document() == SEVERAL

    def test_floats_have_tolerances(self, folder):
        assert self.check(folder, boxes=np.float32([[1.25, 2.0]])) == 0.25

    @pytest.mark.parametrize("change", [{"count": np.int64(4)}, {"any": np.array([True, True])}])
    def test_what_is_counted_must_be_the_same(self, folder, change):
        with pytest.raises(GoldenError, match="by up to 1, more than 0 allow"):
            self.check(folder, **change)

    def test_another_kind_of_number_is_refused(self, folder):
        with pytest.raises(GoldenError, match="count is float32, expected int64"):
            self.check(folder, count=np.float32(3))

    def test_without_a_recorded_label_any_is_right(self, folder):
        assert GoldenSet.from_document(SEVERAL).check(folder, [SEVERAL_RIGHT], ["a"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(samples=[]), "samples is empty"),
        (lambda d: d.pop("rtol"), "rtol is missing"),
        (lambda d: d.update(atol=0.1), r"golden\.atol must be"),
        (lambda d: d.update(atol={"other": 0.1}), "atol has no tolerance for the output 'logits'"),
        (lambda d: d.update(extra=1), "extra is not a known field"),
        (lambda d: d["samples"][1].update(extra=1), "extra is not a known field"),
        (lambda d: d["samples"][1].update(outputs={"logits": [1.0]}), "must be a non-empty string"),
        (lambda d: d["samples"][1].update(outputs={}), r"golden/1\.png has no outputs"),
        (lambda d: d["samples"][1].update(outputs={"logits": "../x.npy"}), "leads out of the archive"),
        (lambda d: d["samples"][1].update(file="/etc/passwd"), "leads out of the archive"),
        (lambda d: d["samples"][1].update(label=1), r"samples\[1\]\.label must be a non-empty string"),
    ],
)
def test_a_broken_document_is_refused(change, message):
    document = copy.deepcopy(DOCUMENT)
    change(document)
    with pytest.raises(SignatureError, match=message):
        GoldenSet.from_document(document)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_a_file_that_cannot_be_read_is_a_load_error(tmp_path, content):
    (tmp_path / "golden").mkdir()
    if content is not None:
        (tmp_path / "golden/expected.json").write_bytes(content)
    with pytest.raises(GoldenError, match=r"golden/expected\.json cannot be read"):
        GoldenSet.load(tmp_path)


def test_a_set_is_loaded_from_its_folder(folder):
    (folder / "golden/expected.json").write_text(json.dumps(DOCUMENT))
    assert GoldenSet.load(folder) == GoldenSet.from_document(DOCUMENT)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_an_output_that_cannot_be_read_is_a_golden_error(folder, content):
    path = folder / "golden/1.logits.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GoldenError, match=r"golden/1\.logits\.npy cannot be read"):
        check(folder, RIGHT)


def test_a_pickle_is_never_loaded(folder):
    np.save(folder / "golden/1.logits.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(GoldenError, match="cannot be read"):
        check(folder, RIGHT)


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([1j])])
def test_what_is_no_number_is_refused(folder, value):
    np.save(folder / "golden/1.logits.npy", value)
    with pytest.raises(GoldenError):
        check(folder, [RIGHT[0], [1.0]])


def test_several_arrays_in_one_file_are_refused(folder):
    with (folder / "golden/1.logits.npy").open("wb") as file:
        np.savez(file, a=np.float32(1), b=np.float32(2))
    with pytest.raises(GoldenError, match="holds several arrays"):
        check(folder, RIGHT)
