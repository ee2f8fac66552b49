"""Files: whole or not at all, with the umask's permissions; safetensors headers against the library's own reading."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gemma_mtp.checkpoint.pieces import TORCH_DTYPES, read_pieces
from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.errors import CheckpointError
from gemma_mtp.files.headers import StoredTensor
from gemma_mtp.files.pieces import PieceFile
from gemma_mtp.files.replace import claimed, new_directory, replace_file
from gemma_mtp.files.safetensors import SafetensorsWriter, read_header, shards
from gemma_mtp.json_files import write_json

# -- safetensors


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name} ü": torch.randint(0, 2, (3, 4), generator=generator).to(dtype) for name, dtype in TORCH_DTYPES.items()
    }
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 7), "b": torch.ones(5), "a": torch.ones(5)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_is_byte_for_byte_the_librarys(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    save_file(tensors, tmp_path / "theirs", metadata)
    save_tensors(tmp_path / "ours", tensors, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reading_gives_what_the_library_gives(tmp_path: Path) -> None:
    tensors = tensors_of_every_dtype()
    save_file(tensors, tmp_path / "file", {"format": "pt"})
    ours, metadata = load_tensors(tmp_path / "file")
    theirs = load_file(tmp_path / "file")
    assert metadata == {"format": "pt"}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@given(st.data())
@settings(max_examples=50)
def test_pieces_are_rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    path = tmp_path_factory.mktemp("rows") / "file"
    tensor = torch.randn(shape)
    save_tensors(path, {"other": torch.ones(3), "x": tensor, "y": torch.zeros(2)})
    stored = read_header(path).tensors["x"]
    first = data.draw(st.integers(0, shape[0]))
    rows = slice(first, data.draw(st.integers(first, shape[0])))
    whole, some = read_pieces([(stored, None), (stored, rows)])
    assert torch.equal(whole, tensor) and torch.equal(some, tensor[rows])


def raw_file(header: Any, data: int = 16) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + bytes(data)


def entry(begin: Any = 0, end: Any = 16, dtype: Any = "F32", shape: Any = (4,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


UNSOUND: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it has 0 bytes"),
    "length beyond the end": ((2**63).to_bytes(8, "little") + b"{}", "its header has 9223372036854775808 bytes"),
    "no object": (raw_file([]), "no JSON object"),
    "no JSON": (raw_file(b"{x"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "nested": (raw_file(b'{"a":' * 100_000), "not valid JSON"),
    "twice": (raw_file(b'{"a": %(e)b, "a": %(e)b}' % {b"e": json.dumps(entry()).encode()}), "has 'a' twice"),
    "entry": (raw_file({"a": 3}), "dtype None"),
    "dtype": (raw_file({"a": entry(dtype="F33")}), "dtype 'F33'"),
    "dtype of another kind": (raw_file({"a": entry(dtype=["F32"])}), "dtype ['F32']"),
    "no shape": (raw_file({"a": entry(shape=None)}), "shape None"),
    "negative": (raw_file({"a": entry(shape=(-2, -2))}), "shape [-2, -2]"),
    "fraction": (raw_file({"a": entry(shape=(4.0,))}), "shape [4.0]"),
    "true": (raw_file({"a": entry(shape=(4, True))}), "shape [4, True]"),
    "overflow": (raw_file({"a": entry(shape=(2**62, 4))}), "takes 7.3787e+19 bytes"),
    "huge": (raw_file({"a": entry(end=2**70, shape=(2**68,))}), "data_offsets"),
    "mismatch": (raw_file({"a": entry(shape=(3,))}), "takes 12 bytes, but has those from 0 to 16"),
    "backwards": (raw_file({"a": entry(begin=16, end=0)}), "takes 16 bytes, but has those from 16 to 0"),
    "overlap": (raw_file({"a": entry(0, 16), "b": entry(8, 24)}, 24), "b overlaps a"),
    "the same place": (raw_file({"a": entry(), "b": entry()}), "b overlaps a"),
    "gap": (raw_file({"a": entry(0, 16), "b": entry(20, 36)}, 36), "b leaves a gap after a"),
    "gap before": (raw_file({"a": entry(4, 20)}, 20), "a leaves a gap after the header"),
    "beyond the end": (raw_file({"a": entry()}, 15), "its tensors end at byte"),
    "more than tensors": (raw_file({"a": entry()}, 17), "its tensors end at byte"),
    "metadata": (raw_file({"a": entry(), "__metadata__": {"x": 1}}), "metadata"),
    "metadata as a list": (raw_file({"a": entry(), "__metadata__": ["x"]}), "metadata"),
    "part of a byte": (raw_file({"a": entry(0, 1, "F4", (1,))}, 1), "takes 0.5 bytes"),
}


def read_by_the_library(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), list(each.get_shape())) for name, each in slices.items()}
    except (SafetensorError, OSError):
        return None


def read_by_us(path: Path) -> dict[str, Any] | None:
    try:
        return {name: (each.dtype, list(each.shape)) for name, each in read_header(path).tensors.items()}
    except CheckpointError as error:
        message = str(error)
    assert message.startswith(f"{path} can not be read as safetensors (")
    assert message.endswith("truncated or damaged: copy it again.")
    assert "\n" not in message
    return None


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_header_is_refused(name: str, tmp_path: Path) -> None:
    content, why = UNSOUND[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "file")
    assert why in str(caught.value)
    assert read_by_us(tmp_path / "file") is None
    if name != "twice":  # where the library takes the last without a word
        assert read_by_the_library(tmp_path / "file") is None


def test_a_header_is_read_without_its_tensors_whatever_it_says_it_needs(tmp_path: Path) -> None:
    """The longest header is refused before memory is taken for it."""
    with (tmp_path / "file").open("wb") as file:
        file.write((1 << 34).to_bytes(8, "little"))
        file.truncate(1 << 35)
    with pytest.raises(CheckpointError, match="its header has 17179869184 bytes, and more than 100000000 are never"):
        read_header(tmp_path / "file")


WORDS = [b"[", b"]", b"{", b"}", b"0", b"4", b"16", b"-", b",", b'"', b"F32", b"BF16", b"I64", b" ", b"null", b"1e1"]


def test_damaged_headers_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    """Accepted and refused alike, and with the same names, dtypes and shapes."""
    tensors = {"a": torch.ones(4), "b": torch.ones(2, 2, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}
    path, seen = tmp_path / "file", set[bool]()
    save_file(tensors, path, {"format": "pt"})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")

    @given(st.integers(8, 8 + length), st.integers(0, 3), st.sampled_from(WORDS), st.booleans())
    @settings(max_examples=300, derandomize=True)
    def check(at: int, taken: int, word: bytes, fits: bool) -> None:
        header = whole[8:at] + word + whole[at + (len(word) if fits else taken) : 8 + length]
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
        ours, theirs = read_by_us(path), read_by_the_library(path)
        assert ours == theirs
        seen.add(ours is None)

    check()
    assert seen == {True, False}


def test_a_file_that_is_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_tensors(tmp_path / "file", {"x": torch.ones(1000)})
    stored = read_header(tmp_path / "file").tensors["x"]
    os.truncate(tmp_path / "file", 2000)
    with pytest.raises(CheckpointError, match=r"file ends at byte 2000, but 4000 bytes from \d+ on were expected"):
        list(read_pieces([(stored, None)]))
    (tmp_path / "file").unlink()
    with pytest.raises(CheckpointError, match=r"file can not be read.*No such file"):
        list(read_pieces([(stored, None)]))
    with pytest.raises(CheckpointError, match="can not be read"):
        PieceFile(tmp_path)


def test_a_dtype_that_pytorch_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(raw_file({"a": entry(0, 2, "F4", (4,))}, 2))
    stored = read_header(tmp_path / "file").tensors["a"]
    with pytest.raises(CheckpointError, match="stores a as F4, which can not be read"):
        list(read_pieces([(stored, None)]))


def test_pieces_of_several_files_in_turn(tmp_path: Path) -> None:
    stored: list[StoredTensor] = []
    for i in range(2):
        save_tensors(tmp_path / str(i), {"x": torch.full((3,), float(i))})
        stored.append(read_header(tmp_path / str(i)).tensors["x"])
    values = list(read_pieces((stored[i % 2], None) for i in range(4)))
    assert [value.tolist() for value in values] == [[0.0] * 3, [1.0] * 3] * 2


def test_what_is_not_written_whole_is_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="not written whole"),
        SafetensorsWriter(tmp_path / "file", {"x": ("F32", (4,)), "y": ("U8", (1,))}) as writer,
    ):
        writer.write("x", memoryview(bytes(8)), 8)


def test_shards() -> None:
    sizes = {"a": 1, "b": 1, "c": 9, "d": 1, "e": 1, "f": 1}
    layout = {name: ("F32", (size,)) for name, size in sizes.items()}
    assert [list(part) for part in shards(layout, 8)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert [list(part) for part in shards(layout, 1000)] == [list(layout)]
    assert list(shards({}, 8)) == []


# -- written whole or not at all


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_the_umasks(umask: int, tmp_path: Path) -> None:
    """Of files by every way of filling one, that of a library that makes a private temporary file too."""

    def by_a_private_file(partial: Path) -> None:
        partial.with_suffix(".private").write_text("x")
        partial.with_suffix(".private").chmod(0o600)
        partial.with_suffix(".private").replace(partial)

    replace_file(tmp_path / "new" / "text", lambda partial: partial.write_text("x"))
    replace_file(tmp_path / "new" / "private", by_a_private_file)
    save_tensors(tmp_path / "new" / "tensors", {"x": torch.ones(1)})
    write_json(tmp_path / "new" / "json", {})
    with new_directory(tmp_path / "directory") as directory:
        (directory / "file").write_text("x")
    files = [*(tmp_path / "new").iterdir(), tmp_path / "directory" / "file"]
    assert len(files) == 5
    assert {mode(path) for path in files} == {0o666 & ~umask}
    assert {mode(tmp_path / "new"), mode(tmp_path / "directory")} == {0o777 & ~umask}


def test_a_file_in_the_way_of_a_directory_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/new can not be written: Not a directory"):
        replace_file(tmp_path / "file" / "new", Path.touch)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")

    def half(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"file can not be written.*No space left"):
        replace_file(tmp_path / "file", half)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted_directory(tmp_path / "directory")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def interrupted(partial: Path) -> None:
    partial.write_text("half")
    raise KeyboardInterrupt


def interrupted_directory(path: Path) -> None:
    with new_directory(path) as directory:
        interrupted(directory / "half")


def test_of_two_runs_that_write_a_directory_the_second_is_refused(tmp_path: Path) -> None:
    """At its start, and the first goes on. One that was killed is in nobody's way."""
    with new_directory(tmp_path / "above" / "out") as directory:
        (directory / "file").write_text("first")
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(interrupted_directory, tmp_path / "above" / "out").exception()
        assert isinstance(error, CheckpointError) and "another run is writing" in str(error)
        assert (directory / "file").read_text() == "first"
    assert [path.name for path in (tmp_path / "above").iterdir()] == ["out"]

    killed = tmp_path / ".next.partial"
    killed.mkdir()
    (killed / "half").touch()
    (tmp_path / ".next.lock").touch()
    with new_directory(tmp_path / "next") as directory:
        (directory / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "next"]
    assert [path.name for path in (tmp_path / "next").iterdir()] == ["file"]


def test_a_claim_is_one_of_other_processes_too(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from gemma_mtp.files.replace import claimed\n"
        "with claimed(Path('out'), Path(sys.argv[1])): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "new" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match="another run is writing out"),
            claimed(Path("out"), tmp_path / "new" / "lock"),
        ):
            pass
        process.communicate(b"\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a directory in which nobody can make a file")
def test_a_place_where_nothing_can_be_written_is_not_said_to_be_taken() -> None:
    with (
        pytest.raises(CheckpointError, match="/proc/out can not be written: No such file"),
        new_directory(Path("/proc/out")),
    ):
        pass


def test_a_mounted_directory_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one could be written to, but nothing can be renamed to it."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(CheckpointError, match="a file system of its own"), new_directory(tmp_path / "mounted"):
        pass


def test_threads_may_write_the_same_file(tmp_path: Path) -> None:
    both, errors = threading.Barrier(2), list[BaseException]()

    def write(text: str) -> None:
        def fill(partial: Path) -> None:
            partial.write_text(text)
            both.wait(10)  # while both have begun

        try:
            replace_file(tmp_path / "file", fill)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / "file").read_text() in ("one", "two")
    assert len(list(tmp_path.iterdir())) == 1


def test_files_need_no_torch() -> None:
    code = (
        "import sys, gemma_mtp.files.safetensors, gemma_mtp.files.replace, gemma_mtp.json_files\n"
        "sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
