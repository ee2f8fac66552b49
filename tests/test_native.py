"""The native operators: against float64, and the same bits for a row whatever shares its call."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from models import TINY, VOCAB, WIDE, open_caches, play, random_drafter, random_target, run_rows
from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.backend.cpu import CpuBackend
from gemma_mtp.backend.native import Memory, floats, native_available
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import choose, process
from gemma_mtp.engine.pair import bundled_directory, load_pair
from gemma_mtp.engine.round import forward
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.weight_types import QUANTISATIONS, parse_weight_types
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import FORMATS
from gemma_mtp.weights.grouped import BLOCK, Grouped
from gemma_mtp.weights.panels import Panels

if not native_available():
    pytest.skip("the native operators were not built", allow_module_level=True)
from gemma_mtp import _native as native

ISAS = native.isas()
GROUPED = [form for form in FORMATS.values() if issubclass(form, Grouped) and form.native_type]


@pytest.mark.skipif("GEMMA_MTP_BUILD" not in os.environ, reason="the installed build is what is tested")
def test_the_build_asked_for_is_the_one_tested() -> None:
    assert Path(native.__file__).parent == Path(os.environ["GEMMA_MTP_BUILD"]).absolute()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(isa: str, weight: native.Weight, x_MK: Tensor, columns: int) -> Tensor:
    x_MK = x_MK.contiguous()
    out = torch.full((x_MK.shape[0], columns), torch.nan)
    native.linear(isa, weight, floats(x_MK), x_MK.shape[0], floats(out))
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (37, 20), (64, 256), (130, 1000)])
def test_linear(isa: str, dtype: torch.dtype, N: int, K: int) -> None:
    memory, w = Memory(), randn(N, K).to(dtype)
    holds_as_linear(isa, memory.matrix(Dense(w)), w)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("N", "K"), [(16, 32), (64, 256), (144, 96), (96, 512), (208, 1056)])
def test_linear_in_panels(isa: str, N: int, K: int) -> None:
    """Shares of threads end anywhere in a panel, and rows are gone through in parts; activations are read where they
    lie, or, where their rows would share sets of the cache, are copied."""
    memory, w = Memory(), randn(N, K).bfloat16()
    holds_as_linear(isa, memory.matrix(Panels.of(Dense(w))), w)


def holds_as_linear(isa: str, weight: native.Weight, w: Tensor) -> None:
    """No further from float64 than PyTorch in fp32 may be; each row's bits do not depend on how many there are."""
    N, x = len(w), randn(70, w.shape[1], seed=1)
    whole = linear(isa, weight, x, N)
    if isa in ("avx512_bf16", "amx") and w.dtype == torch.bfloat16:  # activations are rounded to bf16, as PyTorch's are
        torchs = (F.linear(x.bfloat16(), w).double() - x.double() @ w.double().T).abs().max()
        assert (whole - x.double() @ w.double().T).abs().max() <= max(float(torchs), 1e-7)
        x = x.bfloat16().float()
    exact = x.double() @ w.double().T
    torchs = (F.linear(x, w.float()) - exact).abs().max()
    assert (whole - exact).abs().max() <= max(2 * torchs, 1e-7 * exact.abs().max())
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for rows in (*range(1, 14), 16, 17, 31, 32):
            assert torch.equal(linear(isa, weight, x[:rows], N), whole[:rows])
    for start in (1, 7, 40):  # at any place among the others
        assert torch.equal(linear(isa, weight, x[start : start + 5], N), whole[start : start + 5])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", GROUPED, ids=lambda form: form.format)
@pytest.mark.parametrize(("N", "K"), [(1, 64), (37, 192), (130, 1024)])
def test_quantised_linear(isa: str, form: type[Grouped], N: int, K: int) -> None:
    """Against float64 with the same quantised weights and activations; each row's bits as above."""
    matrix, x = form.of(Dense(randn(N, K))), 3 * randn(40, K, seed=1)
    x[3] = 0
    memory = Memory()
    weight = memory.matrix(matrix)
    whole = linear(isa, weight, x, N)
    groups = x.view(40, -1, form.group)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups / scale.clamp(min=1e-30)).round() * scale
    exact = rounded.view(40, K).double() @ matrix.values().double().T
    # a value halfway between two integers may be rounded to either
    halfway = 1.01 * float(scale.max()) * float(matrix.values().abs().max())
    assert (whole - exact).abs().max() <= 1e-6 * exact.abs().max() + halfway
    assert (whole - exact).abs().mean() <= 1e-4 * exact.abs().mean()
    for threads in (1, 2, 3):
        native.set_threads(threads)
        for rows in (*range(1, 10), 31, 32):
            assert torch.equal(linear(isa, weight, x[:rows], N), whole[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("N", "K"), [(16, 32), (144, 96), (80, 288)])
def test_rows_looked_up_in_panels(isa: str, N: int, K: int) -> None:
    memory, w, out = Memory(), randn(N, K).bfloat16(), torch.empty(K)
    weight = memory.matrix(Panels.of(Dense(w)))
    for row in range(N):
        native.gather(isa, weight, row, 1.7, floats(out))
        assert torch.equal(out, w[row].float() * 1.7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", [Dense, *GROUPED], ids=lambda form: form.format)
def test_gather(isa: str, form: type[Dense | Grouped]) -> None:
    table, memory, out = form.of(Dense(randn(5, 128))), Memory(), torch.empty(128)
    native.gather(isa, memory.matrix(table), 3, 2.5, floats(out))
    assert torch.allclose(out, 2.5 * table.values()[3], rtol=1e-6)


def test_numbers_are_the_operators() -> None:
    """What Python must know without the operators is what they say."""
    types = native.WeightType.__members__
    groups = {form.native_type: form.group for form in GROUPED}
    assert groups == {name: group for name, type in types.items() if (group := native.quantised_group(type))}
    assert native.QUANTISED_BLOCK == BLOCK
    tensor = torch.zeros(16, 32)
    weights = [Dense(tensor), Dense(tensor.bfloat16()), Panels(tensor.bfloat16())]
    layouts = [weight.native() for weight in weights]
    assert {layout.type for layout in layouts if layout is not None} | set(groups) == set(types)


def visible(count: int, last: int, window: int) -> tuple[list[int], list[int]]:
    ends = [last - i for i in range(count)]
    return [max(0, end - window + 1) for end in ends], ends


def attend(
    isa: str,
    q_QD: Tensor,
    first: list[int],
    last: list[int],
    k_SD: Tensor,
    v_SD: Tensor,
    table: list[int] | None = None,
) -> Tensor:
    """Over blocks side by side, or where `table` says; rows of no block are NaN."""
    q_QD, out = q_QD.contiguous(), torch.full_like(q_QD, torch.nan)
    blocks = -(-len(k_SD) // BLOCK_ROWS)
    table = list(range(blocks)) if table is None else table
    buffers = []
    for rows in (k_SD, v_SD):
        buffer = torch.full((max(table) + 1, BLOCK_ROWS, rows.shape[1]), torch.nan)
        for i, block in enumerate(table):
            part = rows[i * BLOCK_ROWS : (i + 1) * BLOCK_ROWS]
            buffer[block, : len(part)] = part
        buffers.append(buffer)
    keys, values = (floats(buffer) for buffer in buffers)
    native.attend(isa, floats(q_QD), len(q_QD), first, last, keys, values, table, q_QD.shape[1], floats(out))
    return out


def test_both_sides_know_the_size_of_a_block() -> None:
    assert native.BLOCK_ROWS == BLOCK_ROWS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("d", "S", "window"), [(8, 5, 100), (64, 700, 400), (20, 300, 7), (256, 513, 1000)])
def test_attention(isa: str, d: int, S: int, window: int) -> None:
    Q = min(S, 40)
    k, v, q = randn(S, d) * d**-0.25, randn(S, d, seed=1), randn(Q, d, seed=2) * d**-0.25
    first, last = visible(Q, S - 1, window)
    whole = attend(isa, q, first, last, k, v)
    for i in range(Q):
        rows = slice(first[i], last[i] + 1)
        exact = torch.softmax(q[i].double() @ k[rows].double().T, -1) @ v[rows].double()
        assert (whole[i] - exact).abs().max() <= 2e-6 * v.abs().max()
        alone = attend(isa, q[i : i + 1], [first[i]], [last[i]], k, v)
        assert torch.equal(alone[0], whole[i])
    table = torch.randperm(-(-S // BLOCK_ROWS) + 3, generator=torch.Generator().manual_seed(S)).tolist()[:-3]
    assert torch.equal(attend(isa, q, first, last, k, v, table), whole), "blocks may lie anywhere"
    poisoned_k, poisoned_v = k.clone(), v.clone()
    if first[0] > 0:
        poisoned_k[: first[0]], poisoned_v[: first[0]] = torch.nan, torch.nan
        assert torch.equal(attend(isa, q[:1], first[:1], last[:1], poisoned_k, poisoned_v)[0], whole[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 7, 16, 100, 512])
def test_element_wise(isa: str, n: int) -> None:
    x, y = 8 * randn(n), randn(n, seed=1)
    out = torch.full((n,), torch.nan)

    def close(exact: Tensor, tolerance: float = 1e-6) -> None:
        assert (out - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))

    native.rms_norm(isa, floats(x), floats(y), 1e-6, n, floats(out))
    close(F.rms_norm(x.double(), (n,), y.double(), 1e-6))
    native.rms_norm(isa, floats(x), floats(None), 1e-6, n, floats(out))
    close(F.rms_norm(x.double(), (n,), None, 1e-6))
    native.gated(isa, floats(x), floats(y), n, floats(out))
    close(F.gelu(x.double(), approximate="tanh") * y)
    out = 10 * x
    native.softcap(isa, floats(out), 30.0, n)
    close(30 * torch.tanh(10 * x.double() / 30))
    out = x.clone()
    native.softmax(isa, floats(out), n)
    close(x.double().softmax(0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [2, 16, 20, 64])
def test_rotate(isa: str, d: int) -> None:
    x, cos, sin = randn(d), randn(d, seed=1), randn(d, seed=2)
    out = x.clone()
    native.rotate(isa, floats(out), floats(cos), floats(sin), d)
    exact = x.double() * cos + x.double().roll(d // 2) * sin
    assert (out - exact).abs().max() < 1e-6


def states(backend: Backend, tokens: list[int], calls: list[int]) -> Tensor:
    """Hidden states of all tokens [T, D], run through the cache in calls of the given sizes."""
    (cache,) = open_caches(backend, 1, len(tokens))
    parts = torch.tensor(tokens).split(calls)
    return torch.cat([run_rows(backend, cache, part.tolist()) for part in parts])


CALLS = [[1] * 150, [5] * 30, [64, 64, 1, 21], [40, 1, 2, 3, 4, 32, 8, 60], [13] * 11 + [7]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_bits_do_not_depend_on_its_call(dtype: str) -> None:
    """Of the bundled target: alone, among 2 to 64 rows, in any chunks, with any number of threads."""
    backend = load_pair(dtype=dtype).backend
    assert isinstance(backend, CpuBackend)
    tokens = torch.randint(0, 4096, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    native.set_threads(1)
    alone = states(backend, tokens, CALLS[0])
    for threads, some in ((1, CALLS[1:4]), (2, CALLS[4:]), (3, CALLS[3:4])):
        native.set_threads(threads)
        for calls in some:
            assert torch.equal(states(backend, tokens, calls), alone)
    close_to = backend.target.forward_sequence(torch.tensor([tokens])).hidden_BTD[0]
    assert (alone - close_to).abs().max() <= (1e-4 if dtype == "float32" else 0.2) * close_to.abs().max()


#: large enough for several threads, and small enough for them to divide sequences; experts are not divided
LARGE = dataclasses.replace(WIDE["ple"], hidden_size=256, intermediate_size=448, head_dim=32, global_head_dim=64)
DIVIDED = {
    "per-layer embeddings": LARGE,
    "odd per-layer embeddings": dataclasses.replace(LARGE, hidden_size_per_layer_input=20),
    "none": dataclasses.replace(LARGE, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0),
    "experts": dataclasses.replace(WIDE["moe"], hidden_size=256, intermediate_size=448),
}


@pytest.mark.parametrize(
    ("name", "weights"),
    [pytest.param(name, weights, marks=[pytest.mark.slow] * ((i + j) % 2))
     for i, name in enumerate(DIVIDED) for j, weights in enumerate(("float32", "bfloat16", "int8", "int4"))],
)  # fmt: skip
@torch.inference_mode()
def test_sequences_in_one_call_are_each_alone(name: str, weights: str) -> None:
    """Of different lengths, with one to nine rows each, of which all or the last are wanted, with any threads."""
    target = random_target(5, DIVIDED[name]).to(torch.float32 if weights == "float32" else torch.bfloat16)
    if weights in QUANTISATIONS:
        target.quantise_(parse_weight_types(weights))
    backend = CpuBackend(target)
    generator, count = torch.Generator().manual_seed(1), 19

    def ids(rows: int) -> list[int]:
        return torch.randint(0, VOCAB, (rows,), generator=generator).tolist()

    lengths = [1 + 7 * i % 40 for i in range(count)]
    prompts, rounds = [ids(n) for n in lengths], [[ids(1 + (i + j) % most) for i in range(count)]
                                                  for j, most in enumerate([4, 9, 9])]  # fmt: skip

    def played(threads: int, together: bool) -> Tensor:
        native.set_threads(threads)
        caches, out = open_caches(backend, count, 80), []
        for tokens, last_only in ((prompts, True), *((rows, False) for rows in rounds), (rounds[0], True)):
            calls = [Rows(cache, row, 1 if last_only else len(row)) for cache, row in zip(caches, tokens, strict=True)]
            out += [forward(backend, part).clone() for part in ([calls] if together else [[call] for call in calls])]
            for call in calls:
                call.cache.table.commit(len(call.token_ids))
        return torch.cat(out)

    alone = played(1, together=False)
    assert all(torch.equal(played(threads, together=True), alone) for threads in (1, 2, 3, 4))


@pytest.mark.parametrize("name", DIVIDED)
@torch.inference_mode()
def test_rows_that_are_not_wanted_change_nothing(name: str) -> None:
    """They end at the last layer that has keys and values: states that are wanted, now and in the next call, are those
    of calls that want all of them."""
    backend = CpuBackend(random_target(6, DIVIDED[name]).to(torch.bfloat16))
    generator = torch.Generator().manual_seed(2)
    calls = [[torch.randint(0, VOCAB, (rows,), generator=generator).tolist() for rows in call]
             for call in ([40, 1, 6, 17], [3, 1, 2, 5])]  # fmt: skip
    wanted = [1, 1, 2, 1]  # of each sequence's rows the last

    def played(every: bool) -> list[Tensor]:
        """The wanted states, of calls that want these or every one."""
        caches, out = open_caches(backend, len(wanted), 64), []
        for call in calls:
            keep = [len(tokens) if every else count for tokens, count in zip(call, wanted, strict=True)]
            rows = [Rows(*row) for row in zip(caches, call, keep, strict=True)]
            states_of = forward(backend, rows).split(keep)
            out += [of_one[-count:].clone() for of_one, count in zip(states_of, wanted, strict=True)]
            for row in rows:
                row.cache.table.commit(len(row.token_ids))
        return out

    for threads in (1, 2, 3, 5):
        native.set_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(played(every=False), played(every=True), strict=True))


@torch.inference_mode()
def test_the_states_of_a_call_are_overwritten_by_calls_of_its_own_pool_alone() -> None:
    """And they are those that choices are made from and that sequences keep."""
    backend = CpuBackend(random_target(6))
    (one,), (other,) = open_caches(backend, 1, 40), open_caches(backend, 1, 40)
    first = forward(backend, [Rows(one, [3, 5], 2)])
    kept, chosen = first.clone(), backend.choose(first, range(2))
    assert not torch.equal(forward(backend, [Rows(other, [7, 9], 2)]), kept)
    assert torch.equal(first, kept) and backend.choose(first, range(2)) == chosen == backend.choose(kept, range(2))
    backend.keep_states([one], first, [1])
    assert torch.equal(one.state, kept[1]) and not other.state.any()


@torch.inference_mode()
def test_sequences_of_several_pools_are_no_call() -> None:
    """The first one's keys and values would be read and written for all."""
    backend = CpuBackend(random_target())
    rows = [Rows(open_caches(backend, 1, 8)[0], [3], 1) for _ in range(2)]
    with pytest.raises(AssertionError, match="share a pool"):
        forward(backend, rows)


@torch.inference_mode()
def test_the_comparison_sees_another_order_of_sums() -> None:
    """PyTorch's own products of the same weights do depend on the number of rows, and must fail the test above."""
    from gemma_mtp.checkpoint import load_target

    target = load_target(bundled_directory() / "target", torch.float32)
    tokens = torch.randint(0, 4096, (1, 150), generator=torch.Generator().manual_seed(0))
    whole = target.forward_sequence(tokens).hidden_BTD[0]
    parts = [target.forward_sequence(tokens[:, :rows]).hidden_BTD[0] for rows in (1, 5, 13, 64, 149)]
    assert not all(torch.equal(part, whole[: len(part)]) for part in parts)


@pytest.mark.parametrize("centroids", [False, True])
def test_greedy_drafts_in_one_call_are_the_steps_one_by_one(centroids: bool) -> None:
    backend = CpuBackend(random_target(), random_drafter(centroids=centroids))
    greedy = play(backend, [5, 6, 7], SamplingParams(max_tokens=40), 6)
    # top_k 1 is greedy too, but goes through logits and the general choice
    stepwise = play(backend, [5, 6, 7], SamplingParams(max_tokens=40, temperature=1.0, top_k=1), 6)
    assert greedy.tokens == stepwise.tokens
    assert greedy.accepted == stepwise.accepted


def keys_of(seed: int, positions: range) -> list[int]:
    return [row_key(seed, position, STREAM_CHOICE) for position in positions]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 1.5, 40.0])
def test_drawn_tokens_are_those_of_the_reference(temperature: float) -> None:
    """The noise is the same to the last bit but one of a float64 logarithm, which float32 does not show here."""
    backend = load_pair(use_drafter=False).backend
    assert isinstance(backend, CpuBackend)
    hidden = randn(150, backend.target.config.hidden_size, seed=int(10 * temperature))
    params, positions = SamplingParams(temperature=temperature, seed=9), range(5, 155)
    expected = choose(process(backend.logits(hidden), params), params, torch.tensor(positions)).tolist()
    keys, rows = keys_of(9, positions), range(150)
    assert backend.choose(hidden, rows, [temperature] * 150, keys) == expected
    assert backend.choose(hidden, rows, [temperature] * 150, keys_of(8, positions)) != expected
    assert len(set(expected)) > 50
    alone = [backend.choose(hidden, [i], [temperature], keys[i : i + 1])[0] for i in rows]
    assert alone == expected
    some = [149, 7, 8, 9, 100]
    assert backend.choose(hidden, some, [temperature] * 5, [keys[i] for i in some]) == [expected[i] for i in some]


def test_drawn_tokens_follow_their_distribution() -> None:
    """Chi-square of 10,000 draws of one row; the test is wrong once in 10 ** 6, and sees a temperature of 0.8."""
    backend = load_pair(use_drafter=False).backend
    assert isinstance(backend, CpuBackend)
    hidden = 0.3 * randn(1, backend.target.config.hidden_size)
    count = 10_000

    def statistic(temperature: float) -> float:
        drawn = backend.choose(hidden, [0] * count, [temperature] * count, keys_of(3, range(count)))
        expected = count * torch.softmax(backend.logits(hidden)[0].double(), -1)
        common = expected >= 5
        seen = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
        observed = torch.cat((seen[common], seen[~common].sum()[None]))
        wanted = torch.cat((expected[common], expected[~common].sum()[None]))
        return float(scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)

    assert statistic(1.0) > 1e-6
    assert statistic(0.8) < 1e-6


@pytest.mark.parametrize("centroids", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_drawn_drafts_in_one_call_are_the_steps_one_by_one(centroids: bool, temperature: float) -> None:
    backend = CpuBackend(random_target(), random_drafter(centroids=centroids))
    drawn = SamplingParams(max_tokens=40, temperature=temperature, seed=4)
    # a min-p that removes nothing goes through logits and the general choice
    stepwise = dataclasses.replace(drawn, min_p=1e-30)
    assert (drawn.choice, stepwise.choice) == ("drawn", "filtered")
    rule = StopRule((0.0, 0.0, 0.02, 0.05, 0.1, 0.2), 0.3, 1.1)
    for stop in (None, rule):
        fast, slow = (play(backend, [5, 6, 7], params, 6, stop=stop) for params in (drawn, stepwise))
        assert (fast.tokens, fast.accepted, fast.drafted) == (slow.tokens, slow.accepted, slow.drafted)
        for ours, theirs in zip(fast.confidences, slow.confidences, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert min(fast.drafted[:-6]) < 6


def test_ties_go_to_the_lowest_id() -> None:
    target = random_target()
    with torch.no_grad():
        target.embed_tokens.weight[:] = target.embed_tokens.weight[7]
    found = CpuBackend(target).choose(randn(5, TINY.hidden_size), range(5), [0.0] * 5, [0] * 5)
    assert found == [0] * 5


def test_without_the_module_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gemma_mtp._native", None)
    monkeypatch.delattr("gemma_mtp._native", raising=False)
    native_available.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="native operators are not there") as caught:
            pair = load_pair()
        assert len(caught) == 1
        assert isinstance(pair.backend, ReferenceBackend)
        assert len(pair.generate("import", SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4
    finally:
        native_available.cache_clear()
