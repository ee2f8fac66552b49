"""The command line: what it prints, its exit codes, and one sentence for every kind of bad input."""

import io
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import VOCAB, agreeing_pair, letters, random_drafter, random_target, save_pair
from rich.console import Console

import gemma_mtp
from gemma_mtp.cli import main, render
from gemma_mtp.cli.generate import PromptOptions
from gemma_mtp.cli.generate_run import NOT_WHOLE
from gemma_mtp.cli.score import TextOptions
from gemma_mtp.cpu_clock import CpuClock
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine import round as rounds
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.engine.result import GenerationResult, RoundStats
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target

PROMPT = "def add(a, b):\n    return"
IDS = ["--token-ids", "9 8 7"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}model:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair without tokenizer, and beside it: one that does not fit, and damaged ones."""
    root = tmp_path_factory.mktemp("tiny")
    save_pair(root, *agreeing_pair(3))
    return root


def models(root: Path) -> list[str]:
    return ["--target", str(root / "target"), "--drafter", str(root / "drafter")]


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["generate", "--json", *arguments]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line on stderr of a command that must exit with 2 and print nothing."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.rstrip().endswith(".")
    return err


@pytest.mark.parametrize("output", [[], ["--json"], ["--compare"]])
def test_a_constrained_output_that_the_limit_cut_exits_with_four(
    output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is whole already is not cut, though more could follow."""
    for regex, code in (("[0-9]{300}", NOT_WHOLE), ("[0-9]{1,300}", 0), ("[0-9]{2}", 0)):
        assert main(["generate", PROMPT, "--regex", regex, "-n", "8", "-k", "2", *output]) == code
        out, err = capsys.readouterr()
        said = "the output is not whole: the length limit (length) cut it; raise --max-tokens.\n"
        assert out and (said in err) == (code == NOT_WHOLE)


def test_json_of_the_bundled_pair(capsys: pytest.CaptureFixture[str]) -> None:
    content = generate(capsys, PROMPT, "--max-tokens", "24", "--ignore-eos", "--draft-tokens", "4")
    assert list(content) == [
        "prompt_token_ids", "token_ids", "text", "finish_reason", "draft_tokens", "verification", "rounds",
        "rounds_by_drafts", "drafted", "accepted", "accepted_by_position", "mean_acceptance_length", "prefill_seconds",
        "decode_seconds", "tokens_per_second",
    ]  # fmt: skip
    pair = load_pair()
    assert content["prompt_token_ids"] == pair.encode(PROMPT)
    assert content["token_ids"] == pair.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True)).token_ids
    assert pair.tokenizer is not None
    assert content["text"] == pair.tokenizer.decode(content["token_ids"])
    assert content["draft_tokens"] == 4
    assert content["finish_reason"] == "length"
    assert 23 == content["rounds"] + content["accepted"]
    assert sum(content["rounds_by_drafts"].values()) == content["rounds"]
    assert sum(int(k) * rounds for k, rounds in content["rounds_by_drafts"].items()) == content["drafted"]
    assert content["tokens_per_second"] == pytest.approx(23 / content["decode_seconds"])


def test_text_is_streamed_and_the_summary_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(capsys, PROMPT, "--max-tokens", "16")["text"]
    assert main(["generate", PROMPT, "--max-tokens", "16"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    ended = r"\d+ tokens, ended by the length limit \(length\), prefill .*"
    assert re.match(rf"{ended} (no drafts|rounds of auto drafts)", err)
    assert main(["generate", PROMPT, "--max-tokens", "16", "-k", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert re.match(rf"{ended} \d+ rounds of 4 drafts", err)
    assert main(["generate", PROMPT, "--max-tokens", "16", "--quiet", "--no-drafter"]) == 0
    assert capsys.readouterr() == (text + "\n", "")


def test_module_reads_the_prompt_from_stdin_as_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.py"
    file.write_text(PROMPT, encoding="utf-8")
    command = [sys.executable, "-m", "gemma_mtp", "generate", "-n", "12", "-q"]
    ran = subprocess.run(command, input=PROMPT, capture_output=True, text=True, timeout=300, check=True)
    assert ran.stderr == ""
    assert main(["generate", "--file", str(file), "-n", "12", "-q"]) == 0
    assert capsys.readouterr().out == ran.stdout


def test_module_exits_with_2_and_one_sentence() -> None:
    command = [sys.executable, "-m", "gemma_mtp", "generate", "x", "--top-p", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert re.fullmatch(r"error: top_p is 0\.0.*\.\n", ran.stderr)


def test_raw_ids_without_a_tokenizer(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = generate(capsys, *IDS, *models(tiny), "-n", "20", "-k", "4")
    assert content["prompt_token_ids"] == [9, 8, 7]
    assert content["text"] is None
    assert content["accepted"] > 0
    assert main(["generate", *IDS, *models(tiny), "-n", "20", "-q"]) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in content["token_ids"]]


def test_every_sampling_option_reaches_the_engine(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[SamplingParams, int, str]] = []
    real = Pair.generate

    def record(self: Pair, prompt: Any, params: SamplingParams, *, draft_tokens: int, verification: Any) -> Any:
        seen.append((params, draft_tokens, verification))
        return real(self, prompt, params, draft_tokens=draft_tokens, verification=verification)

    monkeypatch.setattr(Pair, "generate", record)
    options = (
        "--temperature 0.7 --top-k 20 --top-p 0.9 --min-p 0.02 --repetition-penalty 1.1 --presence-penalty 0.2"
        " --frequency-penalty 0.3 --logit-bias 5:-1.5 --logit-bias 6:-inf --seed 11 --stop-token-id 40 --ignore-eos"
        " --logprobs 2 --max-tokens 9 --draft-tokens 3 --verification block"
    ).split()
    content = generate(capsys, *IDS, *models(tiny), *options)
    assert seen == [(
        SamplingParams(
            temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1, presence_penalty=0.2,
            frequency_penalty=0.3, logit_bias={5: -1.5, 6: float("-inf")}, seed=11, stop_token_ids=(40,),
            ignore_eos=True, logprobs=2, max_tokens=9,
        ), 3, "block",
    )]  # fmt: skip
    assert len(content["logprobs"]) == len(content["token_ids"])
    assert all(len(entry["top"]) == 2 for entry in content["logprobs"])


def test_chat_uses_the_template_and_the_checkpoints_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, *agreeing_pair(3))
    tokenizer = letters(tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    settings = {"temperature": 1.5, "top_k": 7, "top_p": 0.8, "suppress_tokens": [9, 8]}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    seen: list[tuple[str | list[int], SamplingParams]] = []
    real = Pair.generate

    def record(self: Pair, prompt: Any, params: SamplingParams, **rest: Any) -> Any:
        seen.append((prompt, params))
        return real(self, [3], params, **rest)

    monkeypatch.setattr(Pair, "generate", record)
    generate(capsys, "HI", "--chat", "--system", "BE", *models(tmp_path), "-n", "4", "--top-k", "3")
    generate(capsys, "HI", *models(tmp_path), "-n", "4")
    (chat, defaults), (plain, greedy) = seen
    assert (chat, plain) == (tokenizer.encode("system:BE;user:HI;model:", special=False), "HI")
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1.5, 3, 0.8)
    assert defaults.logit_bias == {9: float("-inf"), 8: float("-inf")}
    assert greedy.logit_bias == {}
    assert (greedy.temperature, greedy.top_k, greedy.top_p) == (0.0, 0, 1.0)


def test_compare(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = generate(capsys, *IDS, *models(tiny), "--compare", "--repeats", "2", "-n", "30", "-k", "4")
    assert content["identical"] is True
    assert content["ratio"] == pytest.approx(content["drafted_tokens_per_second"] / content["plain_tokens_per_second"])
    assert content["plain"]["token_ids"] == content["drafted"]["token_ids"]
    assert (content["plain"]["draft_tokens"], content["drafted"]["draft_tokens"]) == (0, 4)
    assert main(["generate", *IDS, *models(tiny), "--compare", "--repeats", "1", "-n", "30"]) == 0
    assert "identical output: yes" in capsys.readouterr().out


@pytest.mark.parametrize("share", [None, 0.05, 0.62])
def test_speeds_of_a_busy_machine_are_said_to_be(
    share: float | None, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuClock, "share_elsewhere", lambda clock: share)
    asked = ["generate", *IDS, *models(tiny), "--compare", "--repeats", "1", "-n", "5"]
    assert main(asked) == 0
    assert ("other work took 62% of the processor" in capsys.readouterr().out) == (share == 0.62)
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["share_elsewhere"] == share


def test_compare_sees_a_verification_that_accepts_everything(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "agreeing", lambda choices, drafts: len(drafts))
    assert main(["generate", *IDS, *models(tiny), "--compare", "--repeats", "1", "-n", "30", "-t", "1", "-k", "4"]) == 1
    assert "identical output: NO" in capsys.readouterr().out


def test_show_drafts_marks_every_token(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = generate(capsys, *IDS, *models(tiny), "-n", "30", "-k", "4")
    assert main(["generate", *IDS, *models(tiny), "-n", "30", "-k", "4", "--show-drafts", "-q"]) == 0
    shown, legend = capsys.readouterr().out.split("\n\n")
    assert re.sub(r"[\[\]{}]", "", shown).split() == [str(i) for i in content["token_ids"]]
    counts = {name: int(count) for name, count in re.findall(r"^\W*(\w+)\W+(\d+)  ", legend, re.MULTILINE)}
    assert counts["first"] == 1
    assert counts["accepted"] == content["accepted"]
    assert counts["corrected"] == shown.count("[")
    assert counts["bonus"] == shown.count("{")
    assert counts["corrected"] + counts["bonus"] == content["rounds"]


def test_every_token_has_its_kind() -> None:
    result = GenerationResult([1], 3, "exact")
    result.rounds = [
        RoundStats(0, 0, 1),  # prefill
        RoundStats(3, 3, 4),  # all accepted, and a bonus
        RoundStats(3, 1, 2),  # the second draft refused
        RoundStats(0, 0, 1),  # nothing drafted
        RoundStats(3, 2, 2),  # cut by a stop condition on an accepted draft
    ]
    kinds = ["first", *["accepted"] * 3, "bonus", "accepted", "corrected", "corrected", "accepted", "accepted"]
    assert list(render.shown_kinds(result)) == kinds


def test_drafts_are_coloured_on_a_terminal(tiny: Path) -> None:
    pair = load_pair(tiny / "target", tiny / "drafter")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard")
    render.print_drafts(console, pair.generate([9, 8, 7], SamplingParams(max_tokens=30), draft_tokens=4), None)
    for code in ("\x1b[32m", "\x1b[1;31m", "\x1b[1;36m"):
        assert code in stream.getvalue()
    assert "[corrected]" not in stream.getvalue()


@pytest.mark.parametrize(
    ("prompt", "coloured", "expected"),
    [("def [bold]f():\n", True, "\x1b[2mdef [bold]f():\x1b[0m\n"), ("x", False, ""), ([9, 8], True, "")],
)
def test_the_prompt_is_echoed_dimly_on_a_terminal(prompt: str | list[int], coloured: bool, expected: str) -> None:
    stream = io.StringIO()
    render.print_prompt(
        Console(file=stream, force_terminal=coloured, color_system="standard" if coloured else None), prompt
    )
    assert stream.getvalue() == expected


def test_inspect(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directories = [str(tiny / "target"), str(tiny / "drafter")]
    assert main(["inspect", *directories]) == 0
    out = capsys.readouterr().out
    assert "pair: fits" in out
    assert main(["inspect", *directories, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pair"] == {"fits": True, "reason": None}
    models: tuple[Target | Drafter, ...] = agreeing_pair(3)
    for report, model in zip(content["checkpoints"], models, strict=True):
        assert report["parameters"] == sum(tensor.numel() for tensor in model.checkpoint_tensors().values())
    save_pair(tmp_path, random_target(), random_drafter(seed=2, centroids=True))
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    config["text_config"]["sliding_window"] = 9
    (tmp_path / "drafter" / "config.json").write_text(json.dumps(config))
    assert main(["inspect", directories[0], str(tmp_path / "drafter")]) == 1
    assert "sliding_window is 9 in the drafter, but 8 in the target" in capsys.readouterr().out
    assert "does not exist" in refused(capsys, ["inspect", str(tmp_path / "absent")])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == gemma_mtp.__version__ + "\n"
    for command in ([], ["generate"], ["inspect"]):
        assert main([*command, "--help"]) == 0
        assert "Usage:" in capsys.readouterr().out
    assert main(["generate", "--no-such-option"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--temperature", "-0.5"], "temperature is -0.5"),
        (["x", "--temperature", "nan"], "temperature is nan"),
        (["x", "--top-p", "0"], "top_p is 0.0"),
        (["x", "--top-k", "-1"], "top_k is -1"),
        (["x", "--min-p", "1.5"], "min_p is 1.5"),
        (["x", "--max-tokens", "0"], "max_tokens is 0"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["x", "--logit-bias", "five"], "--logit-bias is 'five'"),
        (["x", "--logit-bias", "99999:1"], "logit_bias has token id 99999"),
        (["x", "--draft-tokens", "many"], "--draft-tokens is 'many'"),
        (["x", "--draft-tokens", "-1"], "draft_tokens is -1"),
        (["x", "--verification", "loose"], "verification is 'loose'"),
        (["x", "--dtype", "int4"], "dtype 'int4' is not known"),
        (["x", "--device", "abacus"], "device 'abacus' is not known"),
        (["x", "--threads", "0"], "--threads is 0"),
        (["x", "--threads", "100000"], "--threads is 100000"),
        (["x", "--compare", "--repeats", "0"], "--repeats is 0"),
        (["x", "--json", "--show-drafts"], "--json and --show-drafts exclude each other"),
        (["x", "--stop", ""], "stop"),
        (["x", "--file", "y"], "the prompt was given twice (PROMPT and --file)"),
        (["--file", "/absent/prompt"], "the prompt file /absent/prompt can not be read"),
        (["--token-ids", "1 two"], "--token-ids is '1 two'"),
        (["--token-ids", "1 4096"], "token id 4096"),
        (["--token-ids", " "], "the prompt is empty"),
        (["--token-ids", "1", "--chat"], "--chat needs a text prompt"),
        (["x" * 9000], "but the target takes at most 2047"),
        (["x", "--no-drafter", "--compare"], "--compare needs a drafter"),
        (["x", "--no-drafter", "--drafter", "d"], "exclude each other"),
        (["x", "--target", "/absent"], "checkpoint /absent does not exist"),
        (["x", "--target", "/absent", "-t", "nan"], "temperature is nan"),  # before anything is loaded
        (["x", "--drafter", "/absent"], "checkpoint /absent does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, ["generate", *arguments])


def test_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle, a truncated file, a wrong shape, malformed JSON, an unknown model_type, a mismatched pair."""
    save_pair(tmp_path, *agreeing_pair(3))
    command = ["generate", *IDS, *models(tmp_path)]
    config, weights = tmp_path / "target" / "config.json", tmp_path / "target" / "model.safetensors"
    good, raw = json.loads(config.read_text()), weights.read_bytes()

    config.write_text(json.dumps({**good, "hidden_size": 40}))
    assert "hidden_size) is 32 in the drafter, but 40 in the target" in refused(capsys, command)
    config.write_text(json.dumps({**good, "intermediate_size": 40}))
    assert "mlp.gate_proj.weight of shape [48, 32], but config.json calls for [40, 32]" in refused(capsys, command)
    config.write_text(json.dumps({**good, "model_type": "llama"}))
    assert "model_type 'llama', which is not a Gemma 4 or Gemma 3 target" in refused(capsys, command)
    config.write_text('{"model_type": "gemma4_text",\n  oops}')
    assert "is not valid JSON: " in refused(capsys, command)
    config.write_text(json.dumps(good))
    weights.write_bytes(raw[:-100])
    assert "truncated or damaged" in refused(capsys, command)
    weights.unlink()
    (tmp_path / "target" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "holds pickled weights only (pytorch_model.bin)" in refused(capsys, command)


def test_text_needs_a_tokenizer(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no tokenizer.json" in refused(capsys, ["generate", "x", *models(tiny)])
    assert "--chat needs a tokenizer" in refused(capsys, ["generate", "x", "--chat", *models(tiny)])
    assert "stop strings need a tokenizer" in refused(capsys, ["generate", *IDS, "--stop", "x", *models(tiny)])
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    assert "is not UTF-8 text" in refused(capsys, ["generate", "--file", str(latin)])
    assert f"token id {VOCAB}" in refused(capsys, ["generate", "--token-ids", str(VOCAB), *models(tiny)])


def test_a_text_that_names_a_file_is_a_text_and_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("from a file")
    monkeypatch.chdir(tmp_path)
    ways: list[Callable[[str], object]] = [
        lambda text: PromptOptions(prompt=text).given, lambda text: TextOptions(text=text).given,
    ]  # fmt: skip
    for read in ways:
        assert read("prompt.txt") == "prompt.txt"
        assert "to read that file, give --file prompt.txt" in capsys.readouterr().err
        for text in ("absent.txt", "x" * 9000, "a\0b", "."):
            assert read(text) == text
        monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
        assert read("-") == "from a pipe"
    assert capsys.readouterr().err == ""
