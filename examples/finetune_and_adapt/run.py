"""Fine-tune a target, watch its drafter fall behind, adapt the drafter, and see it recover.

    python examples/finetune_and_adapt/run.py --minutes 15          # or: make example

The bundled target, a model of Python source, is fine-tuned with LoRA on another code base in another language: BokehJS,
JavaScript under the BSD licence, from Bokeh's wheel. Its drafter still drafts for the model that was. `gemma-mtp train`
adapts it on that same text. The three pairs go on from the same held-out files; figures and
pictures go to --work. A stage whose result is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gemma_mtp.cli import environment  # noqa: F401 (before what imports torch)
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import bundled_directory, choose_device, load_pair
from gemma_mtp.measure.acceptance import GREEDY, AcceptanceReport, Comparison, compare, measure_acceptance, prompts_of
from gemma_mtp.measure.figure import measured_on
from gemma_mtp.measure.plot import plot_acceptance

#: BSD-3-Clause; 2 MB of modules that are not minified
SOURCE, VERSION = "bokeh", "3.7.3"
BUNDLES = ("bokeh", "bokeh-gl", "bokeh-widgets", "bokeh-tables", "bokeh-api")
#: shorter modules say nothing; lines this long are tables
SHORTEST, LONGEST_LINE = 400, 400
HELD_OUT_PERCENT = 5
TEMPERATURES = (0.0, 1.0)
PROMPTS, PROMPT_TOKENS, DRAFT_TOKENS, MAX_TOKENS = 36, 128, 4, 128
#: of the time for adapting, what the gate needs to measure before and after the steps
GATE_MINUTES = 1.0
#: a smaller difference of mean acceptance lengths is within what so few files leave open
LEAST_LOSS = 0.1

Reports = Mapping[float, AcceptanceReport]
BEFORE, TUNED, ADAPTED = "before fine-tuning", "fine-tuned, old drafter", "fine-tuned, adapted drafter"


def fetch_code(directory: Path) -> None:
    """BokehJS's modules, one file each, as directory/training and directory/held_out, split by a hash of the name."""
    download = directory / "wheel"
    run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary=:all:", "--dest", str(download), f"{SOURCE}=={VERSION}"])  # fmt: skip
    with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
        for bundle in BUNDLES:
            for name, text in modules(wheel.read(f"bokeh/server/static/js/{bundle}.js").decode()):
                path = directory / ("held_out" if is_held_out(name) else "training") / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")


def modules(bundle: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the modules of a bundle: functions of which each follows a comment that names it."""
    _, *parts = re.split(r"^/\* (\S+\.js) \*/ function _\(.*\{\n", bundle, flags=re.MULTILINE)
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        text = textwrap.dedent(body.rsplit("\n},", 1)[0]) + "\n"
        if len(text) >= SHORTEST and max(map(len, text.splitlines())) <= LONGEST_LINE:
            yield name, text


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def finetune(code: Path, out: Path, minutes: float, threads: int) -> None:
    """LoRA on the bundled target, in a process of its own."""
    run([sys.executable, str(Path(__file__).with_name("finetune.py")), "--target", str(bundled_directory() / "target"),
         "--data", str(code / "training"), "--held-out", str(code / "held_out"), "--out", str(out),
         "--minutes", str(minutes), "--threads", str(threads)])  # fmt: skip


def adapt_command(code: Path, target: Path, out: Path, minutes: float, threads: int) -> list[str]:
    """`gemma-mtp train` from the bundled drafter, on the text that the target was fine-tuned on."""
    return [sys.executable, "-m", "gemma_mtp", "train", "--target", str(target),
            "--drafter", str(bundled_directory() / "drafter"), "--out", str(out),
            "--data", str(code / "training"), "--pattern", "*.js", "--as-is",
            "--held-out", str(code / "held_out"), "--minutes", f"{max(minutes - GATE_MINUTES, minutes / 2):g}",
            "--threads", str(threads), *(["--resume"] if out.exists() else [])]  # fmt: skip


def measure(target: Path, drafter: Path, held_out: Path) -> Reports:
    """Acceptance on the beginnings of held-out files, at each temperature."""
    pair = load_pair(target, drafter)
    prompts = prompts_of(pair, read_examples(held_out, "*.js"), PROMPT_TOKENS)[:PROMPTS]
    return {
        t: measure_acceptance(pair, prompts, DRAFT_TOKENS, replace(GREEDY, temperature=t, max_tokens=MAX_TOKENS))
        for t in TEMPERATURES
    }


def won_back(before: float, tuned: float, adapted: float) -> float | None:
    """The share of the acceptance length lost by fine-tuning that adapting won back; None where hardly any was lost."""
    return (adapted - tuned) / (before - tuned) if before - tuned >= LEAST_LOSS else None


def summary(measured: Mapping[str, Reports], seconds: Mapping[str, float]) -> dict[str, object]:
    """All figures, for results.json."""
    by_temperature = {}
    for t in TEMPERATURES:
        lengths = {name: reports[t].pooled.mean_length for name, reports in measured.items()}
        gain: Comparison = compare(measured[TUNED][t], measured[ADAPTED][t])
        by_temperature[f"{t:g}"] = {
            "mean_acceptance_length": lengths,
            "won_back": won_back(lengths[BEFORE], lengths[TUNED], lengths[ADAPTED]),
            "adapted_against_old": {"difference": gain.difference, "low": gain.low, "high": gain.high},
            "acceptance": {name: reports[t].pooled.to_dict() for name, reports in measured.items()},
        }
    return {"draft_tokens": DRAFT_TOKENS, "seconds": dict(seconds), "by_temperature": by_temperature}


def print_summary(measured: Mapping[str, Reports]) -> None:
    print(f"\nmean acceptance length, K = {DRAFT_TOKENS}, {len(measured[BEFORE][0.0].prompts)} held-out files")
    print(f"{'':30}" + "".join(f"{'greedy' if t == 0 else f'temperature {t:g}':>16}" for t in TEMPERATURES))
    for name, reports in measured.items():
        print(f"{name:30}" + "".join(f"{reports[t].pooled.mean_length:16.3f}" for t in TEMPERATURES))
    shares = [won_back(*(reports[t].pooled.mean_length for reports in measured.values())) for t in TEMPERATURES]
    shown = ["little lost" if share is None else f"{share:.0%}" for share in shares]
    print(f"{'won back of what was lost':30}" + "".join(f"{share:>16}" for share in shown))


def run(command: Sequence[str]) -> None:
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(f"stopped: {' '.join(command[1:4])} ended with {code}; its own message is above.")


def timed(seconds: dict[str, float], name: str, result: Path, stage: object) -> None:
    """Run a stage unless its result is there, and keep its wall time beside it."""
    record = result.with_name(f"{result.name}.seconds")
    if not record.exists():
        start = time.monotonic()
        stage()  # type: ignore[operator]
        record.write_text(f"{time.monotonic() - start:.1f}\n", encoding="utf-8")
    seconds[name] = float(record.read_text(encoding="utf-8"))


def main(args: argparse.Namespace) -> None:
    code, target, drafter = (args.work / name for name in ("code", "target", "drafter"))
    bundled, held_out = bundled_directory(), code / "held_out"
    args.work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    timed(seconds, "fetching", code, lambda: fetch_code(code))
    timed(seconds, "fine-tuning", target,
          lambda: finetune(code, target, args.minutes_finetune, args.threads))  # fmt: skip
    command = adapt_command(code, target, drafter, args.minutes, args.threads)
    timed(seconds, "adapting", drafter, lambda: run(command))
    measured = {
        BEFORE: measure(bundled / "target", bundled / "drafter", held_out),
        TUNED: measure(target, bundled / "drafter", held_out),
        ADAPTED: measure(target, drafter, held_out),
    }
    (args.work / "results.json").write_text(json.dumps(summary(measured, seconds), indent=2) + "\n", encoding="utf-8")
    from gemma_mtp.backend.processor import processor

    made = measured_on("fine-tuned bundled target", processor(choose_device("auto")))
    for t, name in zip(TEMPERATURES, ("greedy", "sampled"), strict=True):
        plot_acceptance({label: reports[t] for label, reports in measured.items()}, args.work / f"{name}.png",
                        title=f"Acceptance, {'greedy' if t == 0 else f'temperature {t:g}'}",
                        subtitle=made)  # fmt: skip
    print_summary(measured)
    print("wall minutes: " + ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items()))
    print(f"wrote results.json, greedy.png and sampled.png to {args.work}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15, help="wall time of adapting, the gate included")
    parser.add_argument("--minutes-finetune", type=float, default=7, help="wall time of fine-tuning")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 2))
    parser.add_argument("--work", type=Path, default=Path("build/adapt"), help="where everything goes")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
