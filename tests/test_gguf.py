"""The GGUF format: headers, splits and blocks, against the `gguf` package; and files that are damaged or hostile."""

import array
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import add, close
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_mtp.checkpoint.blocks import READ, WRITTEN, dequantised, quantised
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.gguf import BLOCKS, MAX_HEADER_BYTES, TYPES, read_header
from gemma_mtp.files.gguf_write import GgufWriter

# -- headers, as the package writes them

METADATA: dict[str, Any] = {
    "a.text": "ü ▁\n", "a.flag": True, "a.number": 7, "a.real": 0.5, "a.texts": ["", "b", "日"],
    "a.flags": [True, False, True], "a.whole": array.array("i", [-1, 2, 3]), "a.reals": array.array("f", [0.5, -1.0]),
}  # fmt: skip


def write_theirs(path: Path, tensors: dict[str, np.ndarray], **more: Any) -> None:
    writer = gguf.GGUFWriter(path, "gemma4", **more)
    for key, value in METADATA.items():
        add(writer, key, list(value) if isinstance(value, array.array) else value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    close(writer)


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.random((5, 3), dtype=np.float32), "b": rng.random(7, dtype=np.float32),
        "c.half": rng.random((2, 3, 4), dtype=np.float32).astype(np.float16), "d": np.arange(6, dtype=np.int32),
    }  # fmt: skip


def test_a_header_is_what_the_package_wrote(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_theirs(tmp_path / "file.gguf", tensors)
    header = read_header(tmp_path / "file.gguf")
    assert header.metadata == {"general.architecture": "gemma4", **METADATA}
    content = (tmp_path / "file.gguf").read_bytes()
    assert list(header.tensors) == list(tensors)
    for name, entry in header.tensors.items():
        assert entry.shape == tensors[name].shape
        assert content[entry.offset : entry.offset + entry.nbytes] == tensors[name].tobytes()
    assert {name: entry.dtype for name, entry in header.tensors.items()} == {
        "token_embd.weight": "F32", "b": "F32", "c.half": "F16", "d": "I32",
    }  # fmt: skip


def test_every_type_of_metadata(tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "gemma4")
    numbers = {kinds.UINT8: 200, kinds.INT8: -3, kinds.UINT16: 60000, kinds.INT16: -300, kinds.UINT32: 2**32 - 1,
               kinds.INT32: -(2**31), kinds.UINT64: 2**64 - 1, kinds.INT64: -(2**63), kinds.FLOAT32: 0.25,
               kinds.FLOAT64: 0.1}  # fmt: skip
    for kind, number in numbers.items():
        writer.add_key_value(f"one.{kind.name}", number, kind)
        writer.add_key_value(f"many.{kind.name}", [number, 1], kinds.ARRAY, kind)
    writer.add_key_value("nested", [["a", "b"], ["c"]], kinds.ARRAY)
    close(writer)
    read = read_header(tmp_path / "file.gguf").metadata
    assert {kind: read[f"one.{kind.name}"] for kind in numbers} == numbers
    assert {kind: list(read[f"many.{kind.name}"]) for kind in numbers} == {kind: [n, 1] for kind, n in numbers.items()}
    assert read["nested"] == [["a", "b"], ["c"]]


def test_a_file_is_byte_for_byte_the_packages(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_theirs(tmp_path / "theirs.gguf", tensors)
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int32): "I32"}
    layout = {name: (names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    with GgufWriter(tmp_path / "ours.gguf", {"general.architecture": "gemma4", **METADATA}, layout) as writer:
        for name in reversed(layout):
            content = tensors[name].tobytes()
            writer.write(name, memoryview(content)[8:], 8)
            writer.write(name, memoryview(content)[:8])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_types_are_the_packages() -> None:
    assert TYPES == {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}


# -- splits


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    write_theirs(tmp_path / "model.gguf", some_tensors(), split_max_tensors=2)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in files] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    return files


def test_a_split_file_is_one(split: list[Path]) -> None:
    first, second = (read_header(file) for file in split)
    assert first == second
    assert set(first.tensors) == set(some_tensors())
    assert {entry.file for entry in first.tensors.values()} == set(split)
    assert first.metadata["a.text"] == METADATA["a.text"]


def test_splits_that_are_no_whole(split: list[Path]) -> None:
    first, second = split
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.gguf, one of 2 parts"):
        read_header(first)
    second.write_bytes(first.read_bytes())  # a part that says it is another: a circle
    with pytest.raises(CheckpointError, match="named part 2 of 2, but says that it is number 0"):
        read_header(first)
    second.write_bytes(kept)
    alone = first.rename(first.with_name("alone.gguf"))
    with pytest.raises(CheckpointError, match="is one of 2 parts, but is not named as one"):
        read_header(alone)
    for name in ("m-00003-of-00002.gguf", "m-00000-of-00002.gguf"):
        with pytest.raises(CheckpointError, match="name the parts from 00001 on"):
            read_header(second.rename(second.with_name(name)))
        second = second.with_name(name)
    huge = second.rename(second.with_name("m-00001-of-99999.gguf"))
    with pytest.raises(CheckpointError, match=r"lacks m-00002-of-99999\.gguf"):
        read_header(huge)


def test_a_name_in_two_parts(tmp_path: Path) -> None:
    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", "gemma4")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_tensor("same", np.zeros(4, np.float32))
        close(writer)
    with pytest.raises(CheckpointError, match=r"holds same, as m-00001-of-00002\.gguf does"):
        read_header(tmp_path / "m-00001-of-00002.gguf")


def test_parts_of_other_numbers_of_tensors(tmp_path: Path) -> None:
    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", "gemma4")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 5)
        writer.add_tensor(f"t{number}", np.zeros(4, np.float32))
        close(writer)
    with pytest.raises(CheckpointError, match="hold 2 tensors, but say that they are 5"):
        read_header(tmp_path / "m-00001-of-00002.gguf")


# -- what is not sound


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def crafted(
    *tensors: bytes, pairs: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None, data: int = 64
) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(pairs)))) + b"".join((*pairs, *tensors))
    return header + bytes(-len(header) % 32) + bytes(data)


U32_OF_3 = struct.pack("<II", 4, 3)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "does not begin with GGUF"),
    "another format": (b"PK\3\4" + bytes(60), "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(60), "of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    "cut in the counts": (crafted()[:12], "beyond its end"),
    "huge count of tensors": (crafted(counts=(2**63, 0)), "to hold 9223372036854775808 things"),
    "huge count of metadata": (crafted(counts=(0, 2**64 - 1)), "to hold 18446744073709551615 things"),
    "huge text": (crafted(pairs=(struct.pack("<Q", 2**60),), counts=(0, 1)), "beyond its end"),
    "huge array": (crafted(pairs=(text("k") + struct.pack("<IIQ", 9, 4, 2**62),)), "to hold 46116860184273879"),
    "huge array of texts": (crafted(pairs=(text("k") + struct.pack("<IIQ", 9, 8, 2**61),)), "to hold"),
    "arrays in arrays": (
        crafted(pairs=(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,), counts=(0, 1)),
        "arrays inside of arrays",
    ),
    "unknown kind of value": (crafted(pairs=(text("k") + struct.pack("<I", 13),), counts=(0, 1)), "of type 13"),
    "a flag of 2": (crafted(pairs=(text("k") + struct.pack("<IB", 7, 2),), counts=(0, 1)), "is no flag"),
    "a key twice": (crafted(pairs=(text("k") + U32_OF_3,) * 2), "has 'k' twice"),
    "a name twice": (crafted(tensor(), tensor(offset=32)), "the tensor t twice"),
    "five dimensions": (crafted(tensor(shape=(1,) * 5)), "has 5 dimensions"),
    "overflowing shape": (crafted(tensor(shape=(2**33, 2**33))), "has the shape"),
    "shape that wraps to nothing": (crafted(tensor(shape=(2**32, 2**32, 2**32, 0))), "has the shape"),
    "unknown type": (crafted(tensor(kind=99)), "of type 99"),
    "a removed type": (crafted(tensor(kind=4)), "of type 4"),
    "half a block": (crafted(tensor(shape=(33,), kind=8)), "no whole number of blocks of Q8_0"),
    "beyond the end": (crafted(tensor(shape=(17,))), "ends at byte"),
    "far beyond the end": (crafted(tensor(offset=2**63)), "ends at byte"),
    "not aligned": (crafted(tensor(offset=4)), "no multiple of 32"),
    "overlapping": (crafted(tensor("a", (12,)), tensor("b", (4,), offset=32)), "b overlaps a"),
    "alignment of 0": (crafted(pairs=(text("general.alignment") + struct.pack("<II", 4, 0),)), "a power of two"),
    "alignment of 3": (crafted(pairs=(text("general.alignment") + U32_OF_3,)), "a power of two"),
    "alignment in words": (
        crafted(pairs=(text("general.alignment") + struct.pack("<I", 8) + text("x"),)), "a power of two"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_unsound_files(name: str, tmp_path: Path) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_header(tmp_path / "file.gguf")
    assert "can not be read as GGUF" in str(caught.value)


def test_crafted_files_are_sound_otherwise(tmp_path: Path) -> None:
    content = crafted(
        tensor("a"), tensor("b", (2, 0), offset=32), pairs=(text("general.alignment") + struct.pack("<II", 4, 32),)
    )
    (tmp_path / "file.gguf").write_bytes(content)
    assert {name: entry.shape for name, entry in read_header(tmp_path / "file.gguf").tensors.items()} == {
        "a": (4,), "b": (0, 2),
    }  # fmt: skip


def test_a_header_of_any_size_is_not_read(tmp_path: Path) -> None:
    """A file of holes that is longer than any header: its one text is not read into memory."""
    path = tmp_path / "file.gguf"
    path.write_bytes(crafted(pairs=(text("k") + struct.pack("<IQ", 8, MAX_HEADER_BYTES + 1),), counts=(0, 1), data=0))
    with path.open("r+b") as file:
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="which are never read"):
        read_header(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "file.gguf"
    write_theirs(path, some_tensors())
    return path.read_bytes()


@given(st.data())
@settings(max_examples=400)
def test_damage_gives_a_header_or_a_typed_error(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert all(entry.offset + entry.nbytes <= len(content) for entry in header.tensors.values())


# -- blocks


@given(
    kind=st.sampled_from(sorted(READ)), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 4), count=st.integers(1, 3)
)
def test_values_are_the_packages_bit_for_bit(kind: str, seed: int, rows: int, count: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, 2, count * BLOCKS[kind][1]), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    ours = dequantised(kind, torch.from_numpy(data)).numpy()
    assert ours.shape == expected.shape
    known = ~np.isnan(expected)  # which bits a NaN has is nobody's promise
    assert np.array_equal(np.isnan(ours), ~known)
    assert np.array_equal(ours.view(np.int32)[known], expected.view(np.int32)[known])


@given(
    kind=st.sampled_from(sorted(WRITTEN)), seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 3e4]), steps=st.sampled_from([None, 1, 2, 5]),
)  # fmt: skip
def test_blocks_are_the_packages_byte_for_byte(kind: str, seed: int, scale: float, steps: int | None) -> None:
    """`steps` rounds values, so that two of the largest magnitude and other sign, halves and zeros occur."""
    values = np.random.default_rng(seed).normal(size=(4, 96)).astype(np.float32)
    values[0] = 0
    if steps is not None:
        values = np.round(values * steps) / np.float32(steps)
    values = (values * np.float32(scale)).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(quantised(kind, torch.from_numpy(values)).numpy(), expected)
