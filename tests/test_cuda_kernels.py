"""Each kernel against float64, in Triton's interpreter: all kinds of weights, odd sizes, outputs that begin as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tensor_core_model
import torch
import torch.nn.functional as F
from tensor_core import Interpreter
from torch import Tensor

from gemma_mtp.backend.cuda import attention, centroids, choice, experts, heads, linear, rows
from gemma_mtp.backend.cuda.batch import stacks_of
from gemma_mtp.backend.cuda.tiles import PARALLEL_ROWS, part_count
from gemma_mtp.backend.cuda.weights import DeviceWeight, device_weight, fp8_weight
from gemma_mtp.kv.blocks import BLOCK_ROWS
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.formats import FORMATS

EPS = 1e-6
KINDS = ("bf16", "int8", "int4", "q8_0", "fp8", "fp8 by rows")
RUN = Interpreter()


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest of integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight_of(kind: str, N: int, K: int, seed: int = 1) -> tuple[DeviceWeight, Tensor]:
    """A random weight, and its values in float64."""
    values = randn(N, K, seed=seed) / K**0.5
    if kind == "bf16":
        return device_weight(Dense(values.bfloat16())), values.bfloat16().double()
    if kind in FORMATS:
        matrix = FORMATS[kind].of(Dense(values))
        return device_weight(matrix), matrix.values().double()
    scales = 0.01 * (1 + randn(N, -(-K // 128), seed=seed).abs())
    wide = scales.repeat_interleave(128, 1)[:, :K]
    stored = (values / wide).to(torch.float8_e4m3fn)
    return fp8_weight(stored, scales), stored.double() * wide.double()


def close(found: Tensor, expected: Tensor, relative: float = 3e-6) -> None:
    """Within a share of the largest number."""
    assert found.isfinite().all()
    assert (found.double() - expected).abs().max() <= relative * expected.abs().max()


BF16 = 2.0**-8


@pytest.mark.parametrize(("R", "N", "K"), [(1, 70, 832), (17, 33, 576), (3, 130, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, R: int, N: int, K: int) -> None:
    weight, values = weight_of(kind, N, K)
    x = randn(R, K).bfloat16()
    parts = linear.linear(RUN, x, weight)
    assert len(parts) == (1 if R > PARALLEL_ROWS else part_count(N, K))
    close(parts.double().sum(0), x.double() @ values.T)


@pytest.mark.parametrize("K", [4, 24, 96, 300])
def test_linear_of_columns_that_fill_no_step(K: int) -> None:
    weight, values = weight_of("bf16", 19, K)
    x = randn(5, K).bfloat16()
    close(linear.linear(RUN, x, weight).double().sum(0), x.double() @ values.T)


@pytest.mark.parametrize("kind", KINDS)
def test_gate_up(kind: str) -> None:
    weight, values = weight_of(kind, 2 * 45, 192)
    x = randn(18, 192).bfloat16()
    gate, up = (x.double() @ values.T).split(45, 1)
    close(linear.gate_up(RUN, x, weight), F.gelu(gate, approximate="tanh") * up, BF16)


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "q8_0"])
def test_embeddings(kind: str) -> None:
    table, values = weight_of(kind, 23, 192)
    tokens = torch.tensor([3, 22, 0, 3], dtype=torch.int32)
    raw = torch.empty(4, 500, dtype=torch.bfloat16)
    found = rows.embed(RUN, tokens, table, 14.0, raw)
    close(found, values[tokens.long()] * 14)
    close(raw[:, :192], values[tokens.long()] * 14, BF16)
    assert raw[:, 192:].isnan().all()


@pytest.mark.parametrize("D", [7, 64, 200])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_stream(D: int, parts: int, scaled: bool) -> None:
    branch, residual, post, following = randn(parts, 5, D), randn(5, D), randn(D), randn(D, seed=9)
    scalar = torch.tensor([0.7]) if scaled else None
    expected = residual.double() + normed(branch.double().sum(0)) * post.double()
    expected = expected * (scalar.double() if scalar is not None else 1)
    for norm in (None, following):
        moved = residual.clone()
        out = rows.add_normed(RUN, branch, moved, post, EPS, norm, scalar)
        close(moved, expected)
        close(out, expected if norm is None else normed(expected) * norm.double(), BF16)
    close(rows.norm(RUN, residual, post, EPS), normed(residual.double()) * post.double(), BF16)
    close(rows.added(RUN, branch), branch.double().sum(0))


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "q8_0"])
def test_per_layer_inputs(kind: str) -> None:
    L, P, R = 4, 48, 3  # 192 columns: a row of a layer ends inside of a group
    table, values = weight_of(kind, 11, L * P)
    projected, weight, tokens = randn(2, R, L * P), randn(P), torch.tensor([10, 0, 4], dtype=torch.int32)
    own = values[tokens.long()].unflatten(1, (L, P)) * 6
    expected = (normed(projected.double().sum(0).unflatten(1, (L, P)) * 0.1) * weight.double() + own) * 0.5**0.5
    close(rows.per_layer_inputs(RUN, tokens, projected, table, weight, 6.0, 0.1, EPS), expected.transpose(0, 1))
    gate, inputs = randn(2, R, P, seed=5), randn(R, P, seed=6)
    gated = F.gelu(gate.double().sum(0), approximate="tanh") * inputs.double()
    close(rows.ple_gated(RUN, gate, inputs), gated, BF16)


def pool_of(G: int, d: int, lengths: list[int], seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a pool, and block tables in an order of their own."""
    counts = [-(-length // BLOCK_ROWS) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    begin = 0
    for line, count in zip(tables, counts, strict=True):
        line[:count] = order[begin : begin + count]
        begin += count
    keys, values = (randn(G, len(order), BLOCK_ROWS, d, seed=seed + i).bfloat16() for i in range(2))
    return keys, values, tables


@pytest.mark.parametrize(("key_is_value", "value_norm"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("rotated", [4, 8])
def test_heads(key_is_value: bool, value_norm: bool, rotated: int) -> None:
    shape = heads.Heads(4, 2, 16, key_is_value, value_norm, 0.5)
    N = (4 + 2 + (0 if key_is_value else 2)) * 16
    parts, q_norm, k_norm = randn(2, 3, N), randn(16), randn(16, seed=8)
    keys, values, tables = pool_of(2, 16, [70, 40])
    positions, owners = torch.tensor([69, 33, -1], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)
    angles = torch.arange(70)[:, None] / 7 * torch.arange(1, rotated + 1)
    before = keys.clone(), values.clone()
    queries = heads.finish_heads(
        RUN, parts, shape, q_norm, k_norm, (angles.cos(), angles.sin()), positions, owners, tables, keys, values, EPS
    )
    projected = parts.double().sum(0).unflatten(1, (-1, 16))

    def turned(x: Tensor, position: int) -> Tensor:
        c, s = torch.ones(8).double(), torch.zeros(8).double()
        c[:rotated], s[:rotated] = angles[position].double().cos(), angles[position].double().sin()
        low, high = x[..., :8], x[..., 8:]
        return torch.cat((low * c - high * s, high * c + low * s), -1)

    for row, (position, owner) in enumerate([(69, 0), (33, 1)]):
        q, k = projected[row, :4], projected[row, 4:6]
        v = k if key_is_value else projected[row, 6:]
        close(queries[row], turned(normed(q) * q_norm.double(), position) * 0.5, BF16)
        place = int(tables[owner, position // BLOCK_ROWS]), position % BLOCK_ROWS
        close(keys[:, place[0], place[1]], turned(normed(k) * k_norm.double(), position), BF16)
        close(values[:, place[0], place[1]], normed(v) if value_norm else v, BF16)
        for stored, old in zip((keys, values), before, strict=True):
            stored[:, place[0], place[1]] = old[:, place[0], place[1]]
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])  # nothing else was written


def attended(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, rows_seen: range) -> Tensor:
    """float64 attention of one row's heads [H, d]."""
    at = torch.tensor(list(rows_seen))
    blocks, places = table[at // BLOCK_ROWS].long(), at % BLOCK_ROWS
    k, v = (stored[:, blocks, places].double().repeat_interleave(len(q) // len(stored), 0) for stored in (keys, values))
    return (torch.einsum("hd,hsd->hs", q.double(), k).softmax(-1).unsqueeze(-1) * v).sum(1)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("H", "G", "d", "window", "behind"),
    [(4, 2, 16, 0, 0), (6, 2, 24, 40, 0), (8, 1, 8, 300, 0), (3, 3, 32, 40, 1), (4, 2, 16, 0, 1)],
)
def test_attention(
    H: int, G: int, d: int, window: int, behind: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts on both sides of blocks and of spans; two sequences, and a row of padding."""
    if joined:
        monkeypatch.setattr(attention, "MOST_SCRATCH", 0)
    lengths, counts = [522, 34], [9, 2]
    keys, values, tables = pool_of(G, d, lengths)
    positions = torch.tensor([*range(513, 522), 32, -1], dtype=torch.int32)
    owners = torch.tensor([0] * 9 + [1, 1], dtype=torch.int32)
    queries = randn(11, H, d).bfloat16()
    first, sizes = stacks_of(counts, attention.rows_of_stack(H, G)[0])
    stacks = attention.Stacks(torch.tensor(first, dtype=torch.int32), torch.tensor(sizes, dtype=torch.int32))
    seen = attention.Seen(positions, owners, tables, window, behind)
    found = attention.attend(RUN, queries, keys, values, stacks, seen, 522)
    for row in (0, 4, 8, 9):
        position = int(positions[row])
        begin = max(0, position - window + 1) if window else 0
        expected = attended(queries[row], keys, values, tables[owners[row]], range(begin, position + 1 - behind))
        close(found[row].view(H, d), expected, 2 * BF16)
    assert (found[10] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_logits(kind: str, cap: float | None) -> None:
    weight, values = weight_of(kind, 150, 64)
    hidden = randn(3, 64).bfloat16() * 5
    expected = hidden.double() @ values.T
    close(choice.logits(RUN, hidden, weight, cap), expected if cap is None else (expected / cap).tanh() * cap)


@pytest.mark.parametrize("kind", KINDS)
def test_centroid_head(kind: str) -> None:
    clusters, size, D = 13, 70, 64
    scores, score_values = weight_of("bf16", clusters, D)
    table, values = weight_of(kind, clusters * size, D, seed=4)
    ids = torch.randperm(clusters * size, generator=torch.Generator().manual_seed(2))
    hidden = randn(4, D).bfloat16()
    head = centroids.DeviceCentroids(scores, table, ids, 3)
    logits, token_ids = centroids.candidates(RUN, hidden, head)
    best = (hidden.double() @ score_values.T).topk(3).indices
    places = (best[:, :, None] * size + torch.arange(size)).flatten(1)
    assert torch.equal(token_ids, ids[places])
    close(logits, (hidden.double() @ values.T).gather(1, places))


@pytest.mark.parametrize(
    ("kind", "R"), [("bf16", 1), ("bf16", 40), ("int8", 5), ("int4", 40), ("q8_0", 5), ("fp8", 5), ("fp8 by rows", 1)]
)
def test_experts(kind: str, R: int) -> None:
    E, D, I, k = 6, 64, 64, 2  # noqa: E741
    gate_up, gate_up_values = weight_of(kind, E * 2 * I, D)
    down, down_values = weight_of(kind, E * D, I, seed=5)
    router = randn(E, D).bfloat16()
    vectors = [1 + 0.2 * randn(n, seed=s) for s, n in enumerate([D, E, D, D, D])]
    moe = experts.DeviceExperts(router, vectors[0], vectors[1], gate_up, down, k, *vectors[2:])
    residual, sparse, dense = randn(R, D), randn(R, D, seed=2).bfloat16(), randn(2, R, D)
    scores = (normed(residual.double()) * vectors[0].double() * D**-0.5) @ router.double().T
    likely, chosen = scores.softmax(-1).topk(k)
    expected = torch.zeros(R, D).double()
    for row in range(R):
        for weight, expert in zip(likely[row] / likely[row].sum(), chosen[row].tolist(), strict=True):
            gate, up = (sparse[row].double() @ gate_up_values.view(E, 2 * I, D)[expert].T).split(I)
            hidden = F.gelu(gate, approximate="tanh") * up
            expected[row] += weight * vectors[1][expert].double() * (down_values.view(E, D, I)[expert] @ hidden)
    expected = normed(dense.double().sum(0)) * vectors[2].double() + normed(expected) * vectors[4].double()
    found_experts, _ = experts.route(RUN, residual, moe, EPS)
    assert torch.equal(found_experts.long(), chosen)
    close(experts.mixture(RUN, residual, sparse, dense, moe, EPS)[0], expected, 2 * BF16)


def test_nan_leads_to_no_table_that_there_is_not() -> None:
    """Of weights that are broken: a drafter's only cost speed, so no kernel may read beyond its memory for them."""
    clusters, size, D = 13, 70, 64
    scores, table, ids = weight_of("bf16", clusters, D)[0], weight_of("bf16", clusters * size, D)[0], torch.arange(910)
    head, hidden = centroids.DeviceCentroids(scores, table, ids, 3), randn(2, D).bfloat16()
    hidden[1] = torch.nan
    found = centroids.candidates(RUN, hidden, head)
    assert 0 <= int(found[1].min()) and int(found[1].max()) < clusters * size
    assert all(
        torch.equal(one[:1], alone)
        for one, alone in zip(found, centroids.candidates(RUN, hidden[:1], head), strict=True)
    )
    E, ones = 6, torch.ones(D)
    moe = experts.DeviceExperts(randn(E, D).bfloat16(), ones, torch.ones(E), table, table, 2, ones, ones, ones)
    chosen, _ = experts.route(RUN, torch.full((1, D), torch.nan), moe, EPS)
    assert 0 <= int(chosen.min()) and int(chosen.max()) < E


def test_the_model_of_a_tensor_core_is_one() -> None:
    """Small numbers beside a large one are cut: 25 bits on Hopper, 24 on Ada, which takes 8 products at once."""
    a, b = torch.zeros(1, 16).double().numpy(), torch.ones(16, 1).double().numpy()
    a[0, :3] = 1.0, 2.0**-25, 2.0**-26
    zero = torch.zeros(1, 1).numpy()
    for core, cut in ((tensor_core_model.HOPPER, 2.0**-25), (tensor_core_model.ADA, 0.0)):
        assert tensor_core_model.product(a, b, zero, core)[0, 0] == torch.tensor(1 + cut).float()
    a[0] = 0
    a[0, :9] = [1.0] + [2.0**-24] * 8
    hopper, ada = (
        float(tensor_core_model.product(a, b, zero, core)[0, 0])
        for core in (tensor_core_model.HOPPER, tensor_core_model.ADA)
    )
    assert hopper == 1 + 2.0**-21 and ada == 1 + 3 * 2.0**-23
