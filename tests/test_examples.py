"""The worked example's own parts: splitting a bundle, LoRA to a checkpoint that decodes alike, the figures."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cli_docs
import pytest
import run
import torch
from transformers import Gemma4ForCausalLM

from gemma_mtp import SamplingParams
from gemma_mtp.engine.pair import bundled_directory, load_pair
from gemma_mtp.measure.acceptance import GREEDY, Acceptance, AcceptanceReport, PromptAcceptance

BODY = "\n".join(f"    const value_{i} = require({i});" for i in range(40))
BUNDLE = f"""(function() {{
/* models/a.js */ function _(require, module, exports, __esModule, __esExport) {{
{BODY}
}},
/* tiny.js */ function _(require, module, exports) {{
    short();
}},
/* table.js */ function _(require, module, exports) {{
    {"x" * 500}
}},
/* models/b.js */ function _(require, module, exports) {{
{BODY}
}},
}})
"""


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    """Imported where it is run: with peft it takes seconds, in every process that only looks for its tests, too."""
    return importlib.import_module("finetune")


def test_bundles_are_split_into_their_modules() -> None:
    found = dict(run.modules(BUNDLE))
    assert list(found) == ["models/a.js", "models/b.js"]
    assert found["models/a.js"].splitlines()[:2] == ["const value_0 = require(0);", "const value_1 = require(1);"]
    assert found["models/a.js"] == found["models/b.js"] and found["models/a.js"].endswith("(39);\n")


def test_few_files_are_held_out_by_their_names_alone() -> None:
    names = [f"models/{i}.js" for i in range(2000)]
    held = {name for name in names if run.is_held_out(name)}
    assert 50 <= len(held) <= 150  # five per cent of 2000, within five standard deviations
    assert held == {name for name in reversed(names) if run.is_held_out(name)}


def test_every_option_handed_to_the_command_is_one_it_has(tmp_path: Path) -> None:
    command = run.adapt_command(tmp_path, tmp_path / "target", tmp_path / "drafter", 10, 2)
    assert command[1:4] == ["-m", "gemma_mtp", "train"]
    page = cli_docs.page().split("## gemma-mtp train\n")[1].split("## gemma-mtp")[0]
    for option in (word for word in command if word.startswith("--")):
        assert f" {option} " in page, option


def test_finetuning_writes_a_checkpoint_that_decodes_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: ModuleType
) -> None:
    """Some steps on one sentence: the loss falls, and the merged weights give transformers' greedy tokens."""
    for name, value in (("ROW_TOKENS", 32), ("BATCH_ROWS", 4), ("LEARNING_RATE", 1e-2)):
        monkeypatch.setattr(finetune, name, value)
    target, data = bundled_directory() / "target", tmp_path / "data"
    data.mkdir()
    (data / "a.js").write_text("export const answer = question?.answer ?? 42;\n" * 16, encoding="utf-8")
    before, after = finetune.main(
        argparse.Namespace(target=target, data=data, held_out=data, out=tmp_path / "out", steps=8, threads=2)
    )
    assert after < before / 2
    tuned, base = (load_pair(path, use_drafter=False, dtype="float32") for path in (tmp_path / "out", target))
    prompt, params = tuned.encode("export const"), SamplingParams(max_tokens=12, ignore_eos=True)
    ours = tuned.generate(prompt, params).token_ids
    assert ours != base.generate(prompt, params).token_ids
    model = Gemma4ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[4095])
    assert ours == theirs[0, len(prompt) :].tolist()


def test_the_learning_rate_warms_up_and_ends_at_zero(finetune: ModuleType) -> None:
    rates = [finetune.learning_rate(p / 1000) for p in range(1001)]
    assert rates[0] == 0 and max(rates) <= finetune.LEARNING_RATE and rates[-1] == pytest.approx(0)
    assert rates.index(max(rates)) == pytest.approx(1000 * finetune.WARM_UP, abs=30)


def report(histogram: tuple[int, ...], temperature: float) -> AcceptanceReport:
    prompts = tuple(PromptAcceptance(str(i), "", 1, 1, Acceptance(histogram)) for i in range(3))
    return AcceptanceReport(len(histogram) - 1, replace(GREEDY, temperature=temperature), "exact", prompts)


def test_the_share_won_back_is_of_what_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.won_back(4.0, 3.0, 3.75) == 0.75
    assert run.won_back(4.0, 3.0, 2.0) == -1.0
    assert run.won_back(3.0, 2.95, 3.5) is None and run.won_back(3.0, 3.2, 3.5) is None
    histograms = {run.BEFORE: (1, 1, 2), run.TUNED: (2, 1, 1), run.ADAPTED: (1, 2, 1)}
    measured = {name: {t: report(h, t) for t in run.TEMPERATURES} for name, h in histograms.items()}
    content = json.loads(json.dumps(run.summary(measured, {"adapting": 60.0})))
    figures = content["by_temperature"]["0"]
    assert figures["mean_acceptance_length"] == {run.BEFORE: 2.25, run.TUNED: 1.75, run.ADAPTED: 2.0}
    assert figures["won_back"] == 0.5
    assert figures["adapted_against_old"] == {"difference": 0.25, "low": 0.25, "high": 0.25}
    run.print_summary(measured)
    assert capsys.readouterr().out.split()[-2:] == ["50%", "50%"]


def test_a_stage_whose_result_is_there_is_not_run_again(tmp_path: Path) -> None:
    ran: list[int] = []
    seconds: dict[str, float] = {}
    for _ in range(2):
        run.timed(seconds, "adapting", tmp_path / "drafter", lambda: ran.append(1))
    assert ran == [1] and seconds["adapting"] >= 0


def test_a_command_that_fails_ends_the_run_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"-c import sys; sys\.exit\(3\) ended with 3"):
        run.run([sys.executable, "-c", "import sys; sys.exit(3)"])
    assert capsys.readouterr().out.startswith("$ ")
