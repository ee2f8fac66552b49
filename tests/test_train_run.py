"""`gemma-mtp train` from end to end on a tiny pair: what it writes, refuses, resumes and says."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml
from models import TINY, agreeing_pair, letters, random_drafter, save_pair
from safetensors.torch import load_file

from gemma_mtp import load_pair
from gemma_mtp.cli import main
from gemma_mtp.files.replace import claimed
from gemma_mtp.training.drafter_trainer import DrafterTrainer
from gemma_mtp.training.run import STATE
from gemma_mtp.training.state import load_facts

Train = Callable[..., int]


def test_every_part_of_a_run_shows_how_far_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gemma_mtp.progress.LINE_SECONDS", 0.0)
    assert (
        train(tiny, tmp_path, "--drafter", tiny / "drafter", "--steps", 1, "--lr", 1e-9, "--held-out-prompts", 5) == 0
    )
    shown = capfd.readouterr().err.splitlines()
    for name in ("measuring the start", "measuring what was trained"):
        assert f"{name} 100% prompt 10 of 10" in shown
    for name in ("timing the start", "timing what was trained"):
        assert [line for line in shown if line.startswith(name)][-4:] == [
            f"{name} {i / 4:.0%} prompt {i} of 4" for i in range(1, 5)
        ]
    assert any(re.fullmatch(r"loading the target 100% .* [kM]B", line) for line in shown)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with target, drafter and data: 30 documents of letters."""
    root = tmp_path_factory.mktemp("tiny")
    target, drafter = agreeing_pair()
    save_pair(root, target, drafter)
    letters(root / "target")
    random.seed(0)
    texts = ["".join(chr(ord("A") + random.randrange(58)) for _ in range(60)) for _ in range(30)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def arguments(tiny: Path, out: Path, *more: object) -> list[str]:
    fixed = ["train", "--target", tiny / "target", "--data", tiny / "data.jsonl", "--out", out, "--length", 48,
             "--written-tokens", 600, "--gate-tokens", 24, "--dtype", "float32", "--draft-steps", 3, "--batch", 4,
             "--cache", tiny / "cache"]  # fmt: skip
    return [str(argument) for argument in (*fixed, *more)]


def train(tiny: Path, out: Path, *more: object) -> int:
    return main(arguments(tiny, out, *more))


def test_a_new_drafter_is_trained_measured_and_exported(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    code = train(tiny, tmp_path, "--new", "--hidden", 16, "--heads", 4, "--steps", 30, "--lr", 0.02, "--gate-steps", 15)
    shown = capfd.readouterr()
    assert code == 0, shown.err
    gate = json.loads((tmp_path / "training" / "gate.json").read_text())
    assert gate["exported"] and gate["overall"]["difference"] > 0.1
    pair = load_pair(tiny / "target", tmp_path)
    result = pair.generate(list(range(3, 12)), draft_tokens=4)
    assert result.token_ids == pair.generate(list(range(3, 12)), draft_tokens=0).token_ids and result.accepted > 0
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert f"{gate['now'][0]['mean_acceptance_length']:.3f}" in card and "from scratch" in card
    rows = list(csv.DictReader((tmp_path / "training" / "drafter.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert "blocks of up to 4 x 64 tokens: target" in shown.err and "start: mean acceptance length" in shown.err
    assert "speed-up over plain decoding" in shown.out and f"wrote {tmp_path}" in " ".join(shown.out.split())
    assert not list(tmp_path.rglob("*.partial"))
    (tmp_path / "made").touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"model.safetensors", "config.json", "MODEL_CARD.md", "drafter.csv"}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "made").stat().st_mode}  # as the umask has it


@pytest.mark.parametrize("force", [False, True])
def test_nothing_worse_is_exported(tiny: Path, tmp_path: Path, force: bool, capfd) -> None:  # type: ignore[no-untyped-def]
    """Gate 4: steps that ruin the drafter are refused with exit code 3, unless forced. The run above is the control:
    what is better is exported."""
    ruin = ["--drafter", tiny / "drafter", "--steps", 3, "--lr", 3.0, "--warmup", 0.0]
    code = train(tiny, tmp_path, *ruin, *(["--force"] if force else []))
    shown = capfd.readouterr()
    assert code == (0 if force else 3), shown.err
    gate = json.loads((tmp_path / "training" / "gate.json").read_text())
    assert not gate["not_worse"] and gate["exported"] == force
    assert (tmp_path / "model.safetensors").exists() == (tmp_path / "config.json").exists() == force
    assert ("not exported" in shown.out) == (not force)


def test_written_text_is_kept_and_taken_up_again(tiny: Path, tmp_path: Path) -> None:
    options = ["--drafter", tiny / "drafter", "--steps", 1, "--lr", 1e-5, "--force", "--cache", tmp_path / "cache"]
    train(tiny, tmp_path / "a", *options)
    (store,) = (tmp_path / "cache").iterdir()
    first = store.read_text()
    with store.open("a") as file:
        file.write('{"key": "cut off by a ki')
    train(tiny, tmp_path / "b", *options)
    assert store.read_text().startswith(first)
    assert len(store.read_text().splitlines()) == len(first.splitlines()) + 1  # nothing was written anew
    one, other = (load_file(tmp_path / name / "training" / "examples.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_temperature_given_twice_is_measured_once(tiny: Path, tmp_path: Path) -> None:
    options = ["--drafter", tiny / "drafter", "--steps", 1, "--lr", 1e-5, "--force"]
    train(tiny, tmp_path, *options, "--temperature", 0, "--temperature", 1, "--temperature", 1)
    gate = json.loads((tmp_path / "training" / "gate.json").read_text())
    assert [entry["temperature"] for entry in gate["at_temperature"]] == [0.0, 1.0]
    written = load_file(tmp_path / "training" / "examples.safetensors")["temperatures"]
    assert (written == 1).sum() > 1.5 * (written == 0).sum()


PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


def run_process(tiny: Path, out: Path, *more: object, launcher: list[str]) -> subprocess.Popen[str]:
    command = [*launcher, *arguments(tiny, out, *more)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


#: runs the command once for each number, in a process that kills itself so many calls of the trainer's functions after
#: its first checkpoint, or not at all where the number is negative; says how each ended. They are forked where
#: all is imported, and nothing has run
MORTALS = """
import os, signal, sys
import gemma_mtp.training.run, torch._dynamo
from test_train_run import calls_of_the_trainer
from gemma_mtp.cli import main
from gemma_mtp.engine import costs
costs.BUDGET_SECONDS = 0.05
for left in map(int, sys.argv[1].split()):
    child = os.fork()
    if not child:
        kept = []
        def at(number, what):
            if what == "return of DrafterTrainer.save":
                kept.append(number)
            if kept and number - kept[0] == left:
                os.kill(os.getpid(), signal.SIGKILL)
        with calls_of_the_trainer(at):
            code = main(sys.argv[2:])
        sys.exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@contextmanager
def calls_of_the_trainer(at: Callable[[int, str], object]) -> Iterator[None]:
    """`at` is told of each call of a function in gemma_mtp.training, and where one returns: the number, and which."""
    numbers = itertools.count()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "return") and "/gemma_mtp/training/" in frame.f_code.co_filename:
            at(next(numbers), f"{event} of {frame.f_code.co_qualname}")

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_a_killed_run_resumes_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL at a random call after the first checkpoint, and after the one that the second run keeps; the weights are
    those of an unbroken run."""
    options = ["--drafter", tiny / "drafter", "--steps", 6, "--lr", 3e-3, "--checkpoint-steps", 2, "--gate-steps", 4,
               "--force", "--resume", "--threads", 1, "--held-out-prompts", 2]  # fmt: skip
    calls: list[str] = []
    with calls_of_the_trainer(lambda _, what: calls.append(what)):
        assert train(tiny, tmp_path / "whole", *options) == 0
    kept = [number for number, what in enumerate(calls) if what == "return of DrafterTrainer.save"]
    chooser = random.Random(1)
    gaps = [after - before for before, after in itertools.pairwise(kept[:3])]  # between steps 2, 4 and 6
    numbers = " ".join(str(chooser.randrange(gap)) for gap in gaps)
    process = run_process(tiny, broken := tmp_path / "broken", *options,
                          launcher=[*PYTHON, "-c", MORTALS, f"{numbers} -1"])  # fmt: skip
    output, _ = process.communicate()
    assert re.findall(r"^-?\d+$", output, re.MULTILINE) == ["-9", "-9", "0"], output
    assert output.count("beginning anew") == 1, output
    for name in ("model.safetensors", "training/drafter.csv"):
        assert _without_speed(tmp_path / "whole" / name) == _without_speed(broken / name)


def _without_speed(path: Path) -> object:
    if path.suffix != ".csv":
        return path.read_bytes()
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(path.open())]


#: the command, and whether threads of its group's are there while sums are made, and when it has ended. Where torchrun
#: did not start it, it forks into two processes of torchrun's environment where all is imported, and nothing has run
WATCHED = """
import os, socket, sys
import gemma_mtp.training.run, torch._dynamo, torch.distributed.nn
from gemma_mtp.cli import main
from gemma_mtp.training.parallel import World

def gloo():
    tasks = os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else []
    return sum("gloo" in open(f"/proc/self/task/{task}/comm").read() for task in tasks)

def sum_(world, tensors, own=World.sum_):
    own(world, tensors)
    within.append(gloo())

if "RANK" not in os.environ:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    children = []
    for rank in "01":
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank)
        child = os.fork()
        if not child:
            break
        children.append(child)
    else:
        sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
within = []
World.sum_ = sum_
code = main(sys.argv[1:])
# at once: the other process writes to the same place
os.write(1, f"\\nthreads of the group, within: {min(within) > 0}, after: {gloo()}\\n".encode())
sys.exit(code)
"""


@pytest.mark.parametrize("launcher", [PYTHON, pytest.param(TORCHRUN, marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(tiny: Path, tmp_path: Path, launcher: list[str]) -> None:
    """And no thread of their group outlives it: one that still let go of a message while Python ended has aborted a
    process that had done its work."""
    options = ["--drafter", tiny / "drafter", "--steps", 3, "--lr", 3e-3, "--force", "--batch", 6, "--threads", 1]
    assert train(tiny, tmp_path / "one", *options) == 0
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    process = run_process(tiny, tmp_path / "two", *options, launcher=[*launcher, str(script)])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    if Path("/proc/self/task").exists():
        assert re.findall("threads of the group, .*", output) == ["threads of the group, within: True, after: 0"] * 2
    one, two = (load_file(tmp_path / n / "training" / "checkpoint.safetensors") for n in ("one", "two"))
    start = load_file(tiny / "drafter" / "model.safetensors")
    moved = (one["masters.pre_projection.weight"] - start["pre_projection.weight"]).abs().max()
    assert moved > 1e-3
    for name in (n for n in one if n.startswith("masters.")):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)


def test_a_run_of_other_settings_is_not_resumed(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    options = ["--drafter", tiny / "drafter", "--steps", 2, "--lr", 1e-5, "--force"]
    assert train(tiny, tmp_path, *options, "--resume") == 0
    assert "holds no checkpoint to go on from: beginning anew" in capfd.readouterr().err
    assert train(tiny, tmp_path, *options) == 2
    assert "go on with it by --resume" in capfd.readouterr().err
    for other, told in ((["--loss", "kl"], "--loss was lk and is now kl"), (["--memory", 999], "--memory was 2048 and"),
                        (["--length", 64], "--length was"), (["--temperature", 0.5], "--temperature was")):  # fmt: skip
        assert train(tiny, tmp_path, *options, *other, "--resume") == 2
        assert f"with other settings: {told}" in capfd.readouterr().err


def test_a_centroid_head_is_made_and_kept_when_adapting(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    options = ["--new", "--hidden", 16, "--heads", 4, "--centroids", 61, "--centroid-top-k", 20, "--steps", 20,
               "--lr", 0.02]  # fmt: skip
    assert train(tiny, tmp_path / "new", *options) == 0, capfd.readouterr().err
    assert "the best 20 of 61 clusters hold the drafter's likeliest token in" in capfd.readouterr().err
    stored = load_file(tmp_path / "new" / "model.safetensors")
    ordering = stored["masked_embedding.token_ordering"]
    assert ordering.dtype == torch.int64 and sorted(ordering.tolist()) == list(range(61))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["use_ordered_embeddings"]
    adapt = ["--drafter", tmp_path / "new", "--steps", 3, "--lr", 1e-4, "--force"]
    assert train(tiny, tmp_path / "adapted", *adapt) == 0
    again = load_file(tmp_path / "adapted" / "model.safetensors")
    assert torch.equal(again["masked_embedding.token_ordering"], ordering)
    gate = json.loads((tmp_path / "adapted" / "training" / "gate.json").read_text())
    assert gate["centroid_recall"]["top_token"] > 20 / 61
    pair = load_pair(tiny / "target", tmp_path / "adapted")
    assert pair.generate(list(range(3, 12)), draft_tokens=4).drafted > 0


def test_stored_rows_of_the_target_change_nothing(tiny: Path, tmp_path: Path) -> None:
    options = ["--drafter", tiny / "drafter", "--epochs", 2, "--lr", 3e-3, "--force", "--threads", 1]
    assert train(tiny, tmp_path / "a", *options) == train(tiny, tmp_path / "b", *options, "--store-target") == 0
    assert list((tmp_path / "b" / "training" / "target-rows").rglob("*.safetensors"))
    one, other = (load_file(tmp_path / name / "training" / "checkpoint.safetensors") for name in "ab")
    for name in (n for n in one if n.startswith("masters.")):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_early_stop_keeps_the_best(tiny: Path, tmp_path: Path) -> None:
    """A run that gets worse stops after two measurements without gain, and what is exported is what was best."""
    options = ["--drafter", tiny / "drafter", "--steps", 40, "--lr", 1.0, "--gate-steps", 2, "--patience", 2, "--force",
               "--warmup", 1.0]  # fmt: skip
    assert train(tiny, tmp_path, *options) == 0
    training = json.loads((tmp_path / "training" / "gate.json").read_text())["training"]
    assert training["steps"] == training["best_step"] + 4 < 40
    rows = list(csv.DictReader((tmp_path / "training" / "drafter.csv").open()))
    assert int(rows[-1]["step"]) == training["steps"]


def test_tensorboard_has_the_csvs_figures(tiny: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    assert train(tiny, tmp_path, "--drafter", tiny / "drafter", "--steps", 3, "--tensorboard", "--force") == 0
    events = EventAccumulator(str(tmp_path / "training" / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "training" / "drafter.csv").open()))
    shown = [event.value for event in events.Scalars("drafter/loss")]
    assert shown == pytest.approx([float(row["loss"]) for row in rows], rel=1e-4)


# --- what can not work says so in a sentence, and leaves nothing behind


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "bad.jsonl is empty"),
        ('{"text": "ABC"}\n{"text": \n', "bad.jsonl:2 is not valid JSON"),
        ('{"text": "ABC"}\n{"prompt": "' + "A" * 60 + '"}\n', "bad.jsonl:2 has 60 tokens before the model's turn"),
        ('{"words": "ABC"}\n', "bad.jsonl:1 must have exactly one of"),
        ('{"text": "ABCDEF"}\n', "give at least 10"),
    ],
)
@pytest.mark.parametrize(
    "start", [lambda tiny: ["--drafter", tiny / "drafter"], lambda tiny: ["--new"]], ids=["adapt", "new"]
)
def test_bad_data_is_named_by_file_and_line(
    tiny: Path,
    tmp_path: Path,
    start: Callable[[Path], list[object]],
    content: str,
    says: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    command = arguments(tiny, tmp_path / "out", *start(tiny), "--steps", 1)
    command[command.index("--data") + 1] = str(file)
    code, shown = main(command), capfd.readouterr().err
    assert code == 2 and says in shown
    assert not (tmp_path / "out").exists()


def test_tokens_outside_the_vocabulary_are_named(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    import shutil

    shutil.copytree(tiny / "target", tmp_path / "target")
    tokenizer = json.loads((tmp_path / "target" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["A"] = 99
    (tmp_path / "target" / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = arguments(tiny, tmp_path / "out", "--drafter", tiny / "drafter", "--steps", 1)
    command[command.index("--target") + 1] = str(tmp_path / "target")
    assert main(command) == 2
    shown = capfd.readouterr().err
    assert "data.jsonl:" in shown and "token id 99" in shown and "60" in shown


def test_a_drafter_that_does_not_fit_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    import dataclasses

    from gemma_mtp.checkpoint import save_drafter

    other = random_drafter(dataclasses.replace(TINY, hidden_size=24))
    save_drafter(other, other.config, tmp_path / "other")
    assert train(tiny, tmp_path / "out", "--drafter", tmp_path / "other", "--steps", 1) == 2
    assert "does not fit the target: backbone_hidden_size" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_can_not_be_written_is_named(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("in the way")
    assert train(tiny, tmp_path / "file" / "out", "--drafter", tiny / "drafter", "--steps", 1) == 2
    shown = capfd.readouterr().err
    assert "can not be written" in shown and "file" in shown


def test_two_runs_do_not_write_to_one_place(tiny: Path, tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    with claimed(out, out / STATE / "lock"):
        assert train(tiny, out, "--drafter", tiny / "drafter", "--steps", 1) == 2
    assert "another run is writing" in capfd.readouterr().err
    assert not out.exists()


def test_a_full_disk_says_so_and_leaves_no_half_file(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for a full disk: the checkpoint does not fit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = train(tiny, tmp_path, "--drafter", tiny / "drafter", "--steps", 3, "--checkpoint-steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, "checkpoint.safetensors can not be written" in capfd.readouterr().err) == (2, True)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("checkpoint.safetensors"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", 1], "either --drafter"),
        (["--new", "--loss", "l2"], "--loss is 'l2'"),
        (["--new", "--steps", 1, "--epochs", 1], "exclude each other"),
        (["--new", "--patience", 1], "--gate-steps"),
        (["--new", "--steps", 1, "--memory", 1], "more than --memory 1 allows"),
        (["--new", "--steps", 1, "--length", 8], "--length is 8, but must be from 16 to 4096"),
        (["--new", "--steps", 0], "--steps is 0, but must be 1 or more"),
        (["--new", "--batch", 0], "--batch is 0"),
        (["--new", "--hidden", 0], "--hidden is 0"),
        (["--new", "--layers", 0], "--layers is 0"),
        (["--new", "--lr", -1], "--lr is -1.0, but must be a number above 0"),
        (["--new", "--minutes", "nan"], "--minutes is nan"),
        (["--new", "--own-tokens", 1.5], "--own-tokens is 1.5, but must be from 0 to 1"),
        (["--new", "--draft-steps", 0], "--draft-steps is 0"),
        (["--new", "--draft-tokens", 0], "--draft-tokens is 0"),
        (["--new", "--gate-tokens", 5], "--gate-tokens is 5, but must be 6 or more"),
        (["--new", "--gate-steps", 0], "--gate-steps is 0"),
        (["--new", "--checkpoint-steps", 0], "--checkpoint-steps is 0"),
        (["--new", "--held-out-prompts", 1], "--held-out-prompts is 1, but must be 2 or more"),
        (["--new", "--top-p", 3], "top_p is 3.0"),
        (["--new", "-t", -1], "temperature is -1.0"),
        (["--new", "--steps", 1, "--dtype", "int8"], "--dtype is 'int8'"),
    ],
)
def test_options_that_can_not_work_are_refused(
    tiny: Path, tmp_path: Path, options: list[object], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny, tmp_path / "out", *options) == 2
    assert says in " ".join(capfd.readouterr().err.split())
    assert "--memory" in options or not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_step_and_says_how_to_go_on(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--drafter", tiny / "drafter", "--steps", 4, "--lr", 1e-5, "--force"]
    assert train(tiny, tmp_path / "whole", *options) == 0
    real = DrafterTrainer._one_step

    def interrupt(self: DrafterTrainer, *given: Any) -> dict[str, float]:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *given)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(DrafterTrainer, "_one_step", interrupt)
        assert train(tiny, tmp_path / "cut", *options) == 130
    err = capfd.readouterr().err
    assert "go on by the same command with --resume" in err and "Traceback" not in err
    assert load_facts(tmp_path / "cut" / "training" / "checkpoint.safetensors")["step"] == 3
    assert train(tiny, tmp_path / "cut", *options, "--resume") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    head = (tmp_path / "cut" / "MODEL_CARD.md").read_text().split("---\n")[1]
    assert yaml.safe_load(head) == {
        "license": "other", "base_model": "target", "library_name": "gemma-mtp",
        "tags": ["speculative-decoding", "multi-token-prediction", "gemma4"],
    }  # fmt: skip
    card = (tmp_path / "cut" / "MODEL_CARD.md").read_text()
    assert not re.search(r"[{}]|\bTrue\b|\bFalse\b|\bNone\b|torch\.|PosixPath", card)
    words = re.sub(r"[\d.,]+|\W\w*=\w+", "", card)
    assert not re.search(r"\b(\w+)[^\w\n|]*\n?[^\w\n|]*\b\1\b", words), "no word twice in a row"
    assert "\n- pattern: `*`\n" in card and "memory" not in card
