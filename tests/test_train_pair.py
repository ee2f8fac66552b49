"""What only the bundled pair's training has: its corpus and split, tokenizer, and the target's trainer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import make_pair
import numpy as np
import pytest
import torch
from bundled_pair import bpe, corpus, target_trainer
from bundled_pair.bundle import BUNDLED_TARGET
from bundled_pair.target_trainer import RowLoss, TargetRecipe, train_target, trapezoid
from models import TINY

from gemma_mtp.checkpoint import read_target_config
from gemma_mtp.config import TargetConfig
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import TrainingError
from gemma_mtp.model.target import Target
from gemma_mtp.training.optim import Masters, Optimiser
from gemma_mtp.training.shapes import initialise

LENGTH = 32


def _toy_corpus(rows: int = 64) -> corpus.TokenArray:
    """Rows that count upwards from a random start, which a tiny model learns at once."""
    starts = np.random.default_rng(0).integers(0, TINY.vocab_size, rows)
    return ((starts[:, None] + np.arange(LENGTH)) % TINY.vocab_size).astype(np.uint16)


def test_some_steps_of_the_target_reduce_its_loss() -> None:
    model = Target(TINY)
    initialise(model, 0)
    masters = Masters(model)
    optimiser = Optimiser(model, masters, 1e-2, 1e-2)
    loss_of, batches = RowLoss(model, LENGTH), corpus.BatchOrder(_toy_corpus(), 8)
    losses = []
    for step in range(20):
        loss = loss_of(batches.batch(step))
        loss.backward()
        masters.clear()
        masters.accumulate()
        masters.clip()
        optimiser.step(1.0)
        masters.publish()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_the_target_trains_within_its_budget_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes three hundredths of a second: it is looked at three times in each."""
    ticks = itertools.count()
    monkeypatch.setattr(target_trainer, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(ticks)))
    corpus = _toy_corpus().reshape(-1)
    recipe = TargetRecipe(minutes=0.01, row_length=LENGTH, threads=torch.get_num_threads(), compile=False)
    first = train_target(TargetConfig(TINY), corpus, corpus, corpus.size, recipe, tmp_path)
    assert first.steps == 20 and first.tokens == first.steps * 8 * LENGTH and first.held_out_nats_per_token > 0
    longer = TargetRecipe(minutes=0.02, row_length=LENGTH, threads=torch.get_num_threads(), compile=False)
    again = train_target(TargetConfig(TINY), corpus, corpus, corpus.size, longer, tmp_path, resume=True)
    assert again.steps > first.steps and again.held_out_nats_per_token < first.held_out_nats_per_token
    lines = (tmp_path / "target.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(1, again.steps + 1))
    assert not list(tmp_path.glob("*.partial"))


def test_learning_rate_rises_holds_and_ends_at_zero() -> None:
    shares = [trapezoid(p / 1000) for p in range(1001)]
    assert shares[0] < 0.1 and max(shares) == 1.0 and shares[-1] == 0.0
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_the_split_is_by_file_disjoint_and_fixed() -> None:
    documents = [corpus.Document(f"source/{i}.py", f"x = {i}\n") for i in range(5000)]
    training, held_out = corpus.split(documents)
    assert not {d.name for d in training} & {d.name for d in held_out}
    assert 25 <= len(held_out) <= 85  # one per cent of 5000, within five standard deviations
    assert corpus.split(reversed(documents))[1] == held_out[::-1]
    assert all(corpus.is_held_out(document.name) for document in held_out)


def test_duplicates_data_and_vendored_files_are_left_out() -> None:
    kept = list(corpus.deduplicate([corpus.Document("a/x.py", "same"), corpus.Document("b/y.py", "same")]))
    assert [document.name for document in kept] == ["a/x.py"]
    code = b"def f(x):\n    return x\n" * 10
    assert corpus.usable_text(code) is not None
    assert corpus.usable_text(b"x = '" + b"a" * 1000 + b"'\n") is None
    assert corpus.usable_text(b"\xff\xfe" * 100) is None
    assert corpus.usable_text(code * 1000) is None
    assert corpus._excluded(("pip", "_vendor", "rich", "x.py")) and corpus._excluded(("a", "tests", "x.py"))
    assert not corpus._excluded(("numpy", "linalg", "x.py"))


def test_batches_cover_each_epoch_once_and_depend_on_the_seed_alone() -> None:
    rows_NT = np.arange(40, dtype=np.uint16).reshape(20, 2)
    order = corpus.BatchOrder(rows_NT, 4, seed=3)
    epoch = torch.cat([order.batch(step) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == rows_NT[:, 0].tolist()
    assert torch.equal(corpus.BatchOrder(rows_NT, 4, seed=3).batch(7), order.batch(7))
    with pytest.raises(TrainingError, match="fewer than one batch"):
        corpus.BatchOrder(rows_NT, 21)
    with pytest.raises(TrainingError, match="fewer than one row"):
        corpus.rows(np.zeros(3, np.uint16), 4)


def test_the_tokenizer_keeps_every_byte_and_gemmas_ids() -> None:
    code = "class A:\n    def f(self, x):\n\treturn x  # é 汉字 🙂 12345\n\n\n        y = 'a  b'\r\n"
    tokenizer = bpe.train_tokenizer([code * 3], vocab_size=400)
    ids = tokenizer.encode(code).ids
    assert ids[0] == bpe.BOS and tokenizer.decode(ids) == code
    for token_id, name in bpe.NAMED.items():
        assert tokenizer.token_to_id(name) == token_id
    turn = tokenizer.encode("<|turn>user\nhi<turn|>\n").ids
    assert turn[1] == bpe.TURN_OPEN and bpe.TURN_CLOSE in turn
    prefix = tokenizer.encode("class A:\n").ids
    assert ids[: len(prefix)] == prefix, "a prompt that ends in a newline must tokenise as it would inside a file"


def test_held_out_prompts_are_whole_lines_of_distinct_files() -> None:
    text = "\n".join(f"value_{i} = function({i}, 'argument')" for i in range(200)) + "\n"
    tokenizer = bpe.train_tokenizer([text], vocab_size=400)
    documents = [corpus.Document(f"{source}/{i}.py", text) for source in ("a", "b") for i in range(3)]
    prompts = corpus.held_out_prompts(documents, tokenizer, count=4)
    assert len({prompt["source"] for prompt in prompts}) == 4
    for prompt in prompts:
        assert text.startswith(prompt["text"] + "\n") and 100 <= len(tokenizer.encode(prompt["text"]).ids) <= 200


def test_packing_begins_and_ends_every_document() -> None:
    documents = [corpus.Document(f"a/{i}.py", f"x = {i}\n") for i in range(5)]
    tokenizer = bpe.train_tokenizer([d.text for d in documents], vocab_size=400)
    packed = corpus.pack(documents, tokenizer, bpe.EOS)
    assert (packed == bpe.BOS).sum() == (packed == bpe.EOS).sum() == 5
    assert packed[0] == bpe.BOS and packed[-1] == bpe.EOS
    assert np.array_equal(packed, corpus.pack(documents, tokenizer, bpe.EOS))


@pytest.mark.parametrize(
    ("arguments", "rows", "length", "minutes"),
    [([], 8, 512, 240.0), (["--device", "cuda"], 32, 2048, 4.3), (["--recipe", "gpu"], 32, 2048, 4.3)],
)
def test_the_recipe_follows_the_device(
    arguments: list[str], rows: int, length: int, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage broken off on a GPU goes on elsewhere with the recipe it had; the engine's part is the CPU's."""
    monkeypatch.setattr("sys.argv", ["make_pair.py", "--trained-on", "a machine", *arguments])
    parsed = make_pair.parse()
    recipe = make_pair.target_recipe(parsed)
    assert (recipe.batch_size, recipe.row_length, recipe.minutes) == (rows, length, minutes)
    settings = make_pair.drafter_settings(make_pair.drafter_recipe(parsed), parsed)
    assert settings.engine_device == "cpu" and settings.device == parsed.device
    assert settings.recipe.compile is (rows == 8)


def test_the_card_tells_the_shape_and_the_machine() -> None:
    bundled = bundled_directory()
    record = json.loads((bundled / "training.json").read_text())
    card = (bundled / "MODEL_CARD.md").read_text(encoding="utf-8")
    for figure in (f"{record['target_parameters']:,}", f"{record['drafter_parameters']:,}", record["trained_on"],
                   f"{record['held_out_nats_per_token']:.3f}", f"{record['written_tokens']:,}"):  # fmt: skip
        assert figure in card
    assert TargetConfig(BUNDLED_TARGET.text) == read_target_config(bundled / "target")
