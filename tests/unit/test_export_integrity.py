"""One flipped byte anywhere in an archive: who refuses it, and what cannot be seen where.

``inspect`` and ``serve`` read the whole file (:func:`export.archive.open_archive`) and refuse every flip. A worker sees
only what TorchServe's frontend extracted, with Java's ZipInputStream, which reads the entries one after another and
never looks at the directory behind them.
"""

from __future__ import annotations

import io
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from export.archive import ArchiveFiles, open_archive, write_archive
from export.errors import ArchiveError
from export.pipeline import ExportOptions, export_archive
from handlers.digests import verify_folder
from handlers.errors import DigestError
from models.signature import text_classification_signature
from models.text_encoder import build_text_classifier

# Signature, version needed, flags, method, time, date, CRC, packed size, size, length of the name, of extra fields.
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
# What of an entry's own header Java does not use: the version, most flags, time and date, the packed size.
IDLE = (4, 5, 6, 7, 10, 11, 12, 13, 18, 19, 20, 21)


def extract_as_java(content: bytes) -> dict[str, bytes]:
    """What ZipInputStream makes of an archive.

    Compared with TorchServe's own ZipUtils on OpenJDK 17: the same for 2,058 flips in all headers, contents and the
    directory of an archive.

    Raises:
        ValueError: Where it throws.
    """
    files = {}
    at = 0
    while content[at : at + 4] == b"PK\3\4":
        _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack_from(content, at)
        at += LOCAL_HEADER.size
        if flags & 1 or (flags & 8 and method != 8) or method not in (0, 8):
            raise ValueError("encrypted, or of an unknown method or length")
        name = content[at : at + name_length].decode("utf-8")
        at += name_length + extra_length
        if method == 8:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflater.decompress(content[at:])
            except zlib.error as error:
                raise ValueError("invalid compressed data") from error
            packed = len(content) - at - len(inflater.unused_data)
        else:
            if at + size > len(content):
                raise ValueError("unexpected end")
            packed = size  # the other one is not looked at
            data = content[at : at + size]
        if zlib.crc32(data) != crc or len(data) != size:
            raise ValueError("invalid entry CRC")
        files[name] = data
        at += packed
    return files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "model.pt").write_bytes(b"weights")
    files = ArchiveFiles(artifact=folder / "model.pt", documents={"signature.json": b"{}\n"}, config=b"minWorkers: 1\n")
    path = write_archive(files, name="digits", version="1.0", out=folder / "store")
    content = path.read_bytes()
    assert set(extract_as_java(content)) == set(zipfile.ZipFile(io.BytesIO(content)).namelist())
    return path


@pytest.fixture(scope="module")
def text_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of texts, with its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "good", "bad"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = {"vocab_size": 4, "num_classes": 2, "hidden_dim": 8, "num_layers": 1, "num_heads": 2}
    config |= {"intermediate_dim": 16, "max_length": 6}
    torch.manual_seed(0)
    content = {
        "format": "torchport-checkpoint",
        "format_version": 1,
        "model": {"factory": "models.text_encoder:build_text_classifier", "config": config},
        "state_dict": dict(build_text_classifier(**config).state_dict()),
        "signature": text_classification_signature(
            ("bad", "good"), tokenizer="tokenizer.json", vocab_size=4, max_length=6, pad_id=0
        ),
        "files": {"tokenizer.json": tokenizer.to_str()},
        "metrics": {},
    }
    torch.save(content, folder / "checkpoint.pt")
    report = export_archive(ExportOptions(source=folder / "checkpoint.pt", name="texts", out=folder / "store"))
    assert report.archive is not None
    return report.archive


@pytest.fixture(params=["torchscript", "onnx", "text"])
def real(request: pytest.FixtureRequest) -> bytes:
    """The bytes of a real archive."""
    if request.param == "text":
        path: Path = request.getfixturevalue("text_archive")
        assert "tokenizer.json" in open_archive(path).digests
    else:
        path = request.getfixturevalue("exported")(request.param).archive
    return path.read_bytes()


def refused_at_load(content: bytes, folder: Path, whole: dict[str, bytes]) -> bool:
    """Whether TorchServe or the worker refuses an archive; ``folder`` holds what the whole one is extracted to."""
    try:
        found = extract_as_java(content)
    except (ValueError, struct.error):
        return True
    changed = {name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name)}
    if any("\0" in name for name in changed):
        return True  # no file can be called that
    for name in changed & whole.keys():
        (folder / name).unlink()
    for name in changed & found.keys():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(found[name])
    try:
        verify_folder(folder)
    except DigestError:
        return True
    finally:
        for name in changed & found.keys():
            (folder / name).unlink(missing_ok=True)
        for name in changed & whole.keys():
            (folder / name).write_bytes(whole[name])
    return False


def positions_of(content: bytes, number: int) -> list[int]:
    """Some of the bytes of an archive, thickly where its structure is."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        entries, directory = source.infolist(), source.start_dir
    generator = random.Random(0)
    headers = [entry.header_offset + i for entry in entries for i in range(30 + len(entry.filename))]
    return [
        *generator.sample(range(len(content)), number),
        *generator.sample(headers, min(len(headers), number)),
        *generator.sample(range(directory, len(content)), number),
    ]


def damaged_copies(content: bytes, positions: list[int]) -> Iterator[tuple[int, bytes]]:
    generator = random.Random(1)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= generator.randrange(1, 256)
        yield position, bytes(damaged)


def test_flipped_bytes_of_every_region_are_refused_at_inspect(real: bytes, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mar"
    for _, damaged in damaged_copies(real, positions_of(real, 60)):
        copy.write_bytes(damaged)
        with pytest.raises(ArchiveError, match=r"copy\.mar"):
            open_archive(copy)
    copy.write_bytes(real)
    open_archive(copy)


def test_flipped_bytes_are_refused_at_worker_load_or_change_nothing_there(real: bytes, tmp_path: Path) -> None:
    check_worker(real, positions_of(real, 25), tmp_path / "worker")


def test_every_flipped_byte_of_a_small_archive_is_refused_at_worker_load_or_changes_nothing_there(
    small: Path, tmp_path: Path
) -> None:
    content = small.read_bytes()
    with zipfile.ZipFile(small) as source:
        entries, directory = source.infolist(), source.start_dir
    headers = [entry.header_offset + i for entry in entries for i in range(30 + len(entry.filename))]
    little = [e.header_offset + 30 + len(e.filename) + i for e in entries for i in range(min(3, e.file_size))]
    behind = random.Random(0).sample(range(directory, len(content)), 100)
    check_worker(content, sorted({*headers, *little, directory, *behind}), tmp_path / "worker")


def check_worker(content: bytes, positions: list[int], folder: Path) -> None:
    whole = extract_as_java(content)
    for name, data in whole.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    verify_folder(folder)
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        starts, directory = [entry.header_offset for entry in source.infolist()], source.start_dir
    idle = {start + i for start in starts for i in IDLE}
    for position, damaged in damaged_copies(content, positions):
        if not refused_at_load(damaged, folder, whole):
            assert position >= directory or position in idle, position
            assert extract_as_java(damaged) == whole, position


def test_every_flipped_byte_of_an_extracted_file_is_refused(small: Path, tmp_path: Path) -> None:
    open_archive(small).extract(tmp_path / "worker")
    for name in ("model.pt", "MAR-INF/MANIFEST.json", "model-config.yaml", "entry.py", "signature.json"):
        file = tmp_path / "worker" / name
        content = file.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(DigestError, match=f"{name} has changed"):
                verify_folder(tmp_path / "worker")
        file.write_bytes(content)
    shutil.rmtree(tmp_path / "worker")
