"""What the demo and the page begin with: completions that are worth a look, and do not repeat themselves."""

import re
import shlex
from importlib import resources
from pathlib import Path

import pytest

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair

ROOT = Path(__file__).parents[1]
#: of four tokens in a row, the share that stood there before; the earlier demo had 0.8
MOST_REPEATED = 0.25


def samples() -> list[tuple[str, int, float]]:
    """Prompt, seed and temperature of each of the page's samples, and of `make demo`."""
    page = (resources.files("gemma_mtp") / "server" / "page" / "samples.js").read_text(encoding="utf-8")
    found = re.findall(r"seed: (\d+),\s+temperature: ([\d.]+),\s+completion: `([^`]+)`", page)
    command = re.search(r"^\t\$\(BIN\)/gemma-mtp (generate .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(found) >= 4 and command is not None
    words = shlex.split(command[1])
    option = {name: words[words.index(name) + 1] for name in ("--file", "--seed", "--temperature")}
    demo = (ROOT / option["--file"]).read_text(encoding="utf-8"), int(option["--seed"]), float(option["--temperature"])
    return [demo, *((text, int(seed), float(temperature)) for seed, temperature, text in found)]


@pytest.mark.parametrize(("prompt", "seed", "temperature"), samples(), ids=lambda value: str(value)[:20].strip())
def test_a_sample_is_worth_a_look(pair: Pair, prompt: str, seed: int, temperature: float) -> None:
    params = SamplingParams(max_tokens=128, seed=seed, temperature=temperature)
    result = pair.generate(prompt, params, draft_tokens=4)
    fours = list(zip(*(result.token_ids[i:] for i in range(4)), strict=False))
    assert 1 - len(set(fours)) / len(fours) <= MOST_REPEATED, result.text
    assert len(result.token_ids) > 100 and result.mean_acceptance_length > 2.5
