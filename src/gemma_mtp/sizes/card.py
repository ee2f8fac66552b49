"""What the GPU's kernels take of a card beside weights and blocks of keys and values: integers, from configurations.

The same numbers size an engine's pool on a card and a plan for one. Those of recorded rounds and of the slack are
estimates: no card has shown them yet.
"""

from __future__ import annotations

from gemma_mtp.config import DrafterConfig, TextConfig
from gemma_mtp.decoding.round_costs import CONTEXT_ROWS, LONGEST
from gemma_mtp.kv.blocks import block_bytes, block_counts

#: positions that the smallest recorded round and rotary tables reach
LEAST_REACH = 1024
#: prompt rows of one call, at most
CARD_CHUNK_ROWS = 512
#: bytes of attention's results by span, at most: beyond, one program joins all of its spans
SPANS_BYTES = 1 << 28
#: rows whose filtered choices are made together: their logits and weights lie in memory
FILTERED_ROWS = 64
#: rows of a product's float32 result in parts, at most: a call of more rows has them added already
PART_ROWS = 128
#: rounds that a pool keeps recorded for each number of places, in all, and what the driver keeps of each
RECORDED_EACH, MOST_RECORDED, RECORDED_BYTES = 12, 32, 10_000_000
#: code of kernels, and what the allocator's pieces leave unused
SLACK_BYTES = 200_000_000
#: of each logit that is chosen from outside of a round: what its keys, masses, noise and a sort of them take
CHOICE_BYTES = 80
FLOAT, HALF = 4, 2


def places_of(sequences: int) -> int:
    """Returns the places of a round of so many sequences: a power of two."""
    return 1 << (sequences - 1).bit_length()


def recorded_rounds(sequences: int) -> int:
    """Returns how many rounds a pool of so many sequences keeps recorded at most."""
    return min(MOST_RECORDED, RECORDED_EACH * places_of(sequences).bit_length())


def rope_rows(positions: int) -> int:
    """Returns how many positions rotary tables are made for where so many are asked for: a power of two, so that all
    smaller ones together, which were recorded with, are no larger."""
    return 1 << (max(positions, LEAST_REACH) - 1).bit_length()


def rope_bytes(text: TextConfig, context: int) -> int:
    """Returns the bytes of rotary tables that reach so far, and of smaller ones."""
    of_position = 0
    for kind in sorted(set(text.layer_types)):
        rope, d = text.rope(kind), text.layer_head_dim(text.layer_types.index(kind))
        of_position += 2 * FLOAT * int(rope.partial_rotary_factor * d // 2)
    return 2 * rope_rows(context) * of_position


def call_bytes(text: TextConfig, rows: int) -> int:
    """Returns the bytes that a call of so many rows takes at most while it runs, its choices left out."""
    D, P, L, H = text.hidden_size, text.hidden_size_per_layer_input, text.num_hidden_layers, text.num_attention_heads
    in_parts = FLOAT * max(rows, PART_ROWS)
    ple = FLOAT * rows * L * P  # every layer's inputs are there from the beginning
    lasting = rows * D * (FLOAT + 4 * HALF) + ple
    return lasting + max(in_parts * L * P, *(_layer_bytes(text, i, rows, in_parts, H) for i in range(L)))


def _layer_bytes(text: TextConfig, layer: int, rows: int, in_parts: int, H: int) -> int:
    """The most that a layer's steps take: the largest product, or attention's results by span."""
    D, d, G = text.hidden_size, text.layer_head_dim(layer), text.layer_kv_heads(layer)
    qkv, queries = in_parts * (H + 2 * G) * d, HALF * rows * H * d
    spans = SPANS_BYTES + SPANS_BYTES * 2 // d
    width = text.layer_intermediate_size(layer)
    branch = in_parts * D + HALF * rows * width
    if text.enable_moe_block:
        branch += text.top_k_experts * rows * (HALF * text.moe_intermediate_size + FLOAT * D) + 2 * FLOAT * rows * D
    return max(qkv + queries, 2 * queries + spans, queries + in_parts * D, branch)


def round_bytes(target: TextConfig, drafter: DrafterConfig | None, sequences: int) -> int:
    """Returns the bytes that a round of so many sequences takes at most while the device plays it."""
    places = places_of(sequences)
    rows = places * (LONGEST + 1 if drafter is not None else 1)
    V = target.vocab_size
    filtered = 2 * FLOAT * min(rows, FILTERED_ROWS) * V + rows * HALF * target.hidden_size
    found = max(call_bytes(target, rows), filtered)
    if drafter is not None:
        found = max(found, call_bytes(drafter.text, places) + _projections(drafter, places))
    return found


def _projections(drafter: DrafterConfig, rows: int) -> int:
    D = drafter.backbone_hidden_size
    return FLOAT * max(rows, PART_ROWS) * max(D, drafter.text.hidden_size) + 8 * rows * D


def measured_bytes(target: TextConfig, sequences: int) -> int:
    """Returns the bytes that it takes to measure what rounds of so many sequences cost: a pool of their own."""
    of_one = block_counts(target.sliding_window, CONTEXT_ROWS + 1 + LONGEST, CONTEXT_ROWS)
    pool = sum(count * block_bytes(target, kind, HALF) for kind, count in of_one.items())
    return places_of(sequences) * pool + call_bytes(target, CONTEXT_ROWS)


def step_bytes(target: TextConfig, drafter: DrafterConfig | None, sequences: int) -> int:
    """Returns the bytes that what is not a recorded round takes at most: a chunk of prompts beside all sequences' rows,
    choices of logits that are processed one sequence after another, or measuring, which comes before."""
    rows = LONGEST + 1 if drafter is not None else 1
    V = target.vocab_size
    choices = 2 * FLOAT * sequences * rows * V + CHOICE_BYTES * rows * V  # logits of the target and of drafts
    measured = 0 if drafter is None else measured_bytes(target, sequences)
    return max(call_bytes(target, CARD_CHUNK_ROWS + sequences * rows), choices, measured)


def workspace_bytes(target: TextConfig, drafter: DrafterConfig | None, sequences: int, context: int) -> int:
    """Returns the bytes of a card that decoding takes beside weights and a pool, of so many sequences of so many tokens
    at most: what is computed with, recorded rounds and rotary tables."""
    return (
        step_bytes(target, drafter, sequences) + round_bytes(target, drafter, sequences)
        + kept_bytes(sequences) + rope_bytes(target, context)
    )  # fmt: skip


def kept_bytes(sequences: int) -> int:
    """Returns the bytes that stay taken between steps: of recorded rounds, and the slack."""
    return recorded_rounds(sequences) * RECORDED_BYTES + SLACK_BYTES
