import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.errors import SignatureError
from handlers.signature import Artifact, Signature

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)

GOOD = {
    "format_version": 1,
    "task": "image-classification",
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 4, 5]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
    "labels": ["cat", "dog"],
    "preprocessing": {
        "image": {
            "mode": "RGB",
            "height": 4,
            "width": 5,
            "mean": [0.4, 0.5, 0.6],
            "std": [0.1, 0.2, 0.3],
            "max_pixels": 1000,
        }
    },
    "artifact": {"format": "onnx", "precision": "fp32", "file": "model.onnx"},
}


def paths(value, prefix=()):
    """Every place in a document, the root excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


PATHS = sorted(paths(GOOD), key=repr)


def changed(path, value):
    document = copy.deepcopy(GOOD)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def without(path):
    document = copy.deepcopy(GOOD)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return document


def accepts(document):
    """Whether a document is a signature; anything but a SignatureError goes through."""
    try:
        signature = Signature.from_document(document)
    except SignatureError:
        return False
    assert Signature.from_document(json.loads(json.dumps(signature.to_document()))) == signature
    return True


def test_round_trip():
    signature = Signature.from_document(GOOD)
    assert signature.to_document() == GOOD
    assert Signature.from_document(signature.to_document()) == signature


def test_what_is_read():
    signature = Signature.from_document(GOOD)
    assert signature.inputs[0].shape == ("batch", 3, 4, 5)
    assert signature.labels == ("cat", "dog")
    assert (signature.image.mode, signature.image.channels, signature.image.max_pixels) == ("RGB", 3, 1000)
    assert signature.artifact == Artifact(format="onnx", precision="fp32", file="model.onnx")


def test_a_signature_before_its_export_has_no_artifact():
    signature = Signature.from_document(without(("artifact",)))
    assert signature.artifact is None
    assert "artifact" not in signature.to_document()


def test_an_artifact_completes_it():
    artifact = Artifact(format="torchscript", precision="fp32", file="model.pt")
    assert Signature.from_document(without(("artifact",))).with_artifact(artifact).artifact == artifact


OPTIONAL = {("artifact",), ("preprocessing", "image", "max_pixels")}


@pytest.mark.parametrize("path", [p for p in PATHS if isinstance(p[-1], str) and p not in OPTIONAL], ids=str)
def test_a_missing_field_is_refused_by_name(path):
    with pytest.raises(SignatureError, match=f"{path[-1]}.* is missing"):
        Signature.from_document(without(path))


PLACES = sorted({p[:-1] for p in PATHS if isinstance(p[-1], str)}, key=repr)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_unknown_field_is_refused_everywhere(place):
    with pytest.raises(SignatureError, match="extra is not a known field"):
        Signature.from_document(changed((*place, "extra"), 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "format_version must be a whole number from 1 to 1, not 2"),
        (("task",), "detection", "task is 'detection'; choose one of: image-classification"),
        (("inputs", 0, "dtype"), "int8", r"inputs\[0\].dtype is 'int8'; choose one of: float32"),
        (("inputs", 0, "shape"), [1, 3, 4, 5], "must begin with the axis 'batch'"),
        (("inputs", 0, "shape"), [], "must begin with the axis 'batch'"),
        (("inputs", 0, "shape"), ["batch", 0, 4, 5], "has the axis 0; give a size of at least 1"),
        (("inputs", 0, "shape"), ["batch", True, 4, 5], "has the axis True"),
        (("inputs", 0, "shape"), ["batch", "a b", 4, 5], "has the axis 'a b'"),
        (("inputs", 0, "shape"), ["batch", [1] * 1000, 4, 5], "has the axis"),
        (("inputs", 0, "shape"), ["batch", 3, 5, 4], r"preprocessing.image makes \['batch', 3, 4, 5\]|makes \("),
        (("inputs",), [], "exactly one input and gives one output, not 0 and 1"),
        (("outputs",), GOOD["outputs"] * 2, "exactly one input and gives one output, not 1 and 2"),
        (("labels",), ["cat"], "there are 1 labels"),
        (("labels",), ["cat", "cat"], "lists 'cat' twice"),
        (("preprocessing", "image", "mode"), "CMYK", "mode is 'CMYK'; choose one of: L, RGB"),
        (("preprocessing", "image", "mode"), "L", "must have 1 items, not 3"),
        (("preprocessing", "image", "std"), [0.1, 0, 0.3], r"std\[1\] must lie from 1e-06 to 1e\+06, not 0"),
        (("preprocessing", "image", "std"), [0.1, 1e-50, 0.3], r"std\[1\] must lie from"),
        (("preprocessing", "image", "std"), [0.1, -1, 0.3], r"std\[1\] must lie from"),
        (("preprocessing", "image", "mean"), [0.1, 1e300, 0.3], r"mean\[1\] must lie from"),
        (("preprocessing", "image", "height"), 0, "height must be a whole number"),
        (("preprocessing", "image", "max_pixels"), 1 << 30, "max_pixels must be a whole number from 1 to 89478485"),
        (("artifact", "format"), "pt2", "format is 'pt2'; choose one of: torchscript, onnx"),
        (("artifact", "precision"), "int4", "precision is 'int4'"),
        (("artifact", "file"), "../model.pt", "must be a plain file name"),
        (("artifact", "file"), "a\\b", "must be a plain file name"),
        (("artifact", "file"), ".hidden", "must be a plain file name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path, value, message):
    with pytest.raises(SignatureError, match=message):
        Signature.from_document(changed(path, value))


@given(json_values)
def test_any_document_is_refused_with_a_signature_error_only(document):
    assert not accepts(document)


@settings(max_examples=300)
@given(st.sampled_from(PATHS), json_values)
def test_any_mutation_is_accepted_or_refused_with_a_signature_error_only(path, value):
    accepts(changed(path, value))


@given(st.sampled_from(PATHS))
def test_any_deletion_is_accepted_or_refused_with_a_signature_error_only(path):
    accepts(without(path))
