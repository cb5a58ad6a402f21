import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.artifact import Artifact, ModuleSource
from handlers.errors import SignatureError
from handlers.signature import Signature
from handlers.tensors import Axis

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
    "artifact": {"format": "onnx", "precision": "fp32", "file": "model.onnx", "device": "cpu"},
}
TEXT = {
    "format_version": 1,
    "task": "text-classification",
    "inputs": [
        {
            "name": "input_ids",
            "dtype": "int64",
            "shape": ["batch", "length"],
            "minimum": 0,
            "maximum": 99,
            "padding": 0,
        },
        {
            "name": "attention_mask",
            "dtype": "int64",
            "shape": ["batch", "length"],
            "minimum": 1,
            "maximum": 1,
            "padding": 0,
        },
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
    "labels": ["good", "bad"],
    "axes": {"length": {"minimum": 1, "maximum": 16}},
    "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 16, "pad_id": 0}},
    "artifact": {
        "format": "eager",
        "precision": "bf16",
        "file": "model.pt",
        "device": "cpu",
        "requires": {"torch": "2.13.0"},
        "module": {"factory": "package.module:build", "config": {"widths": [4]}},
    },
}
TENSORS = {
    "format_version": 1,
    "task": "tensor",
    "inputs": [
        {"name": "features", "dtype": "float32", "shape": ["batch", "frames", 4], "padding": 0},
        {"name": "speaker", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9},
        {"name": "flags", "dtype": "bool", "shape": ["batch", "frames"], "padding": 0},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "shape": ["batch", "frames", 8]},
        {"name": "pitch", "dtype": "float64", "shape": ["batch", 1]},
    ],
    "axes": {"frames": {"minimum": 2, "maximum": 100}},
    "artifact": {
        "format": "pt2",
        "precision": "int8",
        "file": "model.pt2",
        "device": "cuda",
        "requires": {"torch": "2.13.0"},
    },
}
DOCUMENTS = {"image": GOOD, "text": TEXT, "tensors": TENSORS}


def paths(value, prefix=()):
    """Every place in a document, the root excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


PATHS = [(kind, path) for kind, document in DOCUMENTS.items() for path in sorted(paths(document), key=repr)]


def changed(path, value, document=GOOD):
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def without(path, document=GOOD):
    document = copy.deepcopy(document)
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


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_round_trip(document):
    signature = Signature.from_document(document)
    assert signature.to_document() == document
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


def test_texts_are_completed():
    document = copy.deepcopy(TEXT)
    del document["axes"]
    for spec in document["inputs"]:
        for key in ("minimum", "padding"):
            del spec[key]
    del document["inputs"][1]["maximum"]
    assert Signature.from_document(document) == Signature.from_document(TEXT)


def test_what_is_read_of_texts_and_tensors():
    text, tensors = Signature.from_document(TEXT), Signature.from_document(TENSORS)
    assert (text.text.tokenizer, text.text.max_length, text.image) == ("tokenizer.json", 16, None)
    assert text.artifact.module == ModuleSource(factory="package.module:build", config={"widths": [4]})
    assert tensors.labels == ()
    assert tensors.axes == {"frames": Axis(minimum=2, maximum=100)}
    assert tensors.input("features").dynamic_axes == {1: "frames"}
    assert (tensors.artifact.device, tensors.artifact.requires) == ("cuda", {"torch": "2.13.0"})


def test_longer_texts_are_cut_off_unless_the_signature_refuses_them():
    assert Signature.from_document(TEXT).text.too_long == "truncate"
    document = changed(("preprocessing", "text", "too_long"), "refuse", TEXT)
    signature = Signature.from_document(document)
    assert signature.text.too_long == "refuse"
    assert signature.to_document() == document


OPTIONAL = ("artifact", "max_pixels", "minimum", "maximum", "padding", "device", "requires", "axes")
MAPPINGS_OF_NAMES = ("requires", "axes", "config")


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (kind, p)
        for kind, p in PATHS
        if isinstance(p[-1], str) and p[-1] not in OPTIONAL and p[-2:-1] not in [(name,) for name in MAPPINGS_OF_NAMES]
    ],
    ids=str,
)
def test_a_missing_field_is_refused_by_name(kind, path):
    message = "must have it" if path[-1] == "module" else f"{path[-1]}.* is missing"
    with pytest.raises(SignatureError, match=message):
        Signature.from_document(without(path, DOCUMENTS[kind]))


PLACES = sorted({(kind, p[:-1]) for kind, p in PATHS if isinstance(p[-1], str)}, key=repr)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind, place in PLACES if place[-1:] not in [(name,) for name in MAPPINGS_OF_NAMES]],
    ids=str,
)
def test_an_unknown_field_is_refused_everywhere(kind, place):
    with pytest.raises(SignatureError, match="extra is not a known field"):
        Signature.from_document(changed((*place, "extra"), 1, DOCUMENTS[kind]))


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
        (("inputs",), [], "signature.inputs is empty; list at least one tensor"),
        (("outputs",), GOOD["outputs"] * 2, "signature.outputs lists 'logits' twice"),
        (("outputs", 1), {**GOOD["outputs"][0], "name": "b"}, "gives exactly one output, not 2"),
        (("inputs", 1), {**GOOD["inputs"][0], "name": "b"}, "takes exactly one input, not 2"),
        (("inputs", 0, "name"), "a b", "must be a word of at most 80 letters, digits and underscores"),
        (("inputs", 0, "dtype"), "float64", "normalised pixels are float32"),
        (("outputs", 0, "dtype"), "int64", "the logits of classes are float32"),
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
        (("artifact", "format"), "pickle", "format is 'pickle'; choose one of: torchscript, onnx, pt2, eager"),
        (("artifact", "format"), "eager", "an eager artifact must have it"),
        (("artifact", "device"), "tpu", "device is 'tpu'; choose one of: cpu, cuda"),
        (("artifact", "precision"), "int4", "precision is 'int4'"),
        (("artifact", "file"), "../model.pt", "must be a plain file name"),
        (("artifact", "file"), "a\\b", "must be a plain file name"),
        (("artifact", "file"), ".hidden", "must be a plain file name"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path, value, message):
    with pytest.raises(SignatureError, match=message):
        Signature.from_document(_set(path, value, GOOD))


def _set(path, value, document):
    """A change, or an item more where the path names the place after the last."""
    if isinstance(path[-1], int):
        document = copy.deepcopy(document)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1] :] = [value]
        return document
    return changed(path, value, document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("axes", "length", "maximum"), 17, "axes.length runs from 1 to 17, and texts have 1 to 16 tokens"),
        (("inputs", 0, "name"), "ids", "takes input_ids and, if it has one, attention_mask, not ids, attention_mask"),
        (("inputs", 0, "dtype"), "float32", "'input_ids' is float32; token ids and masks are int64 or int32"),
        (("inputs", 1, "shape"), ["batch", 16], r"has the shape \['batch', 16\]"),
        (("inputs", 0, "padding"), 3, "is padded with 3 and preprocessing.text.pad_id is 0"),
        (("preprocessing", "text", "tokenizer"), "../t.json", "must be a plain file name"),
        (("preprocessing", "text", "pad_id"), -1, "pad_id must be a whole number"),
        (("preprocessing", "text", "too_long"), "cut", "too_long is 'cut'; choose one of: truncate, refuse"),
        (("artifact", "format"), "onnx", "no other may"),
        (("artifact", "module", "factory"), "os.system", "write package.module:function"),
        (("artifact", "module", "config"), {"a": float("nan")}, "plain JSON values only"),
        (("artifact", "requires", "torch"), 2, "torch must be a non-empty string"),
    ],
)
def test_a_wrong_value_of_a_text_signature_is_refused(path, value, message):
    with pytest.raises(SignatureError, match=message):
        Signature.from_document(changed(path, value, TEXT))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("axes",), {}, "the axis 'frames' has no bounds"),
        (("axes", "tokens"), {"maximum": 3}, "axes.tokens is the axis of no input"),
        (("axes", "frames", "minimum"), 101, "its minimum must not exceed its maximum"),
        (("axes", "frames", "minimum"), 0, "minimum must be a whole number from 1"),
        (("inputs", 1, "maximum"), None, "give their minimum and maximum"),
        (("inputs", 1, "maximum"), 1.5, "the maximum of 'speaker' is 1.5, which int64 cannot hold"),
        (("inputs", 1, "minimum"), 10, "'speaker' runs from 10 to 9|speaker runs from 10 to 9"),
        (("inputs", 0, "padding"), 1e39, "which float32 cannot hold"),
        (("inputs", 2, "padding"), 2, "which bool cannot hold"),
        (("inputs", 2, "padding"), -1, "which bool cannot hold"),
        (("inputs", 0, "shape"), ["batch", "frames", "batch"], "the axis 'batch' twice"),
    ],
)
def test_a_wrong_value_of_a_tensor_signature_is_refused(path, value, message):
    with pytest.raises(SignatureError, match=message):
        Signature.from_document(changed(path, value, TENSORS))


@given(json_values)
def test_any_document_is_refused_with_a_signature_error_only(document):
    assert not accepts(document)


@settings(max_examples=300)
@given(st.sampled_from(PATHS), json_values)
def test_any_mutation_is_accepted_or_refused_with_a_signature_error_only(place, value):
    kind, path = place
    accepts(changed(path, value, DOCUMENTS[kind]))


@given(st.sampled_from(PATHS))
def test_any_deletion_is_accepted_or_refused_with_a_signature_error_only(place):
    kind, path = place
    accepts(without(path, DOCUMENTS[kind]))
