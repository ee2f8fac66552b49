"""Our models against transformers 5.22.2: logits, drafter states, and greedy text, in fp32, on every backend."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import backends, committed, open_caches, opened, play, run_rows
from oracle import FAMILIES, VOCAB, WINDOW, F, S, build_drafter, build_target
from torch import Tensor
from transformers import PreTrainedModel

from gemma_mtp.backend.base import Backend
from gemma_mtp.backend.native import native_available
from gemma_mtp.checkpoint import load_drafter, load_target
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.model.drafter import DonorKeyValues
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target

Checkpoints = Callable[[str], tuple[Path, Path]]
Oracles = Callable[[str], PreTrainedModel]
# no pad id (0): transformers would mask it out of a prompt
PROMPT = torch.randint(3, VOCAB, (1, 3 * WINDOW + 5), generator=torch.Generator().manual_seed(3))
on_every_backend = pytest.mark.parametrize("name", ["reference"] if not native_available() else ["reference", "native"])


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def target_of(checkpoints: Checkpoints, family: str) -> Target:
    return load_target(checkpoints(family)[0], torch.float32)


def backend_of(checkpoints: Checkpoints, family: str, name: str, drafter: Path | None = None) -> Backend:
    """`drafter`: where it lies, if not with the family's target."""
    drafter = drafter or checkpoints(family)[1]
    return backends(target_of(checkpoints, family), load_drafter(drafter, torch.float32))[name]


@pytest.fixture(scope="module")
def oracles() -> Callable[[str], PreTrainedModel]:
    built: dict[str, PreTrainedModel] = {}
    return lambda family: built.setdefault(family, build_target(family))


@pytest.fixture(scope="module")
def greedy_tokens(oracles: Oracles) -> Callable[[str], list[int]]:
    """32 tokens of transformers' plain decoding, made once a family."""

    @functools.cache
    @torch.inference_mode()
    def tokens(family: str) -> list[int]:
        made = oracles(family).generate(PROMPT, max_new_tokens=32, do_sample=False, eos_token_id=None)
        found: list[int] = made[0, PROMPT.shape[1] :].tolist()
        return found

    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_sequence_logits(checkpoints: Checkpoints, oracles: Oracles, family: str) -> None:
    target = target_of(checkpoints, family)
    close(target.logits(target.forward_sequence(PROMPT).hidden_BTD), oracles(family)(PROMPT).logits)


@on_every_backend
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_cached_logits_beyond_the_window(checkpoints: Checkpoints, oracles: Oracles, family: str, name: str) -> None:
    """Prefill, then single rows and blocks of rows through the cache, against transformers on the whole sequence."""
    backend = backend_of(checkpoints, family, name)
    tokens = torch.randint(0, VOCAB, (1, 96), generator=torch.Generator().manual_seed(4))
    expected, ids = oracles(family)(tokens).logits[0], tokens[0].tolist()
    (cache,) = open_caches(backend, 1, 96)
    start = 0
    for rows in [40, *[1, 1, 5, 3, 9, 1, 8] * 2]:
        close(backend.logits(run_rows(backend, cache, ids[start : start + rows])), expected[start : start + rows])
        start += rows


@on_every_backend
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_tokens", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_greedy_text(
    checkpoints: Checkpoints, greedy_tokens: Callable[[str], list[int]], family: str, draft_tokens: int, name: str
) -> None:
    """32 greedy tokens, plain and drafted, are transformers' plain greedy tokens."""
    backend = backend_of(checkpoints, family, name)
    ours = play(backend, PROMPT[0].tolist(), SamplingParams(max_tokens=32), draft_tokens)
    assert ours.tokens == greedy_tokens(family)


@on_every_backend
@pytest.mark.parametrize(
    ("family", "centroids"),
    [("e2b", False), ("31b", False), ("12b", False), ("26b", False), ("e2b", True), ("26b", True),
     pytest.param("31b", True, marks=pytest.mark.slow), pytest.param("12b", True, marks=pytest.mark.slow)],
)  # fmt: skip
@torch.inference_mode()
def test_drafter_steps(
    checkpoints: Checkpoints, oracles: Oracles, family: str, centroids: bool, name: str, tmp_path: Path
) -> None:
    """Logits and fed-back states over 8 chained steps at a constant position, beyond the window."""
    oracle, theirs = oracles(family), build_drafter(family, centroids)
    theirs.save_pretrained(tmp_path)
    backend = backend_of(checkpoints, family, name, tmp_path)
    sequence, _ = opened(backend, PROMPT[0].tolist(), SamplingParams())
    position = PROMPT.shape[1]
    rows = {kind: committed(sequence.cache, kind) for kind in (F, S)}
    assert rows[F][0].shape[2] == position and rows[S][0].shape[2] == WINDOW - 1
    token, our_hidden = torch.tensor([sequence.last_token]), sequence.cache.state[None]
    full = oracle(PROMPT, output_hidden_states=True)
    their_hidden = full.hidden_states[-1][:, -1:]
    close(our_hidden, their_hidden[0])
    for _ in range(8):
        logits, token_ids, our_hidden = backend.draft_step([sequence.cache], token, our_hidden)
        embeds = oracle.get_input_embeddings()(token[None])
        out = theirs(inputs_embeds=torch.cat((embeds, their_hidden), -1), shared_kv_states=rows,
                     position_ids=torch.tensor([[position]]))  # fmt: skip
        their_hidden = out.last_hidden_state
        close(our_hidden, their_hidden[0])
        if token_ids is None:
            close(logits, out.logits[0])
        else:
            assert token_ids.shape[-1] == VOCAB // 16 * 4
            close(logits, out.logits[0].gather(-1, token_ids))
        token = out.logits[0].argmax(-1)


@pytest.mark.parametrize("centroids", [False, True])
@torch.inference_mode()
def test_the_whole_heads_logits_are_the_candidates(centroids: bool, tmp_path: Path) -> None:
    """Training scores the whole vocabulary, decoding a part of it."""
    build_drafter("e2b", centroids).save_pretrained(tmp_path)
    drafter = load_drafter(tmp_path, torch.float32)
    state = torch.randn(5, drafter.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    logits, token_ids = drafter.candidates(state)
    assert (token_ids is not None) == centroids
    close(logits, drafter.logits(state) if token_ids is None else drafter.logits(state).gather(-1, token_ids))


@on_every_backend
@torch.inference_mode()
def test_drafter_reads_the_donor_layers(checkpoints: Checkpoints, oracles: Oracles, name: str) -> None:
    """The rows handed to the drafter are those transformers hands to its own."""
    sequence, _ = opened(backend_of(checkpoints, "e2b", name), PROMPT[0].tolist(), SamplingParams())
    model = oracles("e2b").model.language_model
    shared = model(PROMPT, return_shared_kv_states=True, use_cache=True).shared_kv_states
    for kind in (S, F):
        for mine, other in zip(committed(sequence.cache, kind), shared[kind], strict=True):
            close(mine, other[:, :, -mine.shape[2] :])


@on_every_backend
@torch.inference_mode()
def test_drafted_rounds_equal_the_sequence_form(checkpoints: Checkpoints, name: str) -> None:
    """A round's draft step equals `DonorKeyValues` over whole sequences."""
    backend = backend_of(checkpoints, "e2b", name)
    target, drafter, tokens = backend.target, backend.drafter, PROMPT
    assert drafter is not None
    out = target.forward_sequence(tokens)
    T = tokens.shape[1] - 1
    positions = torch.arange(1, T + 1)
    donors = {kind: out.stored[layer] for kind, layer in target.config.donor_layers.items()}
    kv = DonorKeyValues(drafter.config, donors, positions)
    rope = rope_for(drafter.config.text, positions, torch.float32)
    state, projected = drafter(target.embed(tokens[:, 1:]), out.hidden_BTD[:, :-1], rope, kv)
    for row in (0, 5, WINDOW - 1, WINDOW, 2 * WINDOW + 3, T - 1):
        sequence, _ = opened(backend, tokens[0, : row + 1].tolist(), SamplingParams())
        step = backend.draft_step([sequence.cache], tokens[0, row + 1 : row + 2], sequence.cache.state[None])
        logits = drafter.logits(state[:, row])
        close(step.logits_RC, logits if step.token_ids_RC is None else logits.gather(-1, step.token_ids_RC))
        close(step.projected_RD, projected[:, row])
