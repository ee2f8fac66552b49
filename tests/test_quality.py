"""What benchmarks/quality.py measures: the loss of the target that decodes, and tokens a round."""

import json
from pathlib import Path

import pytest
import quality
import torch
import torch.nn.functional as F
from bundled_pair.corpus import is_held_out, standard_library_documents
from models import PLE, VOCAB, random_target

from gemma_mtp.backend.native import set_threads
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import bundled_directory, load_pair
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.weight_types import parse_weight_types


@pytest.mark.parametrize("kinds", ["none", "int8"])
def test_the_loss_is_that_of_whole_sequences(kinds: str) -> None:
    """Longer than a chunk and than the window; reference path, so that quantised weights give the same too."""
    target = random_target(config=PLE)
    target.quantise_(parse_weight_types(kinds))
    backend = ReferenceBackend(target)
    backend.chunk_rows = 64
    rows = torch.randint(0, VOCAB, (3, 2 * backend.chunk_rows + 7), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = target.logits(target.forward_sequence(rows).hidden_BTD)[:, :-1].flatten(0, 1)
    assert quality.loss(backend, rows) == pytest.approx(float(F.cross_entropy(logits, rows[:, 1:].flatten())), rel=1e-4)


def test_the_text_is_held_out_and_whole_rows() -> None:
    tokenizer = Tokenizer.from_dir(bundled_directory() / "target")
    text = quality.held_out_text(tokenizer, eos=1, wheels=None, row_length=64, most=5)
    assert text.rows_NT.shape == (5, 64)
    assert 0.1 < text.tokens_per_byte < 0.6
    documents = [d for d in standard_library_documents() if is_held_out(d.name)]
    whole = "".join(document.text for document in documents)
    assert tokenizer.decode(text.rows_NT[1].tolist())[8:-8] in whole  # a piece may end within a character


def test_acceptance_pools_rounds_of_full_length() -> None:
    pair, prompts = load_pair(), ["import os\n", "def add(a, b):\n"]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    rounds = [r for prompt in prompts for r in pair.generate(prompt, params, draft_tokens=4).rounds if r.drafted == 4]
    expected = 1 + sum(r.accepted for r in rounds) / len(rounds)
    assert quality.acceptance_length(pair, prompts, 20, 0.0) == pytest.approx(expected)


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quality.json"
    arguments = ["--types", "float32", "int4", "--rows", "2", "--prompts", "1", "--max-tokens", "16", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        quality.main(quality.parse([*arguments, "--json", str(out)]))
    finally:
        set_threads(threads)
    full, quantised = json.loads(out.read_text())
    assert (full["types"], quantised["types"]) == ("float32", "int4")
    assert full["target_bytes"] > 4 * quantised["target_bytes"]
    assert full["drafter_bytes"] > 3 * quantised["drafter_bytes"]
    assert 0 < abs(full["nats_per_token"] - quantised["nats_per_token"]) < 0.5
    assert set(full["acceptance_length"]) == {"0.0", "1.0"}
    assert "int4" in capsys.readouterr().out
