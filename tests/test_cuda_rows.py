"""A row's bits, alone and among others, where products are those of tensor cores; and choices equal to the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from models import TINY
from tensor_core import Interpreter
from tensor_core_model import ADA, HOPPER
from test_cuda_kernels import KINDS, pool_of, randn, weight_of
from torch import Tensor

from gemma_mtp.backend.cuda import attention, centroids, choice, experts, filters, heads
from gemma_mtp.backend.cuda import rows as row_kernels
from gemma_mtp.backend.cuda.attention import Seen, Stacks
from gemma_mtp.backend.cuda.batch import Part, make_batch, stacks_of
from gemma_mtp.backend.cuda.dots import chain
from gemma_mtp.backend.cuda.draws import Draws, draws_on
from gemma_mtp.backend.cuda.launch import Launch
from gemma_mtp.backend.cuda.linear import gate_up, linear
from gemma_mtp.backend.cuda.rows import added
from gemma_mtp.backend.cuda.tiles import part_count
from gemma_mtp.backend.cuda.weights import DeviceWeight
from gemma_mtp.decoding.noise import STREAM_CHOICE, row_key
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import Candidates, process
from gemma_mtp.decoding.sampling import choose as general_choice
from gemma_mtp.kv.pool import KVPool

CORES = {"Hopper": HOPPER, "Ada": ADA}
MOST = 17
#: rows of a call: alone, the decoding tile full and not, a row more, in another order, and twice
CALLS: list[list[int]] = [*([row] for row in range(0, MOST, 8)), list(range(16)), list(range(MOST)), [16, 3, 11],
                          list(range(MOST))[::-1], [5] * 3, [*range(MOST)] * 4]  # fmt: skip


@triton.jit
def careless_kernel(x, w, out, R, N, K, part, M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr):
    columns, row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, M)
    total = tl.zeros((M, BLOCK_N), tl.float32)
    for begin in range(0, K, part):
        total += chain(x, row.to(tl.int64) * K, row < R, w, w, columns, columns < N, begin, tl.minimum(begin + part, K),
                       K, 0, 1, M, BLOCK_N, DEPTH)  # fmt: skip
    places = out + row.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(places, total, mask=(row < R)[:, None] & (columns < N)[None, :])


def careless(launch: Launch, x_RK: Tensor, weight: DeviceWeight) -> Tensor:
    """A product that is cut by how many rows there are, as libraries do."""
    (R, K), N = x_RK.shape, weight.rows
    out = torch.empty(R, N)
    part = 64 if R < 9 else 256
    launch(careless_kernel, (triton.cdiv(N, 64),), x_RK, weight.data, out, R, N, K, part, M=128, BLOCK_N=64, DEPTH=64)
    return out


@pytest.mark.parametrize(
    ("kind", "core"),
    [("bf16", "Hopper"), ("bf16", "Ada"),
     *(pytest.param(kind, core, marks=[pytest.mark.slow] * ((i + j) % 2))
       for i, kind in enumerate(KINDS) if kind != "bf16" for j, core in enumerate(CORES))],
)  # fmt: skip
def test_products(kind: str, core: str) -> None:
    """Alone, together, permuted, padded; in parts beside each other and in turn."""
    run = Interpreter(CORES[core])
    x = randn(MOST, 576).bfloat16()
    weight, _ = weight_of(kind, 40, 576)
    assert part_count(40, 576) > 1
    whole = added(run, linear(run, x, weight))
    fused = gate_up(run, x[:, :64].contiguous(), weight_of(kind, 40, 64)[0])
    pair = weight_of(kind, 40, 64)[0]
    for number, call in enumerate(CALLS):
        assert torch.equal(added(run, linear(run, x[call], weight)), whole[call])
        if kind in ("bf16", "int4") or number % 4 == 1:
            assert torch.equal(gate_up(run, x[call][:, :64].contiguous(), pair), fused[call])


@pytest.mark.parametrize("core", CORES)
def test_a_split_that_follows_the_rows_is_found(core: str) -> None:
    """The control: the same comparison fails for most numbers where the cut depends on the rows."""
    run = Interpreter(CORES[core])
    x, (weight, _) = randn(MOST, 576).bfloat16(), weight_of("bf16", 40, 576)
    whole = careless(run, x, weight)
    assert torch.equal(careless(run, x[3:14], weight), whole[3:14])  # the same cut
    assert (careless(run, x[3:4], weight) != whole[3:4]).float().mean() > 0.5


def test_the_integers_of_a_call_lie_at_whole_vectors() -> None:
    """Where a pointer is no multiple of 16 bytes, Triton compiles the kernel anew."""
    config = TINY
    pool = KVPool(config, {"sliding_attention": 9, "full_attention": 9}, 3, torch.bfloat16, "cpu")
    parts = [
        Part(pool.cache(length), list(range(count)), length - count) for length, count in ((40, 3), (7, 7), (33, 1))
    ]
    batch = make_batch(config, parts, torch.device("cpu"))
    kinds = config.donor_layers
    tensors = [batch.token_ids_R, *(t for kind in kinds for t in (*batch.stacks[kind], *batch.seen[kind][:3]))]
    assert [tensor.storage_offset() % 4 for tensor in tensors] == [0] * len(tensors)
    assert batch.token_ids_R.tolist() == [*range(3), *range(7), 0]
    seen = batch.seen["full_attention"]
    assert seen.positions_R.tolist() == [37, 38, 39, *range(7), 32]
    assert seen.owners_R.tolist() == [0] * 3 + [1] * 7 + [2]
    assert seen.tables.shape == (3, 2) and batch.most_rows == 40
    first, counts = (ints.tolist() for ints in batch.stacks["full_attention"])
    assert [*first[1:], 11] == [begin + count for begin, count in zip(first, counts, strict=True)]  # every row once


def attend_rows(run: Launch, pick: Sequence[int], window: int, behind: int) -> Tensor:
    """Attention of some rows of two sequences, in an order in which each one's rows lie together."""
    H, G, d = 4, 2, 16
    keys, values, tables = pool_of(G, d, [560, 50])
    positions, owners = [*range(540, 552), *range(31, 36)], [0] * 12 + [1] * 5
    queries = randn(MOST, H, d).bfloat16()[list(pick)]
    chosen = [owners[row] for row in pick]
    counts: list[int] = []
    for i, owner in enumerate(chosen):
        if i and chosen[i - 1] == owner:
            counts[-1] += 1
        else:
            counts.append(1)
    first, sizes = stacks_of(counts, attention.rows_of_stack(H, G)[0])
    stacks = Stacks(torch.tensor(first, dtype=torch.int32), torch.tensor(sizes, dtype=torch.int32))
    places = torch.tensor([positions[row] for row in pick], dtype=torch.int32)
    seen = Seen(places, torch.tensor(chosen, dtype=torch.int32), tables, window, behind)
    return attention.attend(run, queries, keys, values, stacks, seen, 560)


@pytest.mark.parametrize(
    ("core", "window", "behind"),
    [("Hopper", 0, 0), ("Ada", 40, 0), ("Hopper", 300, 1),
     *(pytest.param(*one, marks=pytest.mark.slow) for one in (("Ada", 0, 0), ("Hopper", 40, 0), ("Ada", 300, 1)))],
)  # fmt: skip
def test_attention(core: str, window: int, behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked with any rows, and with spans joined in one program or by another."""
    run = Interpreter(CORES[core])
    whole = attend_rows(run, range(MOST), window, behind)
    calls = [[11], [16], [7, 8, 9], [13, 14, 2, 3], [11, 0, 5, 16, 12], [*range(12, 17), *range(12)]]
    for call in calls:
        assert torch.equal(attend_rows(run, call, window, behind), whole[call])
    monkeypatch.setattr(attention, "MOST_SCRATCH", 0)
    for call in (list(range(MOST)), calls[2]):
        assert torch.equal(attend_rows(run, call, window, behind), whole[call])


@pytest.mark.parametrize(
    ("kind", "core"), [("bf16", "Hopper"), ("bf16", "Ada"), ("int8", "Ada"), ("int4", "Hopper"), ("fp8", "Ada")]
)
def test_experts(kind: str, core: str) -> None:
    """Whichever rows share an expert's tile, and in whichever tile."""
    E, D, I, k, run = 5, 64, 64, 2, Interpreter(CORES[core])  # noqa: E741
    gate, down = weight_of(kind, E * 2 * I, D)[0], weight_of(kind, E * D, I)[0]
    vectors = [1 + 0.2 * randn(n, seed=s) for s, n in enumerate([D, E, D, D, D])]
    moe = experts.DeviceExperts(randn(E, D).bfloat16(), vectors[0], vectors[1], gate, down, k, *vectors[2:])
    residual, sparse, dense = randn(MOST, D), randn(MOST, D, seed=2).bfloat16(), randn(1, MOST, D)

    def mixed(call: list[int]) -> Tensor:
        return experts.mixture(run, residual[call], sparse[call], dense[:, call].contiguous(), moe, 1e-6)[0]

    whole = mixed(list(range(MOST)))
    for call in ([0], [16], [3, 9], [*range(MOST), *range(MOST)[::-1], *range(MOST)]):
        assert torch.equal(mixed(call), whole[call])


def scores_with_ties(R: int, V: int) -> tuple[Tensor, DeviceWeight]:
    """Hidden states and a head of which many rows, so many logits, are equal."""
    weight, _ = weight_of("bf16", V, 64)
    some = torch.randint(0, V, (V,), generator=torch.Generator().manual_seed(3))
    data = weight.data.clone()
    data[V // 2 :] = data[some[V // 2 :] % (V // 2)]
    return 4 * randn(R, 64).bfloat16(), DeviceWeight(0, data, data, V, 64)


@pytest.mark.parametrize("temperatures", [[0.0], [0.3, 1.0, 1.7], [0.0, 0.8, 1e-5]])
@pytest.mark.parametrize("R", [3, 20])
def test_choices_are_the_general_ones(temperatures: list[float], R: int) -> None:
    """By the head and from stored logits, ties included, in any call."""
    V, seed, run = 500, 11, Interpreter()
    hidden, weight = scores_with_ties(R, V)
    logits = choice.logits(run, hidden, weight, 30.0)
    wanted, of_row = [], []
    for row in range(R):
        temperature = temperatures[row % len(temperatures)]
        params = SamplingParams(temperature=temperature, seed=seed)
        of_row.append((params.temperature, row_key(seed, row, STREAM_CHOICE)))
        candidates = Candidates(logits[row : row + 1], None, params.temperature or 1.0)
        wanted.append(int(general_choice(candidates, params, torch.tensor([row]))))
    rows = torch.arange(R, dtype=torch.int32)
    draws = draws_on(torch.device("cpu"), [t for t, _ in of_row], [k for _, k in of_row], [])
    assert choice.choose(run, hidden, weight, 30.0, rows, draws).tolist() == wanted
    assert choice.best_of(run, logits, None, draws).tolist() == wanted
    shuffled = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    ids = shuffled.expand(R, V).contiguous()
    assert choice.best_of(run, logits[:, shuffled].contiguous(), ids, draws).tolist() == wanted
    some = torch.tensor([R - 1, 0], dtype=torch.int32)
    of_some = None if draws is None else Draws(draws.temperatures_R[some.long()], draws.keys_R[some.long()])
    assert choice.choose(run, hidden, weight, 30.0, some, of_some).tolist() == [wanted[-1], wanted[0]]


FILTERED: list[dict[str, Any]] = [
    {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.3}, {"top_k": 40, "top_p": 0.95, "min_p": 0.01}, {"temperature": 0.0}, {},
    {"top_k": 1000, "top_p": 0.01}, {"min_p": 1.0}, {"top_k": 1}, {"top_k": 9, "temperature": 1e-5},
]  # fmt: skip


@pytest.mark.parametrize("size", [None, pytest.param(32, marks=pytest.mark.slow)])
def test_filtered_choices_are_the_general_ones(size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most logits have equals, some across slices, and the k-th and the last of a mass of top_p among them."""
    V, run, seed = 150, Interpreter(), 11
    monkeypatch.setattr(filters, "SLICE", size or filters.SLICE)
    monkeypatch.setattr(filters, "READ", min(64, filters.SLICE))
    rows = FILTERED[:6] if size is None else FILTERED * 6
    logits = (2 * randn(len(rows), V)).round() / 2
    logits[:, ::9] = -0.0
    params = [SamplingParams(**{"temperature": 0.4 + 0.3 * (i % 5), "seed": seed} | row) for i, row in enumerate(rows)]
    wanted = [
        int(general_choice(process(logits[i : i + 1], one), one, torch.tensor([i]))) for i, one in enumerate(params)
    ]
    keys = [row_key(seed, i, STREAM_CHOICE) for i in range(len(rows))]
    assert len({one.choice for one in params}) == 3

    def chosen(picked: list[int], shuffled: bool) -> list[int]:
        draws = draws_on(
            torch.device("cpu"), [params[i].temperature for i in picked], [keys[i] for i in picked],
            [params[i].filters for i in picked],
        )  # fmt: skip
        assert draws is not None and draws.filters is not None
        order = torch.randperm(V, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(V)
        ids = order.expand(len(picked), V).contiguous() if shuffled else None
        return choice.best_of(run, logits[picked][:, order].contiguous(), ids, draws).tolist()

    assert chosen(list(range(len(rows))), shuffled=False) == wanted
    assert chosen([3, 1], shuffled=True) == [wanted[3], wanted[1]]
    tied = [int((logits[i] == logits[i, token]).sum()) for i, token in enumerate(wanted)]
    assert sum(count > 1 for count in tied) > len(tied) / 2


def test_a_head_chooses_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows in another order, from logits of its own, all at once or a few at a time; and a row of NaN gets a token
    that there is."""
    run, params = Interpreter(), SamplingParams(temperature=0.9, top_k=5, seed=3)
    hidden, weight = scores_with_ties(4, 130)
    hidden[3] = torch.nan
    logits = choice.logits(run, hidden, weight, 30.0)
    keys = [row_key(3, row, STREAM_CHOICE) for row in (2, 0, 3)]
    draws = draws_on(torch.device("cpu"), [0.9] * 3, keys, [params.filters] * 3)
    found = choice.choose(run, hidden, weight, 30.0, torch.tensor([2, 0, 3], dtype=torch.int32), draws).tolist()
    monkeypatch.setattr(choice, "FILTERED_ROWS", 2)
    run.launches.clear()
    assert choice.choose(run, hidden, weight, 30.0, torch.tensor([2, 0, 3], dtype=torch.int32), draws).tolist() == found
    assert run.launches.count("draw_kernel") == 2
    places = torch.tensor([2, 0])
    assert found[:2] == general_choice(process(logits[[2, 0]], params), params, places).tolist()
    assert 0 <= found[2] < 130
    assert 0 <= choice.best_of(run, logits, None, None).tolist()[3] < 130


ROW_CALLS: list[list[int]] = [[0], [6], [5, 2], [6, 5, 4, 3, 2, 1, 0], [4, 4, 4]]


def test_what_happens_to_a_row_between_products() -> None:
    """Embeddings, norms, the residual stream, per-layer inputs and a layer's heads: alone, permuted and repeated."""
    run, D, L, P, R = Interpreter(), 48, 2, 16, 7
    table, _ = weight_of("bf16", 23, D)
    ple_table, _ = weight_of("bf16", 23, L * P)
    tokens = torch.arange(3, 3 + 2 * R, 2, dtype=torch.int32)
    branch, residual, projected = randn(3, R, D), randn(R, D), randn(2, R, L * P)
    shape, parts = heads.Heads(2, 1, 16, False, True, 1.0), randn(2, R, 4 * 16)
    keys, values, tables = pool_of(1, 16, [70, 40])
    positions, owners = torch.tensor([69, 33, 5, 68, 7, 39, 0]), torch.tensor([0, 1, 1, 0, 0, 1, 1])
    angles = torch.arange(70)[:, None] / 7 * torch.arange(1, 9)

    def played(call: list[int]) -> list[Tensor]:
        raw, moved = torch.empty(len(call), D, dtype=torch.bfloat16), residual[call].clone()
        embedded = row_kernels.embed(run, tokens[call], table, 7.0, raw)
        out = row_kernels.add_normed(run, branch[:, call].contiguous(), moved, randn(D), 1e-6, randn(D, seed=2))
        queries = heads.finish_heads(
            run, parts[:, call].contiguous(), shape, randn(16), randn(16, seed=4), (angles.cos(), angles.sin()),
            positions[call].int(), owners[call].int(), tables, keys, values, 1e-6,
        )  # fmt: skip
        blocks, places = tables[owners[call], positions[call] // 32].long(), positions[call] % 32
        inputs = row_kernels.per_layer_inputs(
            run, tokens[call], projected[:, call].contiguous(), ple_table, randn(P), 4.0, 0.1, 1e-6
        )
        gated = row_kernels.ple_gated(run, projected[:, call, :P].contiguous(), inputs[0])
        return [
            embedded, raw, moved, out, row_kernels.norm(run, moved, randn(D), 1e-6), queries, keys[0, blocks, places],
            values[0, blocks, places], inputs.transpose(0, 1), gated,
        ]  # fmt: skip

    whole = played(list(range(R)))
    for call in ROW_CALLS:
        assert all(torch.equal(one, other[call]) for one, other in zip(played(call), whole, strict=True))


@pytest.mark.parametrize("core", CORES)
def test_a_centroid_head_scores_rows_apart(core: str) -> None:
    run = Interpreter(CORES[core])
    scores, table = weight_of("bf16", 9, 64)[0], weight_of("int8", 9 * 20, 64, seed=4)[0]
    head = centroids.DeviceCentroids(scores, table, torch.randperm(180), 3)
    hidden = randn(7, 64).bfloat16()
    whole = centroids.candidates(run, hidden, head)
    for call in ROW_CALLS[:4]:
        found = centroids.candidates(run, hidden[call], head)
        assert all(torch.equal(one, other[call]) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize("core", CORES)
def test_logits_of_a_row_are_those_of_the_call(core: str) -> None:
    run = Interpreter(CORES[core])
    hidden, weight = scores_with_ties(MOST, 130)
    whole = choice.logits(run, hidden, weight, 30.0)
    for call in ([0], [16, 2], list(range(9))):
        assert torch.equal(choice.logits(run, hidden[call], weight, 30.0), whole[call])
