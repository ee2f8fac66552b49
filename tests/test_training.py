"""Training: the gates that keep training and decoding the same computation, and the data's split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, random_drafter, random_target
from torch import Tensor

from gemma_mtp.config import SLIDING, LayerType, TargetConfig
from gemma_mtp.errors import TrainingError
from gemma_mtp.kv_cache import CommittedKeyValues, KVCache
from gemma_mtp.model.drafter import DonorKeyValues, Drafter
from gemma_mtp.model.layers import Rope, rope_for, slice_rope
from gemma_mtp.model.target import Target
from gemma_mtp.training import bpe, data
from gemma_mtp.training.drafter_trainer import DrafterRecipe, acceptance_on_rows, train_drafter
from gemma_mtp.training.losses import TargetRows, draft_loss, query_rope, shifted, target_rows, unroll
from gemma_mtp.training.optim import Masters, Optimiser, trapezoid
from gemma_mtp.training.rollout import continue_rows, written_by_target
from gemma_mtp.training.shapes import initialise
from gemma_mtp.training.target_trainer import RowLoss, TargetRecipe, train_target

LENGTH, STEPS = 32, 4  # four windows of eight
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target().double()  # so that only a mistake, not rounding, makes a difference


@pytest.fixture(scope="module")
def drafter() -> Drafter:
    return random_drafter().double()


@pytest.fixture(scope="module")
def tokens_BT() -> Tensor:
    return torch.randint(0, TINY.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rows(target: Target, tokens_BT: Tensor) -> TargetRows:
    return target_rows(target, tokens_BT, rope_for(TINY, torch.arange(LENGTH), torch.float64))


def training_logits(drafter: Drafter, rows: TargetRows, rope: Mapping[LayerType, Rope]) -> list[Tensor]:
    with torch.no_grad():
        return [drafter.logits(state) for state in unroll(drafter, rows, rope, STEPS)]


@torch.no_grad()
def decoding_logits(target: Target, drafter: Drafter, tokens_T: Tensor) -> list[Tensor]:
    """Each step's logits [T - 1, V], drafted from every committed length in turn with the decoder's own cache."""
    T = len(tokens_T)
    rope = rope_for(TINY, torch.arange(T + 1), torch.float64)
    cache = KVCache(TINY, T, max_rows=1, dtype=torch.float64, device="cpu")
    steps: list[list[Tensor]] = [[] for _ in range(STEPS)]
    for t in range(T - 1):
        cache.begin(1)
        hidden = target(tokens_T[None, t : t + 1], slice_rope(rope, t, t + 1), cache)
        cache.commit(1)
        committed = CommittedKeyValues(cache, drafter.config.text.layer_types)
        for i in range(STEPS):
            token = tokens_T[t + 1 + i] if t + 1 + i < T else torch.tensor(0)
            state, hidden = drafter(target.embed(token.view(1, 1)), hidden, slice_rope(rope, t + 1, t + 2), committed)
            steps[i].append(drafter.logits(state)[0, 0])
    return [torch.stack(logits) for logits in steps]


def differ(of_training: list[Tensor], of_decoding: list[Tensor], row: int = 1) -> list[float]:
    """Largest difference of each step, over the rows whose every input lies inside the sequence."""
    return [
        float((a[row, : LENGTH - 1 - i] - b[: LENGTH - 1 - i]).abs().max())
        for i, (a, b) in enumerate(zip(of_training, of_decoding, strict=True))
    ]


def test_training_logits_are_decoding_logits_at_every_step_beyond_the_window(
    target: Target, drafter: Drafter, rows: TargetRows, tokens_BT: Tensor
) -> None:
    of_training = training_logits(drafter, rows, query_rope(drafter, LENGTH, torch.float64))
    assert max(differ(of_training, decoding_logits(target, drafter, tokens_BT[1]))) < 1e-9


@pytest.mark.parametrize("mistake", ["pairing", "future_kv", "window", "position", "feedback"])
def test_the_comparison_sees_the_usual_mistakes(
    mistake: str, target: Target, drafter: Drafter, rows: TargetRows, tokens_BT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = query_rope(drafter, LENGTH, torch.float64)
    if mistake == "pairing":  # (x_t, h_t) where decoding pairs (x_{t+1}, h_t)
        rows = replace(rows, embeds_BTD=rows.embeds_BTD.roll(1, 1))
    elif mistake == "future_kv":  # row t sees the keys and values of row t + 1
        rows = replace(rows, donor_kv={kind: (k.roll(-1, 1), v.roll(-1, 1)) for kind, (k, v) in rows.donor_kv.items()})
    elif mistake == "window":  # one row too many in sliding layers
        wide = replace(drafter.config, text=replace(drafter.config.text, sliding_window=TINY.sliding_window + 1))
        monkeypatch.setattr(drafter, "config", wide)
    elif mistake == "position":  # queries at position t where decoding stands at t + 1
        rope = rope_for(drafter.config.text, torch.arange(LENGTH), torch.float64)
    elif mistake == "feedback":  # every step fed the target's state
        monkeypatch.setattr(Drafter, "forward", _without_feedback(Drafter.forward))
    of_training = training_logits(drafter, rows, rope)
    monkeypatch.undo()
    assert max(differ(of_training, decoding_logits(target, drafter, tokens_BT[1]))) > 1e-3


def _without_feedback(forward):  # type: ignore[no-untyped-def]
    def wrong(self, embeds, hidden, rope, kv):  # type: ignore[no-untyped-def]
        return forward(self, embeds, hidden, rope, kv)[0], hidden

    return wrong


def test_a_row_depends_on_nothing_after_it(target: Target, drafter: Drafter, tokens_BT: Tensor) -> None:
    rope = query_rope(drafter, LENGTH, torch.float64)
    target_rope = rope_for(TINY, torch.arange(LENGTH), torch.float64)
    t = 17
    changed = tokens_BT.clone()
    changed[:, t + 2 :] = (changed[:, t + 2 :] + 7) % TINY.vocab_size
    before, after = (target_rows(target, tokens, target_rope) for tokens in (tokens_BT, changed))
    poisoned = {
        kind: tuple(torch.cat((x[:, : t + 1], torch.full_like(x[:, t + 1 :], 1e4)), 1) for x in kv)
        for kind, kv in after.donor_kv.items()
    }
    after = replace(after, donor_kv=poisoned)  # type: ignore[arg-type]
    first, second = (training_logits(drafter, r, rope)[0][:, : t + 1] for r in (before, after))
    assert torch.equal(first, second)


def test_chunked_attention_is_the_reference(
    target: Target, drafter: Drafter, rows: TargetRows, tokens_BT: Tensor
) -> None:
    reference = target.forward_sequence(tokens_BT)
    torch.testing.assert_close(rows.hidden_BTD, reference.hidden_BTD, **CLOSE)
    for kind, kv in reference.donor_kv.items():
        torch.testing.assert_close(rows.donor_kv[kind], kv, **CLOSE)
    rope = query_rope(drafter, LENGTH, torch.float64)
    slow = DonorKeyValues(drafter.config, rows.donor_kv, torch.arange(1, LENGTH + 1))
    with torch.no_grad():
        state, _ = drafter(shifted(rows.embeds_BTD, 1), rows.hidden_BTD, rope, slow)
    fast = next(iter(unroll(drafter, rows, rope, 1)))
    torch.testing.assert_close(fast, state, **CLOSE)


@pytest.mark.parametrize("length", [5, 8, 21, 24])
def test_rows_of_any_length_attend_alike(target: Target, tokens_BT: Tensor, length: int) -> None:
    tokens = tokens_BT[:, :length]
    fast = target_rows(target, tokens, rope_for(TINY, torch.arange(length), torch.float64))
    torch.testing.assert_close(fast.hidden_BTD, target.forward_sequence(tokens).hidden_BTD, **CLOSE)


def test_loss_counts_only_steps_that_decoding_reaches(drafter: Drafter, rows: TargetRows) -> None:
    rope = query_rope(drafter, LENGTH, torch.float64)
    with torch.no_grad():
        result = draft_loss(drafter, rows, rope, STEPS)
        drafts = [drafter.logits(state).argmax(-1) for state in unroll(drafter, rows, rope, STEPS)]
    hits, reached = [0] * STEPS, [0] * STEPS
    for b in range(2):
        for t in range(LENGTH):
            for i in range(STEPS):
                if t + 2 + i >= LENGTH:
                    break
                reached[i] += 1
                if drafts[i][b, t] != rows.tokens_BT[b, t + 2 + i]:
                    break
                hits[i] += 1
    assert result.hits.tolist() == hits
    assert result.reached.tolist() == reached


def test_the_target_writes_what_it_would_choose(target: Target, tokens_BT: Tensor) -> None:
    written = continue_rows(target, tokens_BT[:, :5], LENGTH, 0.0, torch.Generator())
    assert torch.equal(written[:, :5], tokens_BT[:, :5])
    chosen = target.logits(target.forward_sequence(written).hidden_BTD).argmax(-1)
    assert torch.equal(written[:, 5:], chosen[:, 4:-1])


def test_sampled_text_depends_on_its_seed(target: Target) -> None:
    corpus = np.random.default_rng(0).integers(0, TINY.vocab_size, (8, LENGTH)).astype(np.uint16)
    first, again, other = (written_by_target(target, corpus, 2, 4, (4,), (1.0,), seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == (8, LENGTH)


def _toy_corpus(rows: int = 64) -> data.TokenArray:
    """Rows that count upwards from a random start, which a tiny model learns at once."""
    starts = np.random.default_rng(0).integers(0, TINY.vocab_size, rows)
    return ((starts[:, None] + np.arange(LENGTH)) % TINY.vocab_size).astype(np.uint16)


def test_some_steps_of_the_target_reduce_its_loss() -> None:
    model = Target(TINY)
    initialise(model, 0)
    masters = Masters(model)
    optimiser = Optimiser(model, masters, 1e-2, 1e-2)
    loss_of, batches = RowLoss(model, LENGTH), data.BatchOrder(_toy_corpus(), 8)
    losses = []
    for step in range(30):
        loss = loss_of(batches.batch(step))
        loss.backward()
        masters.gather_gradients()
        optimiser.step(1.0)
        masters.publish()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_trainers_run_within_their_budget_and_resume(tmp_path: Path, target: Target) -> None:
    corpus = _toy_corpus()
    recipe = TargetRecipe(minutes=0.02, row_length=LENGTH, threads=torch.get_num_threads(), compile=False)
    flat = corpus.reshape(-1)
    trained = train_target(TargetConfig(TINY), flat, flat, flat.size, recipe, tmp_path, resume=True)
    assert trained.tokens == trained.steps * 8 * LENGTH and trained.held_out_nats_per_token > 0
    drafting = DrafterRecipe(minutes=0.02, threads=torch.get_num_threads(), compile=False)
    frozen = trained.target.float()
    before = {name: p.clone() for name, p in frozen.named_parameters()}
    first = train_drafter(frozen, random_drafter().config, corpus, corpus, drafting, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in frozen.named_parameters())
    again = train_drafter(frozen, random_drafter().config, corpus, corpus, drafting, tmp_path, resume=True)
    lengths = [acceptance_on_rows(frozen, r.drafter, corpus, STEPS).mean_length for r in (first, again)]
    assert lengths[1] > 1.0
    assert (tmp_path / "target.csv").read_text().startswith("step,") and not list(tmp_path.glob("*.tmp"))


def test_learning_rate_rises_holds_and_ends_at_zero() -> None:
    shares = [trapezoid(p / 1000) for p in range(1001)]
    assert shares[0] < 0.1 and max(shares) == 1.0 and shares[-1] == 0.0
    assert all(0.0 <= share <= 1.0 for share in shares)


def test_the_split_is_by_file_disjoint_and_fixed() -> None:
    documents = [data.Document(f"source/{i}.py", f"x = {i}\n") for i in range(5000)]
    training, held_out = data.split(documents)
    assert not {d.name for d in training} & {d.name for d in held_out}
    assert 25 <= len(held_out) <= 85  # one per cent of 5000, within five standard deviations
    assert data.split(reversed(documents))[1] == held_out[::-1]
    assert all(data.is_held_out(document.name) for document in held_out)


def test_duplicates_data_and_vendored_files_are_left_out() -> None:
    kept = list(data.deduplicate([data.Document("a/x.py", "same"), data.Document("b/y.py", "same")]))
    assert [document.name for document in kept] == ["a/x.py"]
    code = b"def f(x):\n    return x\n" * 10
    assert data.usable_text(code) is not None
    assert data.usable_text(b"x = '" + b"a" * 1000 + b"'\n") is None
    assert data.usable_text(b"\xff\xfe" * 100) is None
    assert data.usable_text(code * 1000) is None
    assert data._excluded(("pip", "_vendor", "rich", "x.py")) and data._excluded(("a", "tests", "x.py"))
    assert not data._excluded(("numpy", "linalg", "x.py"))


def test_batches_cover_each_epoch_once_and_depend_on_the_seed_alone() -> None:
    rows_NT = np.arange(40, dtype=np.uint16).reshape(20, 2)
    order = data.BatchOrder(rows_NT, 4, seed=3)
    epoch = torch.cat([order.batch(step) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == rows_NT[:, 0].tolist()
    assert torch.equal(data.BatchOrder(rows_NT, 4, seed=3).batch(7), order.batch(7))
    with pytest.raises(TrainingError, match="fewer than one batch"):
        data.BatchOrder(rows_NT, 21)
    with pytest.raises(TrainingError, match="fewer than one row"):
        data.rows(np.zeros(3, np.uint16), 4)


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
    documents = [data.Document(f"{source}/{i}.py", text) for source in ("a", "b") for i in range(3)]
    prompts = data.held_out_prompts(documents, tokenizer, count=4)
    assert len({prompt["source"] for prompt in prompts}) == 4
    for prompt in prompts:
        assert text.startswith(prompt["text"] + "\n") and 100 <= len(tokenizer.encode(prompt["text"]).ids) <= 200


def test_packing_begins_and_ends_every_document() -> None:
    documents = [data.Document(f"a/{i}.py", f"x = {i}\n") for i in range(5)]
    tokenizer = bpe.train_tokenizer([d.text for d in documents], vocab_size=400)
    packed = data.pack(documents, tokenizer, bpe.EOS)
    assert (packed == bpe.BOS).sum() == (packed == bpe.EOS).sum() == 5
    assert packed[0] == bpe.BOS and packed[-1] == bpe.EOS
    assert np.array_equal(packed, data.pack(documents, tokenizer, bpe.EOS))


def test_sliding_layers_of_the_drafter_see_one_row_fewer_than_the_target(drafter: Drafter, rows: TargetRows) -> None:
    """The query stands one position after the last row it sees, so the window reaches one row less far back."""
    rope, t = query_rope(drafter, LENGTH, torch.float64), 20
    first_seen = t + 1 - (TINY.sliding_window - 1)
    k, v = rows.donor_kv[SLIDING]
    base = training_logits(drafter, rows, rope)[0][:, t]
    for row, matters in ((first_seen - 1, False), (first_seen, True)):
        changed = v.clone()
        changed[:, row] += 3.0
        moved = replace(rows, donor_kv={**rows.donor_kv, SLIDING: (k, changed)})
        assert torch.equal(training_logits(drafter, moved, rope)[0][:, t], base) != matters
