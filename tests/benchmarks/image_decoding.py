"""Where the time of a JPEG request goes before the model: each step alone, taking turns, and on several threads.

    python tests/benchmarks/image_decoding.py [--size 224] [--source 224] [--threads 1,2] [--rounds 15]

Prints the median microseconds an image of each step, the median over the rounds of its ratio to the whole decoding of
the handlers (ratios within a round: what else the machine does hits both alike), and what several threads reach against
one: 2.0 of two means that Python's lock is free meanwhile. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from handlers.allocator import keep_freed_memory
from handlers.image import EncodedImage, ImageDecoder
from handlers.orientation import check_jpeg, turn_upright
from handlers.preprocessing import ImagePreprocessing
from loadtest.pictures import generate_pictures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURES = 32
Step = Callable[[int], object]


def steps(files: list[bytes], size: int) -> dict[str, Step]:
    """What is timed, by name; each takes the number of a picture."""
    decoder = ImageDecoder(ImagePreprocessing(mode="RGB", height=size, width=size, mean=MEAN, std=STD), max_samples=1)
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    resized = [image.resize((size, size), Image.Resampling.BILINEAR) for image in opened]
    pixels = [np.asarray(image, dtype=np.uint8) for image in resized]
    batch = np.empty((len(files), 3, size, size), np.float32)
    mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    scale, offset = 1 / (255 * std), -mean / std
    table = (np.arange(256, dtype=np.float32)[None] / 255 - mean.reshape(3, 1)) / std.reshape(3, 1)
    inner = {"b64": [base64.b64encode(data).decode() for data in files]}
    larger = [image.resize((size * 5 // 4, size * 5 // 4)) for image in opened]
    samples = [decoder.decode(EncodedImage(data=data))[0][0] for data in files]

    def load(number: int) -> None:
        Image.open(io.BytesIO(files[number]), formats=("JPEG",)).load()

    def draft(number: int) -> None:
        image = Image.open(io.BytesIO(files[number]), formats=("JPEG",))
        image.draft("RGB", (size // 2, size // 2))  # the DCT at half the size: for larger files only
        image.load()

    def header(number: int) -> None:
        check_jpeg(files[number])
        Image.open(io.BytesIO(files[number]), formats=("PNG", "JPEG"))

    def fused(number: int) -> None:
        out = np.empty((3, size, size), np.float32)
        np.multiply(pixels[number].transpose(2, 0, 1), scale, out=out, dtype=np.float32)
        out += offset

    def look_up(number: int) -> None:
        out = np.empty((3, size, size), np.float32)
        for channel in range(3):
            # A mode, or NumPy copies the result through a buffer to be able to raise.
            np.take(table[channel], pixels[number][..., channel], out=out[channel], mode="clip")

    def look_up_bands(number: int) -> None:
        out = np.empty((3, size, size), np.float32)
        for channel, band in enumerate(resized[number].split()):
            np.take(table[channel], np.asarray(band), out=out[channel], mode="clip")

    def fused_bands(number: int) -> None:
        out = np.empty((3, size, size), np.float32)
        for channel, band in enumerate(resized[number].split()):
            np.multiply(np.asarray(band), scale[channel, 0, 0], out=out[channel], dtype=np.float32)
            out[channel] += offset[channel, 0, 0]

    def into_batch(number: int) -> None:
        for channel in range(3):
            np.take(table[channel], pixels[number][..., channel], out=batch[number, channel], mode="clip")

    return {
        "handlers: all of it": lambda n: decoder.decode(EncodedImage(data=files[n])),
        "handlers: pixels": lambda n: decoder._open(files[n]),
        "handlers: normalise": lambda n: decoder._normalise(pixels[n][np.newaxis]),
        "Pillow: header": header,
        "Pillow: header and pixels": load,
        "Pillow: the same, draft at half size": draft,
        "Pillow: upright (no EXIF)": lambda n: turn_upright(opened[n]),
        "Pillow: copy in convert": lambda n: opened[n].convert("RGB"),
        "Pillow: to an array": lambda n: np.asarray(opened[n], dtype=np.uint8),
        "Pillow: resize from 5/4": lambda n: larger[n].resize((size, size), Image.Resampling.BILINEAR),
        "normalise: multiply and add": fused,
        "normalise: multiply and add, of bands": fused_bands,
        "normalise: table (the same bits)": look_up,
        "normalise: table, of bands": look_up_bands,
        "normalise: table, into the batch": into_batch,
        "base64 of JSON": lambda n: base64.b64decode(inner["b64"][n], validate=True),
        "stack: a batch of 8, per 8 images": lambda n: np.stack(samples[n % 4 * 8 : n % 4 * 8 + 8]),
    }


def time_step(step: Step, count: int) -> float:
    """Seconds an image."""
    start = time.perf_counter()
    for number in range(count):
        step(number)
    return (time.perf_counter() - start) / count


def rate_on(step: Step, count: int, threads: int, seconds: float) -> float:
    """Images a second of some threads together."""
    done = [0] * threads
    stop = time.perf_counter() + seconds

    def work(place: int) -> None:
        while time.perf_counter() < stop:
            for number in range(count):
                step(number)
            done[place] += count

    workers = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="what the model takes")
    parser.add_argument("--source", type=int, default=224, help="what the files have")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keep_freed_memory()  # as workers do: or every array would be fresh pages from the system
    files = generate_pictures(PICTURES, height=arguments.source, width=arguments.source)
    found = steps(files, arguments.size)
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(arguments.rounds + 1):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            seconds = time_step(found[name], PICTURES)
            if turn:  # the first warms up
                times[name].append(seconds)
    whole = times["handlers: all of it"]
    sizes = sorted(map(len, files))
    print(f"{PICTURES} JPEG files {arguments.source} x {arguments.source}, {sizes[0]} to {sizes[-1]} bytes")
    report: dict[str, dict[str, float]] = {}
    for name, seconds in times.items():
        share = statistics.median(one / other for one, other in zip(seconds, whole, strict=True))
        report[name] = {"microseconds": statistics.median(seconds) * 1e6, "of_all": share}
        print(f"{name:38} {report[name]['microseconds']:8.0f} µs  {share:6.1%}")
    counts = [int(word) for word in arguments.threads.split(",")]
    scaling: dict[str, dict[int, float]] = {}
    for name in ("handlers: all of it", "handlers: pixels", "Pillow: header and pixels", "handlers: normalise"):
        rates: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(5):
            for count in counts:
                rates[count].append(rate_on(found[name], PICTURES, count, 0.4))
        first = rates[counts[0]]
        scaling[name] = {
            count: statistics.median(one / other for one, other in zip(rates[count], first, strict=True))
            for count in counts
        }
        print(f"{name:38} " + ", ".join(f"{count} threads {value:.2f} x" for count, value in scaling[name].items()))
    print(json.dumps({"steps": report, "threads": scaling}))


if __name__ == "__main__":
    main()
