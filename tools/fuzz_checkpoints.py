"""Fuzzes what reads checkpoints with damaged and hostile files: only typed errors may come of them.

    python tools/fuzz_checkpoints.py --seconds 600       # guided by coverage where atheris is installed
    python tools/fuzz_checkpoints.py --reproduce FINDING # a finding again, by the choices that were written

An input is a sound checkpoint of one of `KINDS` with a few changes, each of them a choice among those below, so that
one that is read further than its first bytes is common. What is loaded decodes two tokens natively. A finding is an
exception that is not the package's own, an end of the process, or more memory than `--memory-mb`.
"""

from __future__ import annotations

import gemma_mtp.cli.environment  # noqa: F401  isort: skip  (before PyTorch)

import argparse
import copy
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fuzz_seeds import BASE, Seeds

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import (
    load_drafter,
    load_target,
    open_source,
    read_generation_config,
)
from gemma_mtp.errors import GemmaMtpError

#: returns a whole number from the first to the second, both included
Choose = Callable[[int, int], int]
NUMBERS = (0, 1, 2, 3, 7, 31, 32, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
           2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *NUMBERS, *(-number for number in NUMBERS[1:]), 10**30, 0.0, -1.5, 1e-30, 1e300, True, False, None, "", "x",
    "\x00", "../../etc/passwd", "model.safetensors", "a" * 5000, "(a+)+$", [], {}, [[]], [None], {"": 0}, "F32", "BF16",
    "sliding_attention", "full_attention", "linear", "yarn", "gemma4_text", "gemma3_text", "\ud800", [0] * 100,
)  # fmt: skip
# -- changes


def changed_bytes(content: bytes, choose: Choose) -> bytes:
    """Flips bits, writes numbers over others, cuts off, repeats or leaves out a part: mostly near the beginning."""
    made = bytearray(content)
    for _ in range(choose(1, 4)):
        if not made:
            break
        place = choose(0, min(len(made), choose(1, 3) * 700) - 1) if choose(0, 7) else choose(0, len(made) - 1)
        what = choose(0, 6)
        if what <= 1:
            made[place] ^= 1 << choose(0, 7)
        elif what == 2:
            number = NUMBERS[choose(0, len(NUMBERS) - 1)]
            made[place : place + 8] = struct.pack("<Q", number)
        elif what == 3:
            made[place : place + 4] = struct.pack("<I", NUMBERS[choose(0, 12)])
        elif what == 4:
            del made[place:]
        elif what == 5:
            size = choose(1, 64)
            made[place:place] = made[place : place + size]
        else:
            del made[place : place + choose(1, 64)]
    return bytes(made)


def changed_json(content: bytes, choose: Choose) -> bytes:
    """Replaces values of any depth by others, leaves fields out, renames them, or puts one's value into another."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):  # a second change of the same file
        return content
    for _ in range(choose(1, 3)):
        places = list(_places(raw))
        if not places:
            break
        holder, key = places[choose(0, len(places) - 1)]
        what = choose(0, 7)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[str(VALUES[choose(0, len(VALUES) - 1)])] = holder.pop(key)
        elif what == 2:
            other, name = places[choose(0, len(places) - 1)]
            with suppress(KeyError, IndexError):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(VALUES[choose(0, len(VALUES) - 1)])
    text = json.dumps(raw)
    if not choose(0, 9):
        nested = choose(0, 1)
        text = text.replace(":", ":" + ("[" * 5000 if nested else "9" * 5000), 1)
    return text.encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys: Iterable[Any] = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        yield node, key
        yield from _places(node[key])


def changed_safetensors(content: bytes, choose: Choose) -> bytes:
    """The header's JSON, with its length right, or bytes."""
    if choose(0, 3) == 0:
        return changed_bytes(content, choose)
    length = int.from_bytes(content[:8], "little")
    header = changed_json(content[8 : 8 + length], choose)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


CHANGES: dict[str, Callable[[bytes, Choose], bytes]] = {
    ".json": changed_json, ".safetensors": changed_safetensors, ".gguf": changed_bytes,
}  # fmt: skip
#: quantisations of other tools, as a config.json says them: what they would be made of is not there, or is
QUANTISATIONS: tuple[Any, ...] = (
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {
        "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                                           "group_size": 32}}}},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"group_size": 32, "bits": 4},
    {"quant_method": "gemma", "num_bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gemma_mtp", "symmetric": True, "parts": {"target": {"bits": 8, "group_size": 64}}},
)  # fmt: skip


def write_input(seeds: Seeds, directory: Path, choose: Choose) -> str:
    """Write one damaged checkpoint, and return its kind."""
    kinds = [*seeds.files]
    kind = kinds[choose(0, len(kinds) - 1)]
    files = seeds.whole(kind)
    if "config.json" in files and not choose(0, 3):
        raw = json.loads(files["config.json"])
        raw["quantization_config"] = QUANTISATIONS[choose(0, len(QUANTISATIONS) - 1)]
        files["config.json"] = json.dumps(raw).encode()
    own = [name for name in files if not name.startswith(BASE)]
    for _ in range(choose(1, 2)):
        name = own[choose(0, len(own) - 1)]
        files[name] = CHANGES[Path(name).suffix](files[name], choose)
    if kind == "split" and not choose(0, 3):  # parts that say that they are each other
        first, second = own
        files[first], files[second] = files[second], files[first]
    _put(files, directory, kind)
    return kind


def _put(files: Mapping[str, bytes], directory: Path, kind: str) -> None:
    for name, content in files.items():
        path = directory / ("base" if name.startswith(BASE) else kind) / name.removeprefix(BASE)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


# -- what is held


def consume(directory: Path, kind: str, decode: bool = True) -> str:
    """Read all of a checkpoint as the commands do. Returns what came of it. Raises what is not a typed error."""
    place = directory / kind
    try:
        if kind == "adapter":
            load_target(open_source(directory / "base", adapter=place), torch.float32)
            return "loaded"
        if kind.startswith("drafter"):
            load_drafter(place, torch.float32)
            return "loaded"
        source = open_source(place)
        read_generation_config(source)
        if source.has_tokenizer:
            tokenizer = source.tokenizer()
            tokenizer.decode(tokenizer.encode("12"))
        if not decode:
            load_target(source, torch.float32)
            return "loaded"
        pair = load_pair(place, use_drafter=False, device="cpu", dtype="float32")
        pair.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
        return "decoded"
    except GemmaMtpError as error:
        if "\n" in str(error).strip():
            raise ValueError(f"an error of several lines: {error}") from None
        return type(error).__name__


class Fuzzer:
    """Runs inputs, counts what comes of them, and writes findings."""

    def __init__(self, out: Path, memory_mb: int) -> None:
        self.out, self.memory_mb = out, memory_mb
        out.mkdir(parents=True, exist_ok=True)
        self.place = Path(tempfile.mkdtemp(prefix="fuzz"))
        self.seeds = Seeds(self.place / "seeds")
        self.counts: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()

    def one(self, choose: Choose) -> None:
        made: list[int] = []

        def noted(least: int, most: int) -> int:
            made.append(choose(least, most))
            return made[-1]

        work = self._emptied()
        kind = write_input(self.seeds, work, noted)
        last = self.out / "last.json"  # of an input that ends the process
        last.write_text(json.dumps(made))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            self.counts[f"{kind}: {consume(work, kind)}"] += 1
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            assert grown < self.memory_mb, f"memory grew by {grown} MB"
        except Exception as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} at {Path(trace.filename).name}:{trace.lineno}"
            self.findings[name] += 1
            if self.findings[name] == 1:
                number = len(self.findings)
                (self.out / f"finding-{number}.json").write_text(json.dumps(made))
                (self.out / f"finding-{number}.txt").write_text(
                    f"{kind}\n{traceback.format_exc()}", errors="backslashreplace"
                )
                print(f"finding {number}: {name}: {str(error)[:200]}", flush=True)

    def sound(self) -> dict[str, str]:
        """What comes of each kind as it is."""
        found = {}
        for kind in self.seeds.files:
            work = self._emptied()
            _put(self.seeds.whole(kind), work, kind)
            found[kind] = consume(work, kind)
        return found

    def _emptied(self) -> Path:
        work = self.place / "input"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def close(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def report(self) -> str:
        rows = [f"{count:8} {what}" for what, count in sorted(self.counts.items())]
        found = [f"{count:8} FINDING {what}" for what, count in self.findings.items()]
        return "\n".join([f"{sum(self.counts.values()) + sum(self.findings.values())} executions", *rows, *found])


def run_blind(fuzzer: Fuzzer, seconds: float, seed: int) -> None:
    end = time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            return
        fuzzer.one(random.Random(f"{seed} {number}").randint)


def run_guided(fuzzer: Fuzzer, seconds: float, seed: int) -> None:
    """By atheris, which ends the process."""
    import atheris

    end = time.monotonic() + seconds

    def test(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        fuzzer.one(lambda least, most: provider.ConsumeIntInRange(least, most))
        if time.monotonic() > end:  # atheris ends the process without Python's own end
            print(fuzzer.report(), flush=True)
            fuzzer.close()
            os._exit(1 if fuzzer.findings else 0)

    arguments = [sys.argv[0], f"-seed={seed or 1}", "-max_len=256", "-len_control=0", "-rss_limit_mb=0", "-timeout=600",
                 "-verbosity=0", f"-artifact_prefix={fuzzer.out}/"]  # fmt: skip
    atheris.Setup(arguments, test)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where findings are written")
    parser.add_argument("--memory-mb", type=int, default=500, help="more than one input may take is a finding")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--reproduce", type=Path, help="a finding's .json, or last.json of a process that ended")
    args = parser.parse_args()
    guided = not (args.blind or args.reproduce) and importlib.util.find_spec("atheris") is not None
    if guided:
        instrumented()
    fuzzer = Fuzzer(args.out, args.memory_mb)
    try:
        if args.reproduce:
            made = iter(json.loads(args.reproduce.read_text()))
            fuzzer.one(lambda least, most: next(made))
            print(fuzzer.report())
        elif guided:
            run_guided(fuzzer, args.seconds, args.seed)
        else:
            run_blind(fuzzer, args.seconds, args.seed)
            print(fuzzer.report())
    finally:
        fuzzer.close()
    sys.exit(1 if fuzzer.findings else 0)


def instrumented() -> None:
    """Let atheris see which lines of the readers run."""
    import atheris

    for name, module in list(sys.modules.items()):
        if name.startswith(("gemma_mtp.checkpoint", "gemma_mtp.files", "gemma_mtp.config", "gemma_mtp.tokenizer",
                            "gemma_mtp.families")):  # fmt: skip
            for value in vars(module).values():
                if callable(value) and getattr(value, "__module__", None) == name and hasattr(value, "__code__"):
                    with suppress(Exception):
                        atheris.instrument_func(value)


if __name__ == "__main__":
    os.environ.setdefault("GEMMA_MTP_CACHE", "0")
    main()
