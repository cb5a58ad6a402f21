import dataclasses
import io
import struct
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from handlers.errors import RequestError
from handlers.image import EncodedImage, ImageDecoder, PixelArray
from handlers.preprocessing import ImagePreprocessing

GREY = ImagePreprocessing(mode="L", height=2, width=3, mean=(0.5,), std=(0.25,), max_pixels=100)
COLOUR = ImagePreprocessing(mode="RGB", height=2, width=3, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), max_pixels=100)
UNIT = ImagePreprocessing(mode="RGB", height=2, width=3, mean=(0, 0, 0), std=(1, 1, 1), max_pixels=100)
GREY_PIXELS = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def decode_file(data, spec=GREY):
    samples, many = ImageDecoder(spec, max_samples=4).decode(EncodedImage(data=data))
    assert not many
    assert samples.dtype == np.float32
    assert samples.shape == (1, spec.channels, spec.height, spec.width)
    return samples[0]


def decode_array(value, spec=GREY, batched=True):
    return ImageDecoder(spec, max_samples=4).decode(PixelArray(value=value, batched=batched))


def refusal(decode, *arguments, **options):
    with pytest.raises(RequestError) as caught:
        decode(*arguments, **options)
    return caught.value.status, caught.value.code


def normalised(pixels, spec):
    """The definition, in float64: (pixel / 255 - mean) / std."""
    return (pixels / 255 - np.array(spec.mean)) / np.array(spec.std)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(*chunks, width=3, height=2, pixels=None):
    """A grey PNG with further chunks before its pixels; black, or with almost none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\0" * (width + 1) * height if pixels is None else pixels
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width, height):
    """A PNG that says its size and holds almost no pixels."""
    return png_with(width=width, height=height, pixels=b"\0\0")


def exif(tags, size, orientation=1):
    """EXIF data of many tags, each of which claims the same many bytes."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += b"".join(struct.pack("<HHII", 0x0200 + i, 1, size, 8) for i in range(tags))
    return b"II*\0" + struct.pack("<IH", 8, tags + 1) + entries + bytes(4) + bytes(size)


def jpeg_with_exif(data, content):
    """A JPEG with EXIF data in as many segments as they need."""
    pieces = [content[i : i + 65_000] for i in range(0, len(content), 65_000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in pieces]
    return data[:2] + b"".join(segments) + data[2:]


def attempt(data):
    """The status; anything but a RequestError goes through."""
    try:
        decode_file(data)
    except RequestError as error:
        return error.status
    return 200


class TestFiles:
    def test_grey_pixels_are_normalised_exactly(self, encode):
        np.testing.assert_allclose(
            decode_file(encode(GREY_PIXELS)), [normalised(GREY_PIXELS, GREY)], rtol=1e-6, atol=1e-6
        )

    def test_colours_are_normalised_each_by_its_own_numbers_channels_first(self, encode):
        pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
        expected = normalised(pixels, COLOUR).transpose(2, 0, 1)
        np.testing.assert_allclose(decode_file(encode(pixels), COLOUR), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "spec", [GREY, COLOUR, dataclasses.replace(COLOUR, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]
    )
    def test_every_level_is_normalised_as_pixels_in_json_are_to_the_last_bit(self, encode, spec):
        spec = dataclasses.replace(spec, height=16, width=16, max_pixels=256)
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        if spec.channels == 3:
            pixels = np.stack([pixels, pixels.T, pixels[::-1]], axis=-1)
        in_json, _ = decode_array(pixels.tolist(), spec)
        np.testing.assert_array_equal(decode_file(encode(pixels), spec), in_json[0])

    def test_jpeg_is_read(self, encode):
        samples = decode_file(encode(np.full((2, 3), 128, np.uint8), "JPEG"))
        np.testing.assert_allclose(samples, normalised(128, GREY)[0], atol=0.02)

    def test_another_size_is_resized(self, encode):
        samples = decode_file(encode(np.full((5, 7), 200, np.uint8)))
        np.testing.assert_allclose(samples, normalised(200, GREY)[0], rtol=1e-6, atol=1e-6)

    def test_resizing_keeps_left_and_right_apart(self, encode):
        samples = decode_file(encode(np.repeat(np.uint8([[0, 0, 255, 255]]), 4, axis=0)))
        assert samples[0, 0, 0] < samples[0, 0, 1] < samples[0, 0, 2]

    def test_the_camera_orientation_is_applied(self, encode):
        image = Image.fromarray(GREY_PIXELS)
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        data = encode(image.rotate(180), "PNG", exif=exif)
        np.testing.assert_allclose(decode_file(data), [normalised(GREY_PIXELS, GREY)], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_every_orientation_is_turned_as_pillow_does(self, encode, format, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8), format, exif=exif)
        spec = dataclasses.replace(GREY, height=7, width=5) if orientation in (5, 6, 7, 8) else GREY
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).resize((spec.width, spec.height), Image.Resampling.BILINEAR)
        expected = normalised(np.asarray(upright), spec)
        np.testing.assert_allclose(decode_file(data, spec), [expected], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("tags", [510, 511, 512])
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_more_exif_tags_than_any_camera_writes_are_refused(self, encode, kind, tags):
        content = exif(tags, 4, 1)
        if kind == "PNG":
            data = png_with(chunk(b"eXIf", content))
        else:
            data = jpeg_with_exif(encode(GREY_PIXELS, "JPEG"), content)
        assert attempt(data) == (200 if tags < 512 else 400)

    @pytest.mark.parametrize(
        "before", [b"", b"junk", b"\xff\xc8", b"\xff\xff\xff", b"\xff\xf0\xff\x00", b"\xff\xe1\0\x08Exif\0\0"]
    )
    def test_nothing_that_pillow_skips_hides_the_tags_of_a_jpeg(self, encode, before):
        data = jpeg_with_exif(encode(GREY_PIXELS, "JPEG"), exif(600, 4, 1))
        with pytest.raises(RequestError, match="has 601 EXIF tags; the limit is 512"):
            decode_file(data[:2] + before + data[2:])

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
    def test_every_8_bit_mode_is_converted(self, encode, mode):
        data = encode(Image.new("RGB", (3, 2), "white").convert(mode))
        np.testing.assert_array_equal(decode_file(data, UNIT), 1.0)
        np.testing.assert_array_equal(decode_file(data, GREY), 2.0)

    def test_cmyk_jpeg_is_converted(self, encode):
        data = encode(Image.new("RGB", (3, 2), "white").convert("CMYK"), "JPEG")
        np.testing.assert_allclose(decode_file(data, UNIT), 1.0, atol=0.02)

    @pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
    def test_a_palette_with_transparency_keeps_its_colours(self, encode, transparency):
        image = Image.new("P", (3, 2), 2)
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        samples = decode_file(encode(image, transparency=transparency), UNIT)
        np.testing.assert_array_equal(samples[:, 0, 0], [0, 0, 1])

    def test_16_bits_are_refused(self, encode):
        data = encode(Image.fromarray(np.full((2, 3), 40_000, np.uint16)))
        assert refusal(decode_file, data) == (422, "unsupported_image_mode")

    @pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "WEBP"])
    def test_other_formats_are_refused(self, encode, format):
        assert refusal(decode_file, encode(GREY_PIXELS, format)) == (415, "unsupported_image")

    @pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "magic alone"])
    def test_what_is_no_image_is_refused(self, data):
        assert refusal(decode_file, data) == (415, "unsupported_image")

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_a_truncated_image_is_refused(self, encode, format):
        data = encode(np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8), format)
        assert refusal(decode_file, data[: len(data) * 2 // 3]) == (400, "broken_image")

    @pytest.mark.parametrize("format", ["PNG", "JPEG"])
    def test_an_image_that_lacks_only_its_last_bytes_is_refused(self, encode, format):
        data = encode(np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8), format)
        for missing in range(1, 25):  # of a PNG, the first twenty leave all pixels whole
            assert refusal(decode_file, data[:-missing]) == (400, "broken_image")

    @pytest.mark.parametrize(
        ("width", "height"),
        [(101, 1), (1, 101), (10_000, 10_000), (100_000, 100_000), (1 << 30, 1 << 30)],
        ids=["just above", "high", "Pillow warns", "Pillow refuses", "overflow"],
    )
    def test_huge_dimensions_are_refused_from_the_header(self, width, height):
        assert refusal(decode_file, png_header(width, height)) == (413, "image_too_large")

    def test_the_largest_image_allowed_is_taken(self, encode):
        decode_file(encode(np.zeros((10, 10), np.uint8)))

    def test_several_images_are_counted_together(self):
        decoder = ImageDecoder(GREY, max_samples=300)
        largest = png_header(10, 10)
        decoder.check_total([largest] * 8 + [b"no image"] * 9 + [png_header(1 << 30, 1 << 30)])
        with pytest.raises(RequestError, match="have 900 pixels in all; the limit is 800") as caught:
            decoder.check_total([largest] * 9)
        assert (caught.value.status, caught.value.code) == (413, "image_too_large")

    @pytest.mark.parametrize(
        "bomb",
        [
            chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(200 << 20))),
            chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(200 << 20))),
            chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(200 << 20))),
            chunk(b"tEXt", b"key\0" + bytes(4 << 20)),
        ],
        ids=["zTXt", "iCCP", "iTXt", "tEXt"],
    )
    @pytest.mark.parametrize("count", [1, 40])
    def test_what_unpacks_to_much_beside_the_pixels_is_not_unpacked(self, bomb, count):
        data = png_with(*[bomb] * count)
        tracemalloc.start()
        began = time.perf_counter()
        try:
            status = attempt(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert status in (200, 400)
        assert peak < 2 * len(data) + (80 << 20)  # Pillow's own bound for texts is 64 MiB in all
        assert time.perf_counter() - began < 5

    def test_an_animation_is_its_first_picture(self):
        frames = [Image.fromarray(GREY_PIXELS), Image.fromarray(255 - GREY_PIXELS)]
        buffer = io.BytesIO()
        frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:] * 50)
        np.testing.assert_allclose(decode_file(buffer.getvalue()), [normalised(GREY_PIXELS, GREY)], atol=1e-6)

    @pytest.mark.parametrize("frames", [0, (1 << 31) - 1])
    def test_an_animation_that_claims_any_number_of_pictures_is_no_burden(self, frames):
        animation = chunk(b"acTL", struct.pack(">II", frames, 0))
        assert attempt(png_with(animation)) in (200, 400)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    @pytest.mark.parametrize("orientation", [1, 3])
    @pytest.mark.parametrize(("tags", "size"), [(60_000, 0), (60_000, 5), (3_000, 60_000), (200, 4 << 20)])
    def test_absurd_exif_takes_neither_time_nor_memory_nor_lines_of_log(self, encode, kind, orientation, tags, size):
        content = exif(tags, size, orientation)
        if kind == "PNG":
            data = png_with(chunk(b"eXIf", content))
        else:
            data = jpeg_with_exif(encode(GREY_PIXELS, "JPEG"), content)
        tracemalloc.start()
        began = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                status = attempt(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert status in (200, 400)
        assert caught == []
        assert peak < 8 * len(data) + (8 << 20)
        assert time.perf_counter() - began < 5

    @given(st.binary(max_size=300))
    @example(png_header(3, 2))
    def test_random_bytes_are_refused(self, data):
        status, _ = refusal(decode_file, data)
        assert 400 <= status < 500

    @given(st.data(), st.sampled_from(["PNG", "JPEG"]))
    def test_a_damaged_image_is_decoded_or_refused(self, encode, data, format):
        good = encode(np.arange(36, dtype=np.uint8).reshape(6, 6), format)
        position = data.draw(st.integers(0, len(good) - 1))
        bad = good[:position] + data.draw(st.binary(min_size=1, max_size=4)) + good[position + 1 :]
        try:
            samples = decode_file(bad)
        except RequestError as error:
            status = error.status
        else:
            assert np.isfinite(samples).all()
            status = 200
        assert 200 <= status < 500


def zeros(*shape):
    return np.zeros(shape, int).tolist()


class TestArrays:
    def test_one_grey_sample(self):
        samples, many = decode_array(GREY_PIXELS.tolist())
        assert not many
        np.testing.assert_allclose(samples, [[normalised(GREY_PIXELS, GREY)]], rtol=1e-6, atol=1e-6)

    def test_an_array_and_a_file_with_the_same_pixels_are_the_same(self, encode):
        samples, _ = decode_array(GREY_PIXELS.tolist())
        np.testing.assert_array_equal(samples[0], decode_file(encode(GREY_PIXELS)))

    def test_fractions_are_kept(self):
        samples, _ = decode_array(np.full((2, 3), 127.5).tolist())
        np.testing.assert_array_equal(samples, 0.0)

    @pytest.mark.parametrize(
        ("shape", "spec", "count", "many"),
        [
            ((2, 3), GREY, 1, False),
            ((2, 3, 1), GREY, 1, False),
            ((1, 2, 3), GREY, 1, True),
            ((4, 2, 3), GREY, 4, True),
            ((4, 2, 3, 1), GREY, 4, True),
            ((2, 3, 3), COLOUR, 1, False),
            ((4, 2, 3, 3), COLOUR, 4, True),
        ],
    )
    def test_shapes_that_are_taken(self, shape, spec, count, many):
        samples, is_list = decode_array(zeros(*shape), spec)
        assert samples.shape == (count, spec.channels, 2, 3)
        assert is_list == many

    @pytest.mark.parametrize(
        ("shape", "spec"),
        [
            ((), GREY),
            ((0,), GREY),
            ((6,), GREY),
            ((3, 2), GREY),
            ((0, 2, 3), GREY),
            ((2, 3, 3), GREY),
            ((2, 3), COLOUR),
            ((3, 2, 3), COLOUR),
            ((1, 1, 2, 3), GREY),
            ((1, 1, 1, 2, 3), GREY),
        ],
    )
    def test_shapes_that_are_refused(self, shape, spec):
        assert refusal(decode_array, zeros(*shape), spec) == (422, "wrong_shape")

    def test_an_instance_is_one_sample_never_a_batch(self):
        assert refusal(decode_array, zeros(1, 2, 3), batched=False) == (422, "wrong_shape")

    def test_too_many_samples(self):
        assert refusal(decode_array, zeros(5, 2, 3)) == (413, "too_many_samples")

    @pytest.mark.parametrize(
        ("value", "status", "code"),
        [
            ("text", 400, "not_numbers"),
            (None, 400, "not_numbers"),
            (True, 400, "not_numbers"),
            ({"a": 1}, 400, "not_numbers"),
            ([["0", "1", "2"], ["3", "4", "5"]], 400, "not_numbers"),
            ([[0, 1, None], [3, 4, 5]], 400, "not_numbers"),
            ([[0, 1, True], [3, 4, 5]], 400, "not_numbers"),
            ([[False] * 3] * 2, 400, "not_numbers"),
            ([[0, 1, {}], [3, 4, 5]], 400, "not_numbers"),
            ([[0, 1, 2], [3, 4]], 400, "ragged_array"),
            ([[0, 1, 2], 3], 400, "ragged_array"),
            ([[0, 1, [2]], [3, 4, 5]], 400, "ragged_array"),
            ([[0, 1, float("nan")], [3, 4, 5]], 422, "not_finite"),
            ([[0, 1, float("inf")], [3, 4, 5]], 422, "not_finite"),
            ([[0, 1, -1], [3, 4, 5]], 422, "out_of_range"),
            ([[0, 1, 255.001], [3, 4, 5]], 422, "out_of_range"),
            ([[0, 1, 2**63], [3, 4, 5]], 422, "out_of_range"),
            ([[0, 1, 10**400], [3, 4, 5]], 422, "out_of_range"),
        ],
    )
    def test_a_bad_array_gets_its_own_status_and_code(self, value, status, code):
        assert refusal(decode_array, value) == (status, code)

    @pytest.mark.parametrize("depth", [50, 100, 500])
    def test_deep_nesting_is_refused(self, depth):
        value = 1
        for _ in range(depth):
            value = [value]
        status, _ = refusal(decode_array, value)
        assert status in (400, 422)

    def test_one_long_string_among_short_ones_takes_no_memory(self):
        # NumPy would give every string the room of the longest: here 40 TB.
        assert refusal(decode_array, ["x" * 10_000_000] + [""] * 1_000_000) == (400, "not_numbers")

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        )
    )
    def test_random_json_is_refused(self, value):
        status, _ = refusal(decode_array, value)
        assert 400 <= status < 500
