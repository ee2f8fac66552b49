"""What a run of an engine takes of memory beside its blocks of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.decoding.round_costs import LONGEST
from gemma_mtp.sizes import card
from gemma_mtp.sizes.machine import Build
from gemma_mtp.sizes.weights import (
    drafter_read_bytes,
    layers_read,
    target_read_bytes,
    weight_bytes,
    wide_copies,
)
from gemma_mtp.weight_types import WeightTypes

Operators = Literal["native", "reference", "cuda"]
#: prompt rows of one call, at most. Native: enough to use the cores, few enough that activations stay in the caches
NATIVE_CHUNK_ROWS, REFERENCE_CHUNK_ROWS = 128, 512
CHUNK_ROWS: Mapping[Operators, int] = {
    "native": NATIVE_CHUNK_ROWS, "reference": REFERENCE_CHUNK_ROWS, "cuda": card.CARD_CHUNK_ROWS,
}  # fmt: skip
#: what Python and PyTorch take on the host once something has been decoded, the models and the pool left out: measured
#: without a GPU with PyTorch 2.13 (`tests/test_plan_resident.py` prints it); a CUDA context comes on top of it
PROCESS_BYTES: Mapping[Build, int] = {"cpu": 295_000_000, "cuda": 595_000_000}
#: what CUDA's context and its libraries' workspaces take of a GPU, about
CUDA_CONTEXT_BYTES = 700_000_000
#: what a tokenizer takes, by token of its vocabulary: 193 MB of 262144 tokens and as many merges were measured
TOKENIZER_BYTES = 740
FLOAT_BYTES = 4
HEAD_CHUNK = 256  # rows of the head that a thread of the native operators scores at once
BLOCK = 16  # rows that the reference computes at once


def kv_element_bytes(operators: Operators, dense_bytes: int) -> int:
    """Returns the bytes of a cached number: the native operators keep float32, the others the weights' dtype
    (`backend.select.kv_dtype`, which needs PyTorch); the GPU's kernels have no other than bfloat16."""
    return FLOAT_BYTES if operators == "native" else dense_bytes


class Held(NamedTuple):
    """The bytes of a target's and a drafter's weights once they are loaded; None where the types say them."""

    target: int | None = None
    drafter: int | None = None


NOT_MEASURED = Held()


@dataclass(frozen=True)
class Loaded:
    """A pair as it is loaded: its types, the bytes of a dense weight and of a cached number, and what runs it.

    `held`: the bytes of weights where a checkpoint's own files say them, because some stay as they are stored; else
    they follow from the types.
    """

    target: TargetConfig
    drafter: DrafterConfig | None
    types: WeightTypes
    dense_bytes: int
    kv_bytes: int
    operators: Operators
    threads: int = 1
    tokenizer: bool = True
    held: Held = NOT_MEASURED

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS[self.operators]

    def target_weights(self) -> int:
        of_types = weight_bytes(self.target, self.types, self.dense_bytes)
        return of_types if self.held.target is None else self.held.target

    def drafter_weights(self) -> int:
        """Returns the drafter's bytes, its reordered head included."""
        if self.drafter is None:
            return 0
        of_types = weight_bytes(self.drafter, self.types, self.dense_bytes)
        return (of_types if self.held.drafter is None else self.held.drafter) + self._copies(self.drafter)

    def target_read_bytes(self, rows: int) -> float:
        """Returns the bytes of the target's weights that a call of so many rows reads. What stays as it is stored is
        taken to be spread evenly over what can be quantised."""
        read = target_read_bytes(self.target, self.types, self.dense_bytes, rows)
        saved = weight_bytes(self.target, self.types, self.dense_bytes) - self.target_weights()
        return read - (saved * layers_read(self.target, self.types, self.dense_bytes, rows) if saved else 0.0)

    def drafter_read_bytes(self) -> float:
        """Returns the bytes of the drafter's weights that one draft reads."""
        assert self.drafter is not None
        read = drafter_read_bytes(self.drafter, self.types, self.dense_bytes)
        return (
            read
            if self.held.drafter is None
            else read * self.held.drafter / weight_bytes(self.drafter, self.types, self.dense_bytes)
        )

    def target_copies(self) -> int:
        return self._copies(self.target)

    def _copies(self, config: TargetConfig | DrafterConfig) -> int:
        return 0 if self.operators == "reference" else wide_copies(config, self.dense_bytes)

    def tokenizer_bytes(self) -> int:
        return self.target.text.vocab_size * TOKENIZER_BYTES if self.tokenizer else 0

    def rope_bytes(self, context: int) -> int:
        """Returns the bytes of rotary tables: the native operators keep those of every position, in advance of twice
        as many, and the GPU's kernels too; the reference computes a call's own."""
        text = self.target.text
        if self.operators == "cuda":
            return card.rope_bytes(text, context)
        per_position = 2 * FLOAT_BYTES * sum(_head_dims(text))
        if self.operators == "reference":
            return self.chunk_rows * per_position
        rows = context + LONGEST + 1
        return max(rows, min(2 * rows, text.max_position_embeddings)) * per_position

    def activation_bytes(self, sequences: int, draft_tokens: int, context: int) -> int:
        """Returns the bytes of what a step computes, at most: a prompt's rows beside a round of every sequence. On a
        card rounds have memory of their own, and as many drafts as there can be."""
        if self.operators == "cuda":
            text = self.target.text
            return card.step_bytes(text, self.drafter, sequences) + card.round_bytes(text, self.drafter, sequences)
        if self.operators == "native":
            rows = self.chunk_rows + sequences * (draft_tokens + 1)
            target = _native_shared(self.target.text, rows) + self.threads * _native_scratch(self.target.text, rows)
            if self.drafter is None:
                return target
            text = self.drafter.text
            return target + _native_shared(text, sequences)  # a thread's own buffers are shared by both models
        return _reference_activations(self.target.text, context, self.kv_bytes)

    def recorded_bytes(self, sequences: int) -> int:
        """Returns the bytes that rounds recorded on a card take, and what is lost there between pieces of memory."""
        return card.kept_bytes(sequences) if self.operators == "cuda" else 0


def _head_dims(text: TextConfig) -> list[int]:
    """Head sizes of the layer types that there are."""
    dims = {text.layer_types[layer]: text.layer_head_dim(layer) for layer in range(text.num_hidden_layers)}
    return list(dims.values())


def _native_shared(text: TextConfig, rows: int) -> int:
    """Buffers that threads share (`Shared::reserve` of `src/native/scratch.cpp`)."""
    layers = range(text.num_hidden_layers)
    D, P, H = text.hidden_size, text.hidden_size_per_layer_input, text.num_attention_heads
    qkv = max(
        (H + (0 if text.is_kv_shared(i) else 2 * text.layer_kv_heads(i))) * text.layer_head_dim(i) for i in layers
    )
    attended = max(H * text.layer_head_dim(i) for i in layers)
    width = max(text.layer_intermediate_size(i) for i in layers)
    experts = text.top_k_experts * (text.moe_intermediate_size + D) if text.enable_moe_block else 0
    ple = len(layers) * P + P + D if P else 0
    return FLOAT_BYTES * rows * (D + qkv + attended + width + D + width + experts + ple)


def _native_scratch(text: TextConfig, rows: int) -> int:
    """One thread's own buffers (`Scratch`): the residual stream, its norm, prepared rows, products under way."""
    D, P, L = text.hidden_size, text.hidden_size_per_layer_input, text.num_hidden_layers
    widest = max(
        max(text.layer_intermediate_size(i), text.num_attention_heads * text.layer_head_dim(i)) for i in range(L)
    )
    experts = rows * max(D, text.num_experts) if text.enable_moe_block else 0
    return FLOAT_BYTES * (rows * (2 * D + widest + HEAD_CHUNK) + L * P + experts)


def _reference_activations(text: TextConfig, context: int, element: int) -> int:
    """A block of rows through one layer: its widest product, and the gathered keys, values and scores of attention."""
    layers = range(text.num_hidden_layers)
    width = max(2 * text.layer_intermediate_size(i) for i in layers)
    attention = 0
    for i in layers:
        seen = context if not text.is_sliding(i) else min(context, text.sliding_window + BLOCK)
        gathered = 2 * 2 * text.layer_kv_heads(i) * seen * text.layer_head_dim(i) * element  # and made contiguous
        scores = 2 * text.num_attention_heads * BLOCK * seen * FLOAT_BYTES
        attention = max(attention, gathered + scores)
    return BLOCK * (width + 4 * text.hidden_size) * FLOAT_BYTES + attention + text.vocab_size * FLOAT_BYTES
