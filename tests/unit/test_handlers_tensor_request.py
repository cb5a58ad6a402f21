import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.decoder import build_decoder
from handlers.errors import RequestError
from handlers.request import Part
from handlers.signature import TENSOR, Signature
from handlers.tensors import Axis, TensorSpec

IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), minimum=0, maximum=9, padding=0)
WEIGHTS = TensorSpec(name="weights", dtype="float32", shape=("batch", "length", 2), minimum=-1, maximum=1, padding=0)
OUTPUT = TensorSpec(name="y", dtype="float32", shape=("batch",))
AXES = {"length": Axis(minimum=2, maximum=4)}
PAIR = Signature(task=TENSOR, inputs=(IDS, WEIGHTS), outputs=(OUTPUT,), axes=AXES)
GOOD = {"ids": [1, 2, 3], "weights": [[0, 1], [0.5, -1], [1, 1]]}


def single(dtype="float32", shape=("batch", 2), **bounds):
    spec = TensorSpec(name="x", dtype=dtype, shape=shape, **bounds)
    return Signature(task=TENSOR, inputs=(spec,), outputs=(OUTPUT,), axes=AXES if "length" in shape else {})


def decode(document, signature=PAIR, max_samples=4):
    body = Part(value=json.dumps(document).encode(), content_type="application/json")
    return build_decoder(signature, max_samples=max_samples).decode([body])


def value(inputs, signature):
    """The one sample of a model with one input."""
    decoded = decode({"inputs": inputs}, signature)
    assert not decoded.many
    (sample,) = decoded.samples
    return sample["x"]


def refusal(document, signature=PAIR):
    with pytest.raises(RequestError) as caught:
        decode(document, signature)
    message = caught.value.message
    assert message.isprintable()
    assert message.endswith(".")
    return caught.value.status, caught.value.code, message


def code(inputs, signature):
    return refusal({"inputs": inputs}, signature)[:2]


class TestForms:
    def test_one_sample_of_two_inputs(self):
        decoded = decode({"inputs": GOOD})
        assert not decoded.many
        (sample,) = decoded.samples
        assert list(sample) == ["ids", "weights"]
        assert (sample["ids"].dtype, sample["ids"].tolist()) == (np.int64, [1, 2, 3])
        assert (sample["weights"].dtype, sample["weights"].shape) == (np.float32, (3, 2))

    @pytest.mark.parametrize("key", ["inputs", "instances"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_a_list_of_objects_is_several_samples(self, key, count):
        decoded = decode({key: [GOOD] * count})
        assert (decoded.many, len(decoded.samples)) == (True, count)

    def test_a_model_with_one_input_takes_its_lists_bare(self):
        assert value([1, 2], single()).tolist() == [1, 2]
        assert value({"x": [1, 2]}, single()).tolist() == [1, 2]
        assert value(3, single(shape=("batch",))).shape == ()

    @pytest.mark.parametrize("instances", [[[1, 2], [3, 4]], [{"x": [1, 2]}, [3, 4]]])
    def test_instances_of_one_input_may_be_bare(self, instances):
        decoded = decode({"instances": instances}, single())
        assert decoded.many
        assert [sample["x"].tolist() for sample in decoded.samples] == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        ("document", "status", "expected"),
        [
            ({"inputs": []}, 422, "no_samples"),
            ({"instances": []}, 422, "no_samples"),
            ({"inputs": [GOOD] * 5}, 413, "too_many_samples"),
            ({"inputs": 1}, 400, "wrong_body"),
            ({"inputs": "text"}, 400, "wrong_body"),
            ({"inputs": None}, 400, "wrong_body"),
            ({"inputs": [1]}, 400, "wrong_body"),
            ({"inputs": [GOOD, 1]}, 400, "wrong_body"),
            ({"inputs": {"ids": [1, 2]}}, 422, "wrong_inputs"),
            ({"inputs": {**GOOD, "more": 1}}, 422, "wrong_inputs"),
            ({"inputs": {}}, 422, "wrong_inputs"),
            ({"inputs": {**GOOD, "ids": [1, 2]}}, 422, "wrong_size"),
            ({"input": GOOD}, 400, "wrong_key"),
            ([GOOD], 400, "wrong_body"),
            ({"inputs": GOOD, "parameters": {"top_k": 1}}, 422, "unknown_parameter"),
            ({"inputs": GOOD, "parameters": 1}, 400, "wrong_parameters"),
        ],
    )
    def test_other_forms_are_refused(self, document, status, expected):
        assert refusal(document)[:2] == (status, expected)

    @pytest.mark.parametrize("parameters", [None, {}])
    def test_parameters_without_effect(self, parameters):
        assert len(decode({"instances": [GOOD, GOOD], "parameters": parameters}).samples) == 2

    def test_an_axis_has_one_size_in_all_inputs(self):
        _, _, message = refusal({"inputs": {**GOOD, "ids": [1, 2]}})
        assert message == "The axis length has the size 2 in 'ids' and 3 in 'weights'; it must be the same."

    def test_the_names_that_are_right_are_told(self):
        _, _, message = refusal({"inputs": {"idz": [1]}})
        assert message == "A sample must have exactly the keys ids, weights, not 'idz'."

    @pytest.mark.parametrize(
        ("content_type", "body"), [("text/plain", b"1 2"), ("image/png", b"\x89PNG"), ("", b"\x00\x01")]
    )
    def test_other_types_are_refused(self, content_type, body):
        with pytest.raises(RequestError, match="send application/json") as caught:
            build_decoder(PAIR, max_samples=4).decode([Part(value=body, content_type=content_type)])
        assert caught.value.status == 415

    def test_multipart_is_refused(self):
        with pytest.raises(RequestError, match="cannot be sent as multipart") as caught:
            build_decoder(PAIR, max_samples=4).decode([Part(value=b"{}", content_type="application/json")] * 2)
        assert caught.value.status == 415

    def test_undeclared_json_is_recognised(self):
        part = Part(value=json.dumps({"inputs": GOOD}).encode(), content_type="")
        assert len(build_decoder(PAIR, max_samples=4).decode([part]).samples) == 1


class TestShapes:
    @pytest.mark.parametrize("inputs", [[[1, 2], [3]], [1, [2]], [[1], 2]])
    def test_ragged_lists_are_malformed(self, inputs):
        assert code(inputs, single(shape=("batch", 2, 2))) == (400, "ragged_array")

    @pytest.mark.parametrize("inputs", [1, [1], [1, 2, 3], [[1, 2]], [], [[], []]])
    def test_another_shape_is_out_of_range(self, inputs):
        assert code(inputs, single()) == (422, "wrong_shape")

    @pytest.mark.parametrize(("size", "taken"), [(1, False), (2, True), (4, True), (5, False)])
    def test_a_dynamic_axis_has_bounds(self, size, taken):
        signature = single(shape=("batch", "length"))
        if taken:
            assert value([0] * size, signature).shape == (size,)
        else:
            assert code([0] * size, signature) == (422, "wrong_size")

    @pytest.mark.parametrize("depth", [33, 100, 500])
    def test_deep_nesting_is_refused(self, depth):
        inputs = 1
        for _ in range(depth):
            inputs = [inputs]
        assert code(inputs, single())[0] in (400, 422)

    def test_the_message_names_tensor_and_shape(self):
        _, _, message = refusal({"inputs": {**GOOD, "weights": [1]}})
        assert message == "The tensor 'weights' has the shape [1]; one sample must be [length, 2]."


INT = {"minimum": -5.0, "maximum": 5.0}
RAW = "application/octet-stream"


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=version, allow_pickle=False)
    return buffer.getvalue()


def decode_bytes(data, signature, content_type=RAW):
    return build_decoder(signature, max_samples=4).decode([Part(value=data, content_type=content_type)])


def raw_refusal(data, signature, content_type=RAW):
    with pytest.raises(RequestError) as caught:
        decode_bytes(data, signature, content_type)
    assert caught.value.message.isprintable()
    assert caught.value.message.endswith(".")
    return caught.value.status, caught.value.code


class TestRawBytes:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32"])
    def test_one_sample(self, dtype):
        signature = single(dtype, ("batch", 2, 2), **INT)
        decoded = decode_bytes(np.array([[1, 2], [3, 4]], np.dtype(dtype).newbyteorder("<")).tobytes(), signature)
        assert not decoded.many
        (sample,) = decoded.samples
        assert (sample["x"].dtype, sample["x"].tolist()) == (np.dtype(dtype), [[1, 2], [3, 4]])

    def test_several_samples(self):
        decoded = decode_bytes(np.arange(6, dtype="<f4").tobytes(), single())
        assert decoded.many
        assert [sample["x"].tolist() for sample in decoded.samples] == [[0, 1], [2, 3], [4, 5]]

    @pytest.mark.parametrize("length", [2, 3, 4])
    def test_a_dynamic_axis_takes_all_of_the_bytes(self, length):
        decoded = decode_bytes(np.ones((length, 2), "<f4").tobytes(), single(shape=("batch", "length", 2)))
        assert (decoded.many, decoded.samples[0]["x"].shape) == (False, (length, 2))

    def test_booleans_are_bytes_of_0_and_1(self):
        assert decode_bytes(b"\0\1", single("bool")).samples[0]["x"].tolist() == [False, True]
        assert raw_refusal(b"\0\2", single("bool")) == (400, "not_booleans")

    def test_numbers_that_begin_like_json_are_numbers(self):
        for first in (b"{", b"[", b" {"):
            data = np.frombuffer(first.ljust(16, b"\0"), "<i8").tobytes()
            highest = float(1 << 53)
            (sample,) = decode_bytes(data, single("int64", minimum=0.0, maximum=highest)).samples
            assert sample["x"].tolist() == [int.from_bytes(first, "little"), 0]

    def test_json_of_that_type_is_still_json(self):
        assert decode_bytes(b' {"inputs": [1, 2]}', single()).samples[0]["x"].tolist() == [1, 2]

    def test_bounds_are_those_of_the_dtype(self):
        signature = single(minimum=-0.1, maximum=0.1)
        assert len(decode_bytes(np.array([-0.1, 0.1], "<f4").tobytes(), signature).samples) == 1
        assert raw_refusal(np.array([0, 0.1001], "<f4").tobytes(), signature) == (422, "out_of_range")

    @pytest.mark.parametrize(
        ("data", "signature", "status", "code"),
        [
            (b"\0" * 7, single(), 422, "wrong_size"),
            (b"\0" * 12, single(), 422, "wrong_size"),
            (b"\0" * 40, single(), 413, "too_many_samples"),
            (b"\0" * 8, single(shape=("batch", "length", 2)), 422, "wrong_size"),
            (b"\0" * 40, single(shape=("batch", "length", 2)), 422, "wrong_size"),
            (b"\0" * 8, single(shape=("batch", "length", "length")), 422, "raw_shape_unknown"),
            (np.array([1, np.nan], "<f4").tobytes(), single(), 422, "not_finite"),
            (np.array([1, -np.inf], "<f4").tobytes(), single(), 422, "not_finite"),
            (np.array([1, 6], "<i8").tobytes(), single("int64", **INT), 422, "out_of_range"),
            (b"\0" * 32, PAIR, 415, "unsupported_type"),
            (b"", single(), 400, "empty_request"),
        ],
    )
    def test_what_is_refused(self, data, signature, status, code):
        assert raw_refusal(data, signature) == (status, code)

    @pytest.mark.parametrize("content_type", ["", "application/x-www-form-urlencoded", "image/png", "text/plain"])
    def test_only_of_the_type_that_means_bytes(self, content_type):
        assert raw_refusal(b"\0" * 8, single(), content_type) == (415, "unsupported_type")


class TestNpy:
    @pytest.mark.parametrize("content_type", ["", RAW, "application/x-npy"])
    @pytest.mark.parametrize(("value", "many"), [([1.0, 2.0], False), ([[1.0, 2.0]], True)])
    def test_one_sample_with_or_without_a_batch_axis(self, content_type, value, many):
        decoded = decode_bytes(npy(np.float32(value)), single(), content_type)
        assert (decoded.many, decoded.samples[0]["x"].tolist()) == (many, [1, 2])

    def test_several_samples(self):
        decoded = decode_bytes(npy(np.arange(6).reshape(3, 2)), single("int32", **INT))
        assert [sample["x"].tolist() for sample in decoded.samples] == [[0, 1], [2, 3], [4, 5]]
        assert decoded.samples[0]["x"].dtype == np.int32

    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("version", [(1, 0), (2, 0)])
    def test_byte_order_and_layout_do_not_matter(self, dtype, order, version):
        array = np.asarray(np.arange(12).reshape(2, 3, 2), dtype=dtype, order=order)
        decoded = decode_bytes(npy(array, version), single(shape=("batch", "length", 2)))
        assert [sample["x"].tolist() for sample in decoded.samples] == array.tolist()
        assert all(sample["x"].dtype == np.float32 for sample in decoded.samples)

    def test_integers_of_other_widths_fit_if_their_values_do(self):
        signature = single("int64", **INT)
        assert decode_bytes(npy(np.uint8([1, 2])), signature).samples[0]["x"].tolist() == [1, 2]
        assert raw_refusal(npy(np.uint64([1, 2**63])), signature) == (422, "out_of_range")

    @pytest.mark.parametrize(
        ("data", "status", "code"),
        [
            (npy(np.float32([1, 2, 3])), 422, "wrong_shape"),
            (npy(np.float32([[1, 2]] * 5)), 413, "too_many_samples"),
            (npy(np.zeros((0, 2), np.float32)), 422, "no_samples"),
            (npy(np.int64([1, 2])), 422, "wrong_datatype"),
            (npy(np.longdouble([1, 2])), 422, "wrong_datatype"),
            (npy(np.array(["a", "b"])), 422, "wrong_datatype"),
            (npy(np.zeros(2, [("a", "f4")])), 422, "wrong_datatype"),
            (npy(np.float32([1, 2]))[:-1], 400, "broken_npy"),
            (npy(np.float32([1, 2])) + b"\0", 400, "broken_npy"),
            (npy(np.float32([1, 2]))[:20], 400, "broken_npy"),
            (npy(np.float32([1, 2]))[:8], 400, "broken_npy"),
            (npy(np.float32([1, np.inf])), 422, "not_finite"),
            (npy(np.float64([1, 1e39])), 422, "out_of_range"),
            (b"\x93NUMPY\x03\x00" + npy(np.float32([1, 2]), (2, 0))[8:], 400, "broken_npy"),
            (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 100_000, 400, "broken_npy"),
            (b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095, 400, "broken_npy"),
        ],
    )
    def test_what_is_refused(self, data, status, code):
        assert raw_refusal(data, single()) == (status, code)

    def test_pickled_objects_are_refused_unread(self):
        buffer = io.BytesIO()
        np.save(buffer, np.array([{}, None], dtype=object), allow_pickle=True)
        assert raw_refusal(buffer.getvalue(), single()) == (422, "wrong_datatype")

    def test_a_declared_file_that_is_none_is_refused(self):
        assert raw_refusal(b"\0" * 8, single(), "application/x-npy") == (400, "broken_npy")

    @pytest.mark.parametrize("shape", [(1 << 40, 2), (3, 1 << 40), (-1, 2), (2, -2)])
    def test_a_shape_that_its_bytes_do_not_fill_takes_no_memory(self, shape):
        buffer = io.BytesIO()
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        tracemalloc.start()
        try:
            status, _ = raw_refusal(buffer.getvalue() + b"\0" * 64, single(shape=("batch", "length")))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert status in (400, 413, 422)
        assert peak < 1 << 20

    @given(st.binary(max_size=200))
    def test_any_file_is_decoded_or_refused(self, data):
        for content_type in (RAW, "application/x-npy"):
            status = 200
            try:
                decode_bytes(b"\x93NUMPY" + data, single(), content_type)
            except RequestError as error:
                status = error.status
            assert 200 <= status < 500


class TestValues:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_floats(self, dtype):
        array = value([0.1, 3], single(dtype))
        assert (array.dtype, array.tolist()) == (np.dtype(dtype), np.array([0.1, 3], dtype).tolist())

    @pytest.mark.parametrize("dtype", ["int64", "int32"])
    def test_integers_may_be_written_as_floats(self, dtype):
        array = value([1, 2.0], single(dtype, **INT))
        assert (array.dtype, array.tolist()) == (np.dtype(dtype), [1, 2])

    def test_large_integers_are_exact(self):
        large = (1 << 53) - 1
        assert value([large, -large], single("int64", minimum=-float(1 << 53), maximum=float(1 << 53))).tolist() == [
            large,
            -large,
        ]

    @pytest.mark.parametrize("number", [2**53, 2**60, 10**20, -(2**63)])
    def test_whole_numbers_that_floats_hold_are_taken(self, number):
        assert value([number, 0.5], single("float64")).tolist() == [float(number), 0.5]

    @pytest.mark.parametrize("text", [b"1e999", b"NaN", b"-Infinity"])
    def test_what_json_does_not_have_is_refused(self, text):
        part = Part(value=b'{"inputs": [1, ' + text + b"]}", content_type="application/json")
        with pytest.raises(RequestError, match="holds NaN or infinite values") as caught:
            build_decoder(single(), max_samples=4).decode([part])
        assert (caught.value.status, caught.value.code) == (422, "not_finite")

    def test_booleans(self):
        array = value([True, False], single("bool"))
        assert (array.dtype, array.tolist()) == (np.bool_, [True, False])

    @pytest.mark.parametrize(
        ("dtype", "inputs", "status", "expected"),
        [
            ("float32", [True, 1], 400, "not_numbers"),
            ("float32", ["1", 2], 400, "not_numbers"),
            ("float32", [None, 2], 400, "not_numbers"),
            ("float32", [2, {}], 400, "not_numbers"),
            ("float32", "text", 400, "not_numbers"),
            ("float32", [float("nan"), 1], 422, "not_finite"),
            ("float32", [1, float("-inf")], 422, "not_finite"),
            ("float32", [1e39, 1], 422, "out_of_range"),
            ("float64", [10**400, 1], 422, "out_of_range"),
            ("float32", [2**53 + 1, 1], 422, "not_exact"),
            ("float64", [-(2**63) - 1, 1], 422, "not_exact"),
            ("float32", [10**39, 1], 422, "out_of_range"),
            ("int64", ["1", 1], 400, "not_numbers"),
            ("int64", [None, 1], 400, "not_numbers"),
            ("int64", [10**400, 1], 422, "out_of_range"),
            ("int32", [2**31, 1], 422, "out_of_range"),
            ("bool", [0.0, True], 400, "not_booleans"),
            ("int64", [True, 1], 400, "not_numbers"),
            ("int64", [1.5, 1], 422, "not_integers"),
            ("int64", [float("nan"), 1], 422, "not_integers"),
            ("int64", [float("inf"), 1], 422, "not_integers"),
            ("int64", [2**63, 1], 422, "out_of_range"),
            ("int64", [1e300, 1], 422, "out_of_range"),
            ("int64", [6, 1], 422, "out_of_range"),
            ("int32", [-6, 1], 422, "out_of_range"),
            ("bool", [1, 0], 400, "not_booleans"),
            ("bool", ["true", True], 400, "not_booleans"),
        ],
    )
    def test_what_the_dtype_cannot_hold_is_refused(self, dtype, inputs, status, expected):
        bounds = INT if dtype.startswith("int") else {}
        assert code(inputs, single(dtype, **bounds)) == (status, expected)

    @pytest.mark.parametrize(("inputs", "taken"), [([-1, 0.1], True), ([-1.001, 0], False), ([0, 0.1001], False)])
    def test_bounds_are_included(self, inputs, taken):
        signature = single(minimum=-1.0, maximum=0.1)
        if taken:
            value(inputs, signature)
        else:
            assert code(inputs, signature) == (422, "out_of_range")

    def test_whole_numbers_beyond_what_floats_can_tell_apart_are_compared_exactly(self):
        signature = single("int64", minimum=0.0, maximum=float(1 << 53))
        value([1 << 53, 0], signature)
        assert code([(1 << 53) + 1, 0], signature) == (422, "out_of_range")

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ({"minimum": 0.0, "maximum": 1.0}, "Values of 'x' must lie between 0 and 1."),
            ({"minimum": 0.0}, "Values of 'x' must be at least 0 and fit float32."),
            ({"maximum": 1.0}, "Values of 'x' must be at most 1 and fit float32."),
            ({}, "Values of 'x' must fit float32."),
        ],
    )
    def test_the_message_names_the_bounds(self, bounds, message):
        assert refusal({"inputs": [-1e39, 1e39]}, single(**bounds))[2] == message

    def test_one_long_string_among_short_ones_takes_no_memory(self):
        # NumPy would give every string the room of the longest: here 40 TB.
        assert code(["x" * 10_000_000] + [""] * 1_000_000, single()) == (400, "not_numbers")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["ids", "weights", "x", "b"]), inner, max_size=3)
    ),
)
SIGNATURES = [
    PAIR,
    single(),
    single(shape=("batch",)),
    single("int64", ("batch", "length"), **INT),
    single("int32", **INT),
    single("bool", ("batch", 1)),
]


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: str(signature.inputs[-1].shape))
@given(given_value=json_values)
def test_any_json_is_decoded_or_refused(signature, given_value):
    decoder = build_decoder(signature, max_samples=4)
    for document in (given_value, {"inputs": given_value}, {"instances": given_value}):
        status = 200
        samples = []
        try:
            samples = decoder.decode([Part(value=document, content_type="application/json")]).samples
        except RequestError as error:
            status = error.status
        assert 200 <= status < 500
        assert all(sample[spec.name].dtype == spec.numpy_dtype for sample in samples for spec in signature.inputs)
