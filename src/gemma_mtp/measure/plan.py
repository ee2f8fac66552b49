"""What a pair takes, what fits into a memory, and what drafting would gain: from configurations, without PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_mtp.config import FULL, SLIDING, LayerType, TextConfig
from gemma_mtp.decoding.draft_length import best_length, expected_tokens
from gemma_mtp.engine.pool_size import largest, pool_blocks, pool_bytes, sequence_blocks
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.kv.blocks import block_bytes, layer_row_bytes
from gemma_mtp.sizes.machine import torch_build
from gemma_mtp.sizes.run import CUDA_CONTEXT_BYTES, PROCESS_BYTES, Loaded

#: drafts a round that gains are predicted for
LONGEST_GAIN = 8
#: sequences that are counted at most
MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Load:
    """How a pair is used: sequences together, tokens of each (prompt and output), drafts a round."""

    sequences: int
    context: int
    draft_tokens: int


@dataclass(frozen=True)
class Takes:
    """Bytes by part. `workspace`: rotary tables, hidden states, the tokenizer, rounds recorded on a card and
    copies of weights that operators keep; `process`: what the program takes before anything is loaded."""

    weights: int
    drafter: int
    kv_full: int
    kv_sliding: int
    activations: int
    workspace: int
    process: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def kv(self) -> int:
        return self.kv_full + self.kv_sliding

    @property
    def drafter_share(self) -> float:
        """The drafter's part of the total."""
        return self.drafter / self.total

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kv": self.kv, "total": self.total, "drafter_share": self.drafter_share}


def engine_settings(loaded: Loaded, load: Load) -> EngineSettings:
    """Returns settings of an engine whose pool holds so many sequences, each with all its tokens."""
    text = loaded.target.text
    counts = sequence_blocks(text, load.context, loaded.chunk_rows, load.sequences)
    size = pool_bytes(text, counts, loaded.kv_bytes)
    return EngineSettings(max_running=load.sequences, max_tokens=load.context, kv_memory_mb=size / 10**6)


def takes(loaded: Loaded, load: Load, gpu: bool = False) -> Takes:
    """Returns what the pair and an engine with `engine_settings` take, once every sequence has all its tokens."""
    text = loaded.target.text
    counts = pool_blocks(text, engine_settings(loaded, load), load.context, loaded.chunk_rows, loaded.kv_bytes)
    by_kind: dict[LayerType, int] = {
        kind: count * block_bytes(text, kind, loaded.kv_bytes) for kind, count in counts.items()
    }
    host = 0 if gpu else loaded.tokenizer_bytes()
    states = load.sequences * text.hidden_size * loaded.kv_bytes
    return Takes(
        weights=loaded.target_weights(),
        drafter=loaded.drafter_weights(),
        kv_full=by_kind[FULL],
        kv_sliding=by_kind[SLIDING],
        activations=loaded.activation_bytes(load.sequences, load.draft_tokens, load.context),
        workspace=loaded.rope_bytes(load.context)
        + loaded.target_copies()
        + states
        + host
        + loaded.recorded_bytes(load.sequences),
        process=CUDA_CONTEXT_BYTES if gpu else PROCESS_BYTES[torch_build()],
    )


def largest_context(loaded: Loaded, load: Load, memory: float, gpu: bool = False) -> int:
    """Returns the most tokens that each of the load's sequences can have; 0 where not even one token fits."""
    most = loaded.target.text.max_position_embeddings
    return largest(lambda n: takes(loaded, replace(load, context=n), gpu).total <= memory, most)


def most_sequences(loaded: Loaded, load: Load, memory: float, gpu: bool = False) -> int:
    """Returns how many sequences of the load's context fit, up to `MOST_SEQUENCES`."""
    return largest(lambda n: takes(loaded, replace(load, sequences=n), gpu).total <= memory, MOST_SEQUENCES)


@dataclass(frozen=True)
class Gain:
    """What rounds of K drafts should give where reading memory is all that takes time."""

    draft_tokens: int
    tokens_per_round: float
    round_seconds: float
    tokens_per_second: float
    speedup: float


def gains(loaded: Loaded, load: Load, acceptance: float, bandwidth: float) -> list[Gain]:
    """Returns what 0 (plain decoding) to 8 drafts a round give, for all sequences together.

    `acceptance`: the chance that a draft is accepted where those before it were. `bandwidth`: bytes read a second. A
    round reads the target once for all of its rows, each sequence's keys and values once, and the drafter once a draft.
    The products are taken to keep up, so this is what drafting can gain at most.
    """
    text, n = loaded.target.text, load.sequences
    cache = n * kv_read_bytes(text, load.context, loaded.kv_bytes)
    step = 0.0
    if loaded.drafter is not None:
        step = n * drafter_kv_read_bytes(text, loaded.drafter.text, load.context, loaded.kv_bytes)
        step += loaded.drafter_read_bytes()
    found: list[Gain] = []
    for k in range(LONGEST_GAIN + 1 if loaded.drafter is not None else 1):
        rows = n * (k + 1)
        read = loaded.target_read_bytes(rows) + cache + k * step
        tokens, seconds = expected_tokens([acceptance] * k), read / bandwidth
        rate = n * tokens / seconds
        found.append(Gain(k, tokens, seconds, rate, rate / found[0].tokens_per_second if found else 1.0))
    return found


def best_gain(found: list[Gain], acceptance: float) -> Gain:
    """Returns the one that pays most, chosen as decoding chooses."""
    costs = [gain.round_seconds for gain in found]
    return found[best_length([acceptance] * (len(found) - 1), costs)[0]]


def kv_read_bytes(text: TextConfig, context: int, element: int) -> int:
    """Returns the bytes of keys and values that one sequence's round reads: layers that share others' read them too."""
    return sum(_layer_read(text, text.kv_layer(i), context, element) for i in range(text.num_hidden_layers))


def drafter_kv_read_bytes(text: TextConfig, drafter: TextConfig, context: int, element: int) -> int:
    """Returns the same of one draft of one sequence: its layers read the target's donor layers."""
    return sum(_layer_read(text, text.donor_layers[kind], context, element) for kind in drafter.layer_types)


def _layer_read(text: TextConfig, layer: int, context: int, element: int) -> int:
    seen = min(context, text.sliding_window) if text.is_sliding(layer) else context
    return seen * layer_row_bytes(text, layer, element)
