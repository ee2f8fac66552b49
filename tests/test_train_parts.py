"""What training is put together from: texts, batches, held-out prompts, blocks within memory, clusters, stored rows."""

# mypy: disable-error-code="func-returns-value"

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, random_drafter, random_target

from gemma_mtp.config import TargetConfig
from gemma_mtp.datasets import read_examples
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import DataError, TrainingError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.training import centroids as centroids_module
from gemma_mtp.training import memory
from gemma_mtp.training.centroids import balanced_assignment, balanced_clusters, cluster_aims, fit_head
from gemma_mtp.training.drafter_trainer import DrafterRecipe, DrafterTrainer
from gemma_mtp.training.examples import Batch, BatchOrder, ExampleSet, TokenExample
from gemma_mtp.training.gate import judge
from gemma_mtp.training.log import RunLog
from gemma_mtp.training.material import gather, hold_out
from gemma_mtp.training.memory import MEGABYTE, plan_blocks
from gemma_mtp.training.optim import Masters, cosine
from gemma_mtp.training.shapes import DrafterShape, initialise, new_drafter_config
from gemma_mtp.training.step import DraftStep, Objective, StepStats
from gemma_mtp.training.target_store import TargetStore
from gemma_mtp.training.unroll import TargetRows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(bundled_directory() / "target")


def examples_of(lengths: list[int], first: int = 0) -> ExampleSet:
    return ExampleSet.of(TokenExample(np.arange(n, dtype=np.int32), first, 0.5) for n in lengths)


# --- batches


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(3, 200), min_size=1, max_size=40), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_has_every_text_and_a_batch_depends_on_its_number_alone(
    lengths: list[int], batch: int, seed: int
) -> None:
    order = BatchOrder(examples_of(lengths), batch, seed)
    epoch = [order.batch(step) for step in range(order.per_epoch)]
    seen = Counter(index for b in epoch for index in b.indices)
    assert set(seen) == set(range(len(lengths))) and sum(seen.values()) == order.per_epoch * batch
    step = order.per_epoch // 2
    again = BatchOrder(examples_of(lengths), batch, seed).batch(step)
    assert again.indices == epoch[step].indices and torch.equal(again.tokens_BT, epoch[step].tokens_BT)
    for b in epoch:
        for row, length in zip(b.tokens_BT, b.lengths, strict=True):
            assert row[:length].tolist() == list(range(length)) and not row[length:].any()


def test_sets_of_examples_join_save_and_load(tmp_path: Path) -> None:
    both = examples_of([5, 9]).joined(examples_of([20, 4, 7], first=2))
    both.save(tmp_path / "set.safetensors")
    loaded = ExampleSet.load(tmp_path / "set.safetensors")
    # a text with no row to draft from is left out: 4 tokens of which drafts count from row 2
    assert loaded.lengths.tolist() == [5, 9, 20, 7] and loaded.written_tokens == 20 - 3 + 7 - 3
    assert loaded.digest() == both.digest() != examples_of([5, 9]).digest()
    assert loaded[2].first == 2 and loaded[3].tokens.tolist() == list(range(7))


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(TrainingError, match="nothing to train on"):
        BatchOrder(examples_of([]), 4, 0)


# --- material


def write(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_documents_are_cut_into_rows_that_begin_as_texts_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"value_{i} = {i}\n" for i in range(300))
    units = gather(read_examples(write(tmp_path / "a.jsonl", {"text": text})), tokenizer, 4096, 64)
    start = tokenizer.encode("")
    assert len(units) > 10 and all(unit.ids[: len(start)] == start and len(unit.ids) <= 64 for unit in units)
    assert "".join(tokenizer.decode(unit.ids) for unit in units) == text


def test_conversations_count_from_the_models_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Add one."}, {"role": "assistant", "content": "return x + 1"}]
    (answered,) = gather(read_examples(write(tmp_path / "a.jsonl", {"messages": talk})), tokenizer, 4096, 64)
    (asked,) = gather(read_examples(write(tmp_path / "b.jsonl", {"messages": talk[:1]})), tokenizer, 4096, 64)
    assert not answered.open and asked.open and answered.prompt_length == asked.prompt_length == len(asked.ids)
    assert answered.ids[: len(asked.ids)] == asked.ids
    assert "return x + 1" in tokenizer.decode(answered.ids[len(asked.ids) :])


def test_an_answer_longer_than_a_row_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "x " * 200}]
    file = write(tmp_path / "a.jsonl", {"text": "fine"}, {"messages": talk})
    with pytest.raises(DataError, match=r"a.jsonl:2 has \d+ tokens, but at most 64"):
        gather(read_examples(file), tokenizer, 4096, 64)


@pytest.mark.parametrize("documents", [10, 40])
def test_held_out_text_is_not_trained_on(tokenizer: Tokenizer, tmp_path: Path, documents: int) -> None:
    entries = [{"text": f"def f_{i}(x):\n    return x + {i}\n" * 12} for i in range(documents)]
    units = gather(read_examples(write(tmp_path / "a.jsonl", *entries, entries[0])), tokenizer, 4096, 64)
    material = hold_out(units)
    held = {prompt.name.split()[0] for prompt in material.held_out}
    assert 2 <= len(material.held_out) <= 24 and len(material.units) + len(material.held_out) <= len(units)
    assert not set(map(tuple, (p.content for p in material.held_out))) & {tuple(u.ids) for u in material.units}
    if documents >= 20:
        assert not held & {unit.origin for unit in material.units}
    assert len({tuple(unit.ids) for unit in units}) == len(units), "repeats are dropped"


# --- blocks


def step_of(length: int = 64) -> tuple[DraftStep, Drafter]:
    drafter = random_drafter().requires_grad_(True)
    return DraftStep(random_target(), drafter, Objective(steps=3), length), drafter


def test_blocks_fit_the_memory_that_is_given() -> None:
    step, _ = step_of()
    generous = plan_blocks(step, 64, 8, 1 << 30)
    assert generous.sequences == 8 and generous.slab_rows == 8 * 64
    assert generous.target_bytes > 0 < generous.drafter_bytes
    limits = range(4 * MEGABYTE, 2 * generous.nbytes, generous.nbytes // 4)
    plans = [plan_blocks(step, 64, 8, limit) for limit in limits]
    for limit, plan in zip(limits, plans, strict=True):
        assert plan.nbytes <= limit and 1 <= plan.sequences <= 8 and 3 <= plan.slab_rows <= 8 * 64
    assert len({plan.sequences for plan in plans}) > 2
    assert plans == sorted(plans, key=lambda plan: (plan.sequences, plan.slab_rows)) and plans[-1] == generous
    assert "target" in generous.describe(64, 99 * MEGABYTE) and "limit 99.0 MB" in generous.describe(64, 99 * MEGABYTE)


def test_the_least_memory_that_is_named_is_enough() -> None:
    step, _ = step_of(1024)
    with pytest.raises(TrainingError, match=r"one sequence of 1024 tokens needs \d+ MB, more than --memory 1 ") as told:
        plan_blocks(step, 1024, 8, MEGABYTE)
    needed = int(str(told.value).split(" needs ")[1].split()[0])
    assert plan_blocks(step, 1024, 8, needed * MEGABYTE).sequences == 1
    with pytest.raises(TrainingError, match="more than --memory"):
        plan_blocks(step, 1024, 8, (needed - 1) * MEGABYTE)


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator held at once during `work`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


@pytest.mark.parametrize(
    ("dtype", "top_p", "limit_mb"),
    [(torch.float32, 1.0, 32), (torch.float32, 1.0, 100), (torch.bfloat16, 0.9, 30)],
)  # fmt: skip
def test_a_step_of_a_large_vocabulary_stays_within_the_memory_given(
    dtype: torch.dtype, top_p: float, limit_mb: int
) -> None:
    """What the allocator held at its peak, gradients included; and the plan is no idle guess from above."""
    text = replace(TINY, vocab_size=32768, vocab_size_per_layer_input=32768)
    config = new_drafter_config(TargetConfig(text), DrafterShape(hidden=16, heads=4))
    drafter = Drafter(config).requires_grad_(True)
    initialise(drafter, 0)
    step = DraftStep(random_target(config=text).to(dtype), drafter.to(dtype), Objective(steps=3, top_p=top_p), 64)
    plan = plan_blocks(step, 64, 4, limit_mb * MEGABYTE)
    drawn = np.random.default_rng(0).integers(0, 61, (4, 64)).astype(np.int32)
    examples = ExampleSet.of(TokenExample(row, 0, 1.0) for row in drawn)
    batch = BatchOrder(examples, 4, 0).batch(0)
    stats = StepStats.zeros(3, torch.device("cpu"))
    masters = Masters(drafter)

    def blocks() -> None:
        table = masters.gradient(drafter.embed_tokens.weight)
        for first, last in plan.blocks(0, 4):
            step.block(batch.rows(first, last), batch.reached(3), stats, table, plan.slab_rows)
            masters.accumulate()

    peak = allocated_peak(blocks)
    assert peak <= plan.nbytes <= limit_mb * MEGABYTE
    assert peak > 0.7 * plan.nbytes
    assert (plan.slab_rows == step.best_slab_rows) == (limit_mb == 100)


def test_what_the_plan_counts_is_what_a_block_holds() -> None:
    """The target's rows to the byte; the drafter's part against what autograd keeps for a block of five."""
    step, _ = step_of()
    plan = plan_blocks(step, 64, 8, 1 << 30)
    rows = step.compute_rows(torch.zeros(5, 64, dtype=torch.int64))
    assert 5 * (plan.target_bytes - memory._passing_bytes(step, 64)) == rows.nbytes
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.__setitem__(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) or x, lambda x: x
    ):
        step.unroll(rows, 64)
    assert sum(kept.values()) < 5 * plan.drafter_bytes * 1.1


@pytest.mark.parametrize("leaky", [False, True])
def test_the_targets_states_live_no_longer_than_their_block(leaky: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a step that keeps what it computed is noticed."""
    step, drafter = step_of()
    alive: list[weakref.ref[torch.Tensor]] = []
    most, hoard = 0, []
    compute = step.compute_rows

    def watched(tokens: torch.Tensor) -> TargetRows:
        nonlocal most
        rows = compute(tokens)
        alive.append(weakref.ref(rows.hidden_BTD))
        if leaky:
            hoard.append(rows)
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return rows

    monkeypatch.setattr(step, "compute_rows", watched)
    batch = BatchOrder(examples_of([50] * 8), 8, 0).batch(0)
    stats, table = StepStats.zeros(3, torch.device("cpu")), torch.zeros_like(drafter.embed_tokens.weight)
    for first in range(0, 8, 2):
        step.block(batch.rows(first, first + 2), batch.reached(3), stats, table)
    assert len(alive) == 4 and (most == 1) == (not leaky)


def test_stored_rows_are_the_computed_ones(tmp_path: Path) -> None:
    step, _ = step_of()
    store, batch = TargetStore(tmp_path), BatchOrder(examples_of([50, 20, 33]), 3, 0).batch(0)
    computed = step.compute_rows(batch.tokens_BT)
    first = store(batch, step.compute_rows)
    assert first.hidden_BTD.equal(computed.hidden_BTD) and len(list(tmp_path.iterdir())) == 3
    turned = Batch(batch.tokens_BT.flip(0), batch.lengths[::-1], batch.firsts, batch.temperatures, batch.indices[::-1])

    def never(tokens: torch.Tensor) -> TargetRows:
        raise AssertionError("computed what is stored")

    stored = store(turned, never)
    for b, length in enumerate(turned.lengths):
        torch.testing.assert_close(stored.hidden_BTD[b, :length], computed.hidden_BTD[2 - b, :length])
        for kind, (keys, values) in computed.donor_kv.items():
            torch.testing.assert_close(stored.donor_kv[kind][0][b, :length], keys[2 - b, :length])
            torch.testing.assert_close(stored.donor_kv[kind][1][b, :length], values[2 - b, :length])


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def out_of_memory_in_python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fail", "ran_out"),
    [
        (lambda: torch.empty(10**15), True),  # what PyTorch says on this system's CPU
        (out_of_memory_on_a_gpu, True),
        (out_of_memory_in_python, True),
        (lambda: torch.zeros(2) @ torch.zeros(3), False),
    ],
)
@pytest.mark.parametrize("where", ["block", "unroll"])
def test_memory_that_runs_out_is_a_sentence(
    fail: Callable[[], object], ran_out: bool, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, and where one sequence is counted; the last error has nothing to do with memory."""
    monkeypatch.setattr(DraftStep, where, lambda *arguments, **named: fail())
    recipe = DrafterRecipe(Objective(steps=3), steps=1, memory_mb=64)
    trainer = DrafterTrainer(random_target(), random_drafter(), examples_of([50] * 8), recipe, tmp_path)
    advice = r"lower --memory \(now 64 MB\), --length" if where == "block" else "lower --length or --draft-steps"
    expected = (TrainingError, f"memory ran out in .*; {advice}") if ran_out else (RuntimeError, "size")
    with RunLog(tmp_path, "drafter", quiet=True) as log, pytest.raises(expected[0], match=expected[1]):
        trainer.train(log)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("failed", [False, True])
def test_a_log_that_finds_the_disk_full_when_it_is_closed_says_so(failed: bool, tmp_path: Path) -> None:
    """Unless something else failed before: that is the cause."""

    def logged() -> None:
        with RunLog(tmp_path, "drafter") as log:
            log.row(1, 0.1, {"loss": 1.0}, "")
            assert log._file is not None
            log._file.close()
            log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
            log.row(2, 0.2, {"loss": 1.0}, "")
            if failed:
                raise ValueError("the cause")

    expected = (ValueError, "the cause") if failed else (TrainingError, "can not be written.*No space left")
    with pytest.raises(expected[0], match=expected[1]):
        logged()


# --- the centroid head


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), clusters=st.sampled_from([1, 2, 8, 16]))
def test_clusters_are_of_equal_size_and_hold_every_token_once(seed: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    members, means = balanced_clusters(torch.randn(64, 6, generator=generator), clusters, generator)
    assert members.shape == (clusters, 64 // clusters) and means.shape == (clusters, 6)
    assert sorted(members.flatten().tolist()) == list(range(64))


def test_tokens_go_to_their_own_cluster_where_there_is_room() -> None:
    centroids = torch.eye(4)
    rows = centroids.repeat_interleave(5, 0)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    owner = balanced_assignment(rows, centroids, 5)
    assert torch.equal(owner, rows.argmax(-1))


def test_a_fitted_head_finds_the_likeliest_token_more_often_than_chance() -> None:
    shape = DrafterShape(hidden=16, heads=4, centroids=61)
    config = new_drafter_config(TargetConfig(TINY), DrafterShape(**{**vars(shape), "centroid_top_k": 9}))
    plain = new_drafter_config(TargetConfig(TINY), DrafterShape(hidden=16, heads=4))
    drafter = Drafter(plain)
    initialise(drafter, 0)
    states = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    found = fit_head(drafter, config, states, None, seed=0)
    assert drafter.masked_embedding is not None and found.of == 61 and found.clusters == 9
    assert found.top_token > 0.9 and found.mass > 9 / 61
    logits, ids = drafter.candidates(states[:1])
    assert ids is not None and torch.allclose(logits, drafter.logits(states[:1]).gather(-1, ids), atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_aims_of_centroids_are_the_sums_over_each_clusters_tokens(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 and the clusters' tokens one by one, in blocks of any size."""
    generator = torch.Generator().manual_seed(2)
    table, states = torch.randn(60, 8, generator=generator), 3 * torch.randn(20, 8, generator=generator)
    clusters = torch.randperm(60, generator=generator).view(12, 5)
    monkeypatch.setattr(centroids_module, "BLOCK_SCORES", at_once * 60)
    aims = cluster_aims(states, table, clusters)
    probs = (states.double() @ table.double().T).softmax(-1)
    for k, members in enumerate(clusters.tolist()):
        torch.testing.assert_close(aims.mass_NK[:, k].double(), sum(probs[:, m] for m in members), rtol=1e-5, atol=1e-7)
    for n, token in enumerate(probs.argmax(-1).tolist()):
        assert token in clusters[aims.top_N[n]].tolist()


def test_clusters_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    whole, means = balanced_clusters(table, 8, torch.Generator().manual_seed(0))
    monkeypatch.setattr(centroids_module, "BLOCK_SCORES", 1)
    parts, same = balanced_clusters(table, 8, torch.Generator().manual_seed(0))
    assert torch.equal(whole, parts)
    torch.testing.assert_close(means, same)
    torch.testing.assert_close(means, table[whole].mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centroid_head_takes_one_copy_of_the_table_and_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(centroids_module, "BLOCK_SCORES", 1 << 16)
    monkeypatch.setattr(centroids_module, "FIT_STEPS", 2)
    monkeypatch.setattr(centroids_module, "ITERATIONS", 2)
    text = replace(TINY, vocab_size=1 << 14, vocab_size_per_layer_input=1 << 14)
    shape = DrafterShape(hidden=64, heads=4, centroids=64)
    config = new_drafter_config(TargetConfig(text), shape)
    drafter = Drafter(replace(config, use_ordered_embeddings=False))
    initialise(drafter, 0)
    drafter.to(dtype)
    states = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    copy, asked = 4 * 64 << 14, 32 * 12 << 14  # fp32 rows; scores and places of 32 choices
    peak = allocated_peak(lambda: fit_head(drafter, config, states, None, seed=0))
    assert copy + asked < peak < copy + asked + 8 * 4 * (1 << 16)


# --- shapes and schedules


def test_new_drafters_have_the_official_shapes() -> None:
    from gemma_mtp.config import PRESETS, DrafterConfig

    for name, preset in PRESETS.items():
        if isinstance(preset, TargetConfig):
            official = PRESETS[f"{name}-assistant"]
            assert isinstance(official, DrafterConfig)
            head = DrafterShape(centroids=2048) if official.use_ordered_embeddings else DrafterShape()
            assert new_drafter_config(preset, head) == official, name


def test_the_cosine_rises_then_falls_to_zero() -> None:
    shares = [cosine(p / 1000) for p in range(1001)]
    assert shares[0] < 0.1 and max(shares) == pytest.approx(1.0, abs=1e-3) and shares[-1] == pytest.approx(0.0)
    top = shares.index(max(shares))
    assert shares[top:] == sorted(shares[top:], reverse=True)


# --- the verdict


def test_a_verdict_needs_no_loss_anywhere() -> None:
    """Better on average but clearly worse at one temperature is refused."""
    from gemma_mtp.decoding.params import SamplingParams
    from gemma_mtp.measure.acceptance import Acceptance, AcceptanceReport, PromptAcceptance

    def report(temperature: float, accepted: int) -> AcceptanceReport:
        histogram = (10 - accepted, accepted)
        prompts = tuple(PromptAcceptance(str(i), "", 4, 20, Acceptance(histogram)) for i in range(6))
        return AcceptanceReport(1, SamplingParams(temperature=temperature), "exact", prompts)

    start = report(0.0, 5), report(1.0, 5)
    assert judge(start, (report(0.0, 6), report(1.0, 5))).not_worse
    assert judge(start, start).not_worse
    assert not judge(start, (report(0.0, 4), report(1.0, 5))).not_worse
    assert not judge(start, (report(0.0, 9), report(1.0, 3))).not_worse
