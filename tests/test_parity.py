"""Our models against transformers 5.22.2: logits, drafter states, and greedy text, in fp32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gemma_mtp.decoding.round import Rows, forward_rows, open_sequence, play_round, prefill
from models import draft_step, play
from oracle import FAMILIES, VOCAB, WINDOW, F, S, build_drafter, build_target
from torch import Tensor
from transformers import PreTrainedModel

from gemma_mtp.checkpoint import load_drafter, load_target
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.model.drafter import DonorKeyValues, Drafter
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target

Checkpoints = Callable[[str], tuple[Path, Path]]
Oracles = Callable[[str], PreTrainedModel]
# no pad id (0): transformers would mask it out of a prompt
PROMPT = torch.randint(3, VOCAB, (1, 3 * WINDOW + 5), generator=torch.Generator().manual_seed(3))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def target_of(checkpoints: Checkpoints, family: str, packed: bool = True) -> Target:
    target = load_target(checkpoints(family)[0], torch.float32)
    if packed:
        target.pack_()
    return target


@pytest.fixture(scope="module")
def oracles() -> Callable[[str], PreTrainedModel]:
    built: dict[str, PreTrainedModel] = {}
    return lambda family: built.setdefault(family, build_target(family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_sequence_logits(checkpoints: Checkpoints, oracles: Oracles, family: str, packed: bool) -> None:
    target = target_of(checkpoints, family, packed)
    close(target.logits(target.forward_sequence(PROMPT).hidden_BTD), oracles(family)(PROMPT).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_cached_logits_beyond_the_window(checkpoints: Checkpoints, oracles: Oracles, family: str) -> None:
    """Prefill, then single rows and blocks of rows through the cache, against transformers on the whole sequence."""
    target = target_of(checkpoints, family)
    tokens = torch.randint(0, VOCAB, (1, 150), generator=torch.Generator().manual_seed(4))
    expected = oracles(family)(tokens).logits[0]
    sequence = open_sequence(target, 150, 0, 9, SamplingParams())
    start = 40
    prefill(target, sequence, tokens[0, :start], chunk_rows=512)
    for rows in [1, 1, 5, 3, 9, 1, 8] * 3:
        hidden_TD = forward_rows(target, [Rows(sequence, tokens[0, start : start + rows], rows)])
        close(target.logits(hidden_TD), expected[start : start + rows])
        sequence.cache.commit(rows)
        start += rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_greedy_text(checkpoints: Checkpoints, oracles: Oracles, family: str, draft_tokens: int) -> None:
    """64 greedy tokens, plain and drafted, are transformers' plain greedy tokens."""
    target, drafter = target_of(checkpoints, family), load_drafter(checkpoints(family)[1], torch.float32)
    with torch.inference_mode():
        theirs = oracles(family).generate(PROMPT, max_new_tokens=64, do_sample=False, eos_token_id=None)
    ours = play(target, drafter, PROMPT[0].tolist(), SamplingParams(max_tokens=64), draft_tokens)
    assert ours.tokens == theirs[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["e2b", "31b", "12b", "26b"])
@pytest.mark.parametrize("centroids", [False, True])
@torch.inference_mode()
def test_drafter_steps(
    checkpoints: Checkpoints, oracles: Oracles, family: str, centroids: bool, tmp_path: Path
) -> None:
    """Logits and fed-back states over 8 chained steps at a constant position, beyond the window."""
    oracle, theirs = oracles(family), build_drafter(family, centroids)
    theirs.save_pretrained(tmp_path)
    drafter, target = load_drafter(tmp_path, torch.float32), target_of(checkpoints, family)
    drafter.pack_(target.native)
    sequence = open_sequence(target, PROMPT.shape[1], 2, 8, SamplingParams())
    prefill(target, sequence, PROMPT[0], chunk_rows=512)
    position = PROMPT.shape[1]
    rows = {F: sequence.cache.committed(F), S: sequence.cache.committed(S)}
    assert rows[F][0].shape[2] == position and rows[S][0].shape[2] == WINDOW - 1
    token, our_hidden = torch.tensor([[sequence.last_token]]), sequence.last_state[None, None]
    full = oracle(PROMPT, output_hidden_states=True)
    their_hidden = full.hidden_states[-1][:, -1:]
    close(our_hidden, their_hidden)
    for _ in range(8):
        state, our_hidden = draft_step(drafter, target, sequence, token, our_hidden)
        logits, token_ids = drafter.candidates(state[0])
        embeds = oracle.get_input_embeddings()(token)
        out = theirs(inputs_embeds=torch.cat((embeds, their_hidden), -1), shared_kv_states=rows,
                     position_ids=torch.tensor([[position]]))  # fmt: skip
        their_hidden = out.last_hidden_state
        close(our_hidden, their_hidden)
        if token_ids is None:
            close(logits, out.logits[0])
        else:
            assert token_ids.shape[-1] == VOCAB // 16 * 4
            close(logits, out.logits[0].gather(-1, token_ids))
            close(drafter.logits(state)[0].gather(-1, token_ids), logits) if drafter.packed_head is None else None
        token = out.logits[0].argmax(-1, keepdim=True)


@torch.inference_mode()
def test_drafter_reads_the_donor_layers(checkpoints: Checkpoints, oracles: Oracles) -> None:
    """The rows handed to the drafter are those transformers hands to its own."""
    target = target_of(checkpoints, "e2b")
    sequence = open_sequence(target, PROMPT.shape[1], 2, 8, SamplingParams())
    prefill(target, sequence, PROMPT[0], chunk_rows=512)
    model = oracles("e2b").model.language_model
    shared = model(PROMPT, return_shared_kv_states=True, use_cache=True).shared_kv_states
    for kind in (S, F):
        ours = sequence.cache.committed(kind)
        for mine, other in zip(ours, shared[kind], strict=True):
            close(mine, other[:, :, -mine.shape[2] :])


@torch.inference_mode()
def test_drafted_rounds_equal_the_sequence_form(checkpoints: Checkpoints) -> None:
    """A round's draft step equals `DonorKeyValues` over whole sequences, which training uses."""
    target = target_of(checkpoints, "e2b")
    drafter: Drafter = load_drafter(checkpoints("e2b")[1], torch.float32)
    tokens = PROMPT
    out = target.forward_sequence(tokens)
    T = tokens.shape[1] - 1
    positions = torch.arange(1, T + 1)
    kv = DonorKeyValues(drafter.config, out.donor_kv, positions)
    rope = rope_for(drafter.config.text, positions, torch.float32)
    state, projected = drafter(target.embed(tokens[:, 1:]), out.hidden_BTD[:, :-1], rope, kv)
    for row in (0, 5, WINDOW - 1, WINDOW, 2 * WINDOW + 3, T - 1):
        sequence = open_sequence(target, row + 1, 4, 4, SamplingParams())
        prefill(target, sequence, tokens[0, : row + 1], chunk_rows=512)
        sequence.last_token = int(tokens[0, row + 1])
        steps: list[Tensor] = []
        drafter_call = drafter.forward
        drafter.forward = lambda *a, call=drafter_call, seen=steps: seen.append(call(*a)) or seen[-1]  # type: ignore
        play_round(target, drafter, sequence, 1, "exact")
        drafter.forward = drafter_call  # type: ignore[method-assign]
        close(steps[0][0][0], state[:, row])
        close(steps[0][1][0], projected[:, row])
