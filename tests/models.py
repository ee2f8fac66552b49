"""Small random models of our own, for tests that need no transformers, and a slow decoder for the fast one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.backend.native import native_available
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.backend.select import make_backend
from gemma_mtp.checkpoint import save_drafter, save_target, stored_tensors
from gemma_mtp.config import DrafterConfig, LayerType, TargetConfig, TextConfig
from gemma_mtp.decoding.early_stop import StopRule
from gemma_mtp.decoding.grammar_state import GrammarState
from gemma_mtp.decoding.history import TokenHistory
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import choose, process
from gemma_mtp.decoding.verify import Verification
from gemma_mtp.engine.draft import propose
from gemma_mtp.engine.round import RoundOutput, forward, prefill, verify_round
from gemma_mtp.engine.sequence import Sequence, Turn, open_sequence
from gemma_mtp.kv.blocks import BLOCK_ROWS, block_counts
from gemma_mtp.kv.pool import KVCache
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.weights.base import Weight

native_only = pytest.mark.skipif(not native_available(), reason="the native operators were not built")
M = TypeVar("M", Target, Drafter)
Made = TypeVar("Made", bound=torch.nn.Module)
VOCAB = 61
S: LayerType = "sliding_attention"
F: LayerType = "full_attention"

TINY = TextConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, num_global_key_value_heads=2, head_dim=8, global_head_dim=16, layer_types=(S, S, F, S, S, F),
    sliding_window=8, num_kv_shared_layers=2, use_double_wide_mlp=True, hidden_size_per_layer_input=4,
    vocab_size_per_layer_input=VOCAB, final_logit_softcapping=30.0, max_position_embeddings=4096,
)  # fmt: skip


PLE = dataclasses.replace(
    TINY, hidden_size=64, intermediate_size=128, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=32
)
#: wide enough to be quantised, but for rows of 96 and of 24 columns in "odd"
WIDE: dict[str, TextConfig] = {
    "ple": PLE,
    "untied": dataclasses.replace(PLE, tie_word_embeddings=False),
    "odd": dataclasses.replace(PLE, intermediate_size=96, hidden_size_per_layer_input=4),
    "moe": dataclasses.replace(
        PLE, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=0,
        use_double_wide_mlp=False, attention_k_eq_v=True, enable_moe_block=True, num_experts=8, top_k_experts=2,
        moe_intermediate_size=64,
    ),
}  # fmt: skip


def random_target(seed: int = 0, config: TextConfig = TINY) -> Target:
    return _randomise(Target(config), seed).eval().requires_grad_(False)


def zero_target(config: TextConfig) -> Target:
    """In bf16; large ones are made faster than at random."""
    with torch.device("meta"):
        target = Target(config)
    return of_zeros(target.to(torch.bfloat16)).requires_grad_(False)


def of_zeros(model: Made) -> Made:
    """A model without memory, of zeros that are written; `to_empty` would import SymPy for it."""

    def made(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").zero_()

    zeros: Made = model._apply(made)  # type: ignore[no-untyped-call]
    return zeros


def random_drafter(target: TextConfig = TINY, seed: int = 1, centroids: bool = False) -> Drafter:
    text = dataclasses.replace(
        target, hidden_size=16, intermediate_size=32, num_hidden_layers=4, layer_types=(S, S, S, F),
        num_kv_shared_layers=4, use_double_wide_mlp=False, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0, final_logit_softcapping=None,
    )  # fmt: skip
    config = DrafterConfig(
        text, target.hidden_size, use_ordered_embeddings=centroids, num_centroids=VOCAB, centroid_intermediate_top_k=9
    )
    drafter = _randomise(Drafter(config), seed).eval().requires_grad_(False)
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB, generator=_generator(seed)))
    return drafter


def wide_drafter(target: TextConfig, centroids: bool = False, seed: int = 1) -> Drafter:
    """The same, wide enough that its matrices are quantised."""
    drafter = random_drafter(dataclasses.replace(target, enable_moe_block=False), seed, centroids)
    text = dataclasses.replace(
        drafter.config.text, hidden_size=64, intermediate_size=128, enable_moe_block=False, tie_word_embeddings=True
    )
    config = dataclasses.replace(drafter.config, text=text)
    wide = Drafter(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wide.checkpoint_tensors().items():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(
            torch.randperm(VOCAB, generator=generator) if "ordering" in name
            else 1 + 0.2 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5
        )  # fmt: skip
    return wide


def agreeing_pair(seed: int = 0) -> tuple[Target, Drafter]:
    """A pair whose drafter often agrees: both repeat or step by tables that are nearly the same.

    Residual branches are damped in both, so that each mostly maps its input embedding through its head.
    """
    target, drafter = random_target(seed), random_drafter(seed=seed + 1)
    with torch.no_grad():
        for model in (target, drafter):
            for name, parameter in model.named_parameters():
                if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                    parameter.mul_(0.15)
        width = drafter.config.text.hidden_size
        drafter.pre_projection.weight.zero_()
        drafter.pre_projection.weight[:, :width].copy_(torch.eye(width))
        drafter.embed_tokens.weight.copy_(target.embed_tokens.weight[:, :width])
    return target, drafter


def backends(target: Target, drafter: Drafter | None = None) -> dict[str, Backend]:
    """The same models on every backend of this machine, by name."""
    found: dict[str, Backend] = {"reference": ReferenceBackend(target, drafter)}
    best = make_backend(target, drafter)
    return found if isinstance(best, ReferenceBackend) else {**found, "native": best}


def with_other_sums(script: str) -> str:
    """Returns what a script prints whose native operators sum several rows in another order than one."""
    environment = {**os.environ, "GEMMA_MTP_ISA": "control", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


class WithoutChoices:
    """A backend that leaves all choices to others, who then draft step by step."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.chooses = frozenset[str]()

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randomise(model: M, seed: int) -> M:
    """Weights of a scale that gives well-spread logits; norms and scalars away from one, so that none is a no-op."""
    generator = _generator(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.2 * noise if tensor.ndim == 1 else noise / tensor.shape[-1] ** 0.5)
    return model


@torch.inference_mode()
def slow_decode(target: Target, prompt: list[int], params: SamplingParams, count: int) -> list[int]:
    """The slow, obvious reference: the whole sequence through the target for every token, no cache, no drafter."""
    tokens = list(prompt)
    history = TokenHistory(prompt, target.config.vocab_size, "cpu") if params.uses_history else None
    for _ in range(count):
        logits = target.logits(target.forward_sequence(torch.tensor([tokens])).hidden_BTD[0, -1:])
        counts = None if history is None else history.rows(torch.zeros(0, dtype=torch.int64))
        token = choose(process(logits, params, counts=counts), params, torch.tensor([len(tokens)]))
        if history is not None:
            history.commit(token)
        tokens += token.tolist()
    return tokens[len(prompt) :]


@dataclasses.dataclass
class Played:
    """Tokens of a run of rounds and what the rounds did."""

    tokens: list[int]
    accepted: list[int]
    drafted: list[int]
    sequence: Sequence
    confidences: list[list[float]] = dataclasses.field(default_factory=list)


def open_caches(backend: Backend, count: int, rows: int) -> list[KVCache]:
    """Open caches of one pool, each of at most `rows` rows, which calls of any size may write."""
    of_one = block_counts(backend.target.config.sliding_window, rows, rows)
    pool = backend.make_pool({kind: count * blocks for kind, blocks in of_one.items()}, count)
    caches = [pool.cache(rows) for _ in range(count)]
    for cache in caches:
        cache.open()
    return caches


@torch.inference_mode()
def run_rows(backend: Backend, cache: KVCache, token_ids: list[int]) -> Tensor:
    """Run rows of one sequence and commit them; returns all of their hidden states, [T, D]."""
    hidden_TD = forward(backend, [Rows(cache, token_ids, len(token_ids))]).clone()
    cache.table.commit(len(token_ids))
    return hidden_TD


def committed(cache: KVCache, kind: LayerType) -> tuple[Tensor, Tensor]:
    """The donor layer's keys and values that a query at the committed length sees, each [1, G, S, d]."""
    table, stored = cache.table, cache.pool.layers[cache.pool.config.donor_layers[kind]]
    positions = torch.arange(table.windows[kind].first_visible(table.length), table.length)
    blocks = torch.tensor(table.tables[kind])[positions // BLOCK_ROWS]
    keys, values = (rows[:, blocks, positions % BLOCK_ROWS][None] for rows in (stored.keys, stored.values))
    return keys, values


def opened(
    backend: Backend, prompt: list[int], params: SamplingParams, room: int = 300, chunk_rows: int | None = None,
    grammar: GrammarState | None = None,
) -> tuple[Sequence, list[int]]:  # fmt: skip
    """A sequence with a pool of its own and `room` rows beside the prompt's, and the first output tokens."""
    (cache,) = open_caches(backend, 1, len(prompt) + room)
    sequence = open_sequence(backend, cache, params, prompt, grammar)
    return sequence, prefill(backend, sequence, prompt, chunk_rows).token_ids


@torch.inference_mode()
def play_rounds(backend: Backend, turns: Items[Turn]) -> list[RoundOutput]:
    """Play one round of each sequence: draft, verify, commit. Raises what the first turn that fails raised."""
    return verify_round(backend, turns, propose(backend, turns))


def play(
    backend: Backend, prompt: list[int], params: SamplingParams, draft_tokens: int,
    verification: Verification = "exact", chunk_rows: int | None = None,
    after_round: Callable[[Sequence], object] = lambda sequence: None, stop: StopRule | None = None,
) -> Played:  # fmt: skip
    """Decode params.max_tokens tokens by rounds, without stop conditions."""
    sequence, tokens = opened(backend, prompt, params, params.max_tokens + draft_tokens, chunk_rows)
    played = Played(list(tokens), [], [], sequence)
    while len(played.tokens) < params.max_tokens:
        drafts = min(draft_tokens, params.max_tokens - len(played.tokens) - 1)
        (output,) = play_rounds(backend, [Turn(sequence, drafts, verification, stop)])
        played.tokens += output.token_ids
        played.accepted.append(output.accepted)
        played.drafted.append(output.drafted)
        played.confidences.append(list(output.confidences))
        after_round(sequence)
    return played


def letters(directory: Path) -> Tokenizer:
    """A tokenizer of one letter a token: A, B, …, with ids as the tiny models have them."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(alphabet)[32 : 32 + VOCAB])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_dir(directory)


def same_weights(ours: dict[str, Weight], theirs: dict[str, Weight]) -> None:
    stored, expected = dict(stored_tensors(ours)), dict(stored_tensors(theirs))
    assert stored.keys() == expected.keys()
    assert [name for name in stored if not torch.equal(stored[name], expected[name])] == []
    assert [name for name in stored if stored[name].dtype != expected[name].dtype] == []


def save_pair(root: Path, target: Target, drafter: Drafter) -> None:
    """Write both as fp32 checkpoints, to root/target and root/drafter."""
    save_target(target, TargetConfig(target.config), root / "target", torch.float32)
    save_drafter(drafter, drafter.config, root / "drafter", torch.float32)
