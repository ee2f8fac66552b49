"""Why a pair accepts few drafts, each cause by a measurement.

The target writes; then the first draft of every position is made under other assumptions than the pair's: other donor
layers, other windows, text that the target did not write. All of that is one pass of the target and one of the drafter
for each assumption, over whole sequences. What differs is tested with the interval of the difference over positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gemma_mtp.config import LAYER_TYPES, SLIDING, DrafterConfig, LayerType
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.measure.acceptance import Prompt
from gemma_mtp.model.drafter import DonorKeyValues, Drafter
from gemma_mtp.model.layers import rope_for
from gemma_mtp.model.target import Target

#: first drafts accepted at which a pair is taken to be in order
ENOUGH = 0.5
#: an assumption counts as better where it gains so much, and that surely (two standard errors)
LEAST_GAIN, SURE = 0.05, 2.0
#: of text that others wrote: what share of the target's own hits a drafter of the same family makes
KNOWS_TEXT = 0.5
WRITTEN_TOKENS = 96
Verdict = Literal["in order", "cause", "not it", "not measured"]


@dataclass(frozen=True)
class Finding:
    """One question: what was measured, what it says, and what to do where it is the cause."""

    name: str
    verdict: Verdict
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Rows:
    """One sequence: its tokens [T], the target's states [T, D] and choices [T], and every layer's keys and values."""

    tokens_T: Tensor
    hidden_TD: Tensor
    choices_T: Tensor
    stored: Mapping[int, tuple[Tensor, Tensor]]


@torch.inference_mode()
def diagnose(pair: Pair, prompts: Sequence[Prompt], foreign: Sequence[Prompt] = ()) -> list[Finding]:
    """Returns what was found of a pair with a drafter, the acceptance itself first.

    `prompts` are as the pair is used; `foreign` is text that the target did not write, at least 3 tokens each. Each
    prompt is gone on from, greedily.
    """
    drafter = pair.drafter
    assert drafter is not None
    params = SamplingParams(max_tokens=WRITTEN_TOKENS, ignore_eos=True)
    written = []
    for prompt in prompts:
        ids = pair.encode(prompt.content)
        written.append(target_rows(pair.target, [*ids, *pair.generate(ids, params, draft_tokens=0).token_ids]))
    begins = [len(pair.encode(prompt.content)) for prompt in prompts]
    base = hits(pair, drafter, written, begins)
    share = _share(base)
    overall = Finding(
        "first drafts", "in order" if share >= ENOUGH else "cause",
        f"{share:.0%} of {len(base)} first drafts are the target's choice, on text that it wrote itself",
    )  # fmt: skip
    causes = [_donors(pair, drafter, written, begins, base), _window(pair, drafter, written, begins, base)]
    wiring = any(finding.verdict == "cause" for finding in causes)
    return [overall, *causes, _fine_tune(pair, drafter, foreign, share, wiring)]


def target_rows(target: Target, token_ids: Sequence[int]) -> Rows:
    """Returns what the target says of one sequence, in the dtype of its weights."""
    tokens_T = torch.tensor(token_ids, device=target.norm.weight.device)
    (hidden_TD,), stored = target.forward_sequence(tokens_T[None])
    choices_T = torch.cat([target.scores(part).argmax(-1) for part in hidden_TD.split(32)])
    return Rows(tokens_T, hidden_TD, choices_T, stored)


def hits(
    pair: Pair, drafter: Drafter, written: Sequence[Rows], begins: Sequence[int],
    donors: Mapping[LayerType, int] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Returns whether the first draft at each position is the target's choice, boolean [positions].

    `donors`: the layers whose keys and values the drafter reads; `window`: of its sliding layers. Both are the pair's
    own where they are None. Positions before `begins` are left out.
    """
    config = drafter.config if window is None else _with_window(drafter.config, window)
    layers = {**pair.target.config.donor_layers, **(donors or {})}
    found = []
    for rows, begin in zip(written, begins, strict=True):
        T = len(rows.tokens_T)
        positions = torch.arange(1, T, device=rows.tokens_T.device)
        stored = {kind: rows.stored[layer] for kind, layer in layers.items()}
        kv = DonorKeyValues(config, stored, positions)
        rope = rope_for(drafter.config.text, positions, rows.hidden_TD.dtype)
        embeds_1TD = pair.target.embed(rows.tokens_T[1:])[None]
        state_1TH, _ = drafter(embeds_1TD, rows.hidden_TD[None, :-1], rope, kv)
        drafts_T = torch.cat([_best(drafter, part) for part in state_1TH[0].split(32)])
        found.append((drafts_T == rows.choices_T[1:])[max(0, begin - 1) :])
    return torch.cat(found)


def _best(drafter: Drafter, state_RH: Tensor) -> Tensor:
    logits_RC, ids_RC = drafter.candidates(state_RH)
    best_R = logits_RC.argmax(-1)
    return best_R if ids_RC is None else ids_RC.gather(-1, best_R[:, None])[:, 0]


def _with_window(config: DrafterConfig, window: int) -> DrafterConfig:
    return replace(config, text=replace(config.text, sliding_window=window))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0


def surely_better(one: Tensor, other: Tensor) -> bool:
    """Whether `other` hits more than `one` by `LEAST_GAIN` and by more than chance: paired, position by position."""
    difference = other.double() - one.double()
    if len(difference) < 2:
        return False
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) >= max(LEAST_GAIN, SURE * error)


def _donors(pair: Pair, drafter: Drafter, written: Sequence[Rows], begins: Sequence[int], base: Tensor) -> Finding:
    """Whether the keys and values of other layers than the pair's donors suit the drafter better."""
    config = pair.target.config
    best, place = base, ""
    for kind in LAYER_TYPES:
        if kind not in drafter.config.text.layer_types:
            continue
        for layer in range(config.first_kv_shared_layer):
            if config.layer_types[layer] == kind and layer != config.donor_layers[kind]:
                found = hits(pair, drafter, written, begins, donors={kind: layer})
                if found.sum() > best.sum():
                    best, place = found, f"layer {layer} in place of {config.donor_layers[kind]} ({kind})"
    name = "donor layers"
    if not place:
        return Finding(name, "not it", "no other layer's keys and values give more hits")
    measured = f"{_share(best):.0%} with {place}, {_share(base):.0%} as configured"
    if not surely_better(base, best):
        return Finding(name, "not it", measured)
    return Finding(
        name, "cause", measured,
        "the drafter was trained on other layers' keys and values: restore layer_types and num_kv_shared_layers of the"
        " target's config.json from its source",
    )  # fmt: skip


def _window(pair: Pair, drafter: Drafter, written: Sequence[Rows], begins: Sequence[int], base: Tensor) -> Finding:
    """Whether another sliding window suits the drafter better."""
    name, window = "sliding window", drafter.config.text.sliding_window
    longest = max(len(rows.tokens_T) for rows in written)
    if SLIDING not in drafter.config.text.layer_types:
        return Finding(name, "not measured", "the drafter has no sliding layers")
    others = (window // 4, window // 2, 2 * window, longest)
    tried = sorted({w for w in others if w >= 2 and min(w, longest) != min(window, longest)})
    if not tried:
        return Finding(name, "not measured", f"no text reaches beyond {window // 4} tokens; give longer prompts")
    scores = {w: hits(pair, drafter, written, begins, window=w) for w in tried}
    best = max(scores, key=lambda w: int(scores[w].sum()))
    measured = f"{_share(scores[best]):.0%} with a window of {best} tokens, {_share(base):.0%} with {window}"
    if not surely_better(base, scores[best]):
        return Finding(name, "not it", measured)
    return Finding(
        name, "cause", measured,
        "the drafter was trained with another window: restore sliding_window of both config.json files from the source",
    )  # fmt: skip


def _fine_tune(pair: Pair, drafter: Drafter, foreign: Sequence[Prompt], share: float, wiring: bool) -> Finding:
    """Whether the drafter foretells text, but not this target."""
    name = "the target's fine-tune"
    if share >= ENOUGH:
        return Finding(name, "not it", f"{share:.0%} of first drafts are right")
    if wiring:
        return Finding(name, "not measured", "another cause comes first: mend that, and look again")
    rows = [target_rows(pair.target, pair.encode(text.content)) for text in foreign]
    rows = [row for row in rows if len(row.tokens_T) >= 3]
    if not rows:
        return Finding(name, "not measured", "it needs text that others wrote; give --data")
    begins = [1] * len(rows)
    texts = [replace(row, choices_T=torch.cat((row.tokens_T[1:], row.tokens_T[-1:]))) for row in rows]
    right = _share(hits(pair, drafter, [_cut(row) for row in texts], begins))
    targets = _share(torch.cat([row.choices_T[1:-1] == row.tokens_T[2:] for row in rows]))
    measured = f"of others' text the drafter foretells {right:.0%} of tokens and the target {targets:.0%}"
    if targets > 0 and right >= KNOWS_TEXT * targets:
        return Finding(
            name, "cause", f"{measured}, but only {share:.0%} of what the target chooses itself",
            "the drafter was made for another fine-tune of this model: adapt it with gemma-mtp train --target TARGET"
            " --drafter DRAFTER --data YOUR-TEXT --out DIRECTORY",
        )  # fmt: skip
    return Finding(
        name, "cause", f"{measured}: it foretells neither",
        "the drafter is untrained, damaged or of another model: copy it again, or make one with gemma-mtp train --new",
    )  # fmt: skip


def _cut(row: Rows) -> Rows:
    """Without the last row, of which the text does not say what follows."""
    T = len(row.tokens_T) - 1
    stored = {layer: (k[:, :T], v[:, :T]) for layer, (k, v) in row.stored.items()}
    return Rows(row.tokens_T[:T], row.hidden_TD[:T], row.choices_T[:T], stored)


def first_drafts(pair: Pair, prompts: Sequence[Prompt]) -> Tensor:
    """Returns whether first drafts are the target's choice where it goes on from prompts, boolean [positions]."""
    drafter = pair.drafter
    assert drafter is not None
    params = SamplingParams(max_tokens=WRITTEN_TOKENS, ignore_eos=True)
    ids = [pair.encode(prompt.content) for prompt in prompts]
    with torch.inference_mode():
        rows = [target_rows(pair.target, [*own, *pair.generate(own, params, draft_tokens=0).token_ids]) for own in ids]
        return hits(pair, drafter, rows, [len(own) for own in ids])


def compare_prompts(pair: Pair, plain: Sequence[Prompt], templated: Sequence[Prompt]) -> Finding:
    """Whether the drafter suits prompts through the chat template less than the same ones as plain text."""
    return compare_shares(
        "chat template", first_drafts(pair, templated), first_drafts(pair, plain), "through the chat template",
        "as plain text",
        "the drafter was trained on another template: compare chat_template.jinja and tokenizer_config.json with the"
        " source's, or adapt the drafter on conversations with gemma-mtp train",
    )  # fmt: skip


def compare_types(pair: Pair, unquantised: Pair, prompts: Sequence[Prompt]) -> Finding:
    """Whether the drafter suits the target as it is quantised less than the target as it was."""
    return compare_shares(
        "the target's quantisation", first_drafts(pair, prompts), first_drafts(unquantised, prompts), "quantised",
        "unquantised",
        "the drafter was made for other weights: use the drafter of the quantised checkpoint (QAT to QAT), a finer"
        " --quantize, or adapt the drafter with gemma-mtp train --quantize",
    )  # fmt: skip


def compare_shares(name: str, own: Tensor, other: Tensor, how: str, else_how: str, advice: str) -> Finding:
    """Whether `other` has surely the larger share of hits; the positions are not the same ones."""
    error = math.sqrt(0.25 / max(1, len(own)) + 0.25 / max(1, len(other)))
    measured = f"{_share(own):.0%} {how}, {_share(other):.0%} {else_how}"
    if _share(other) - _share(own) < max(2 * LEAST_GAIN, 2 * SURE * error):
        return Finding(name, "not it", measured)
    return Finding(name, "cause", measured, advice)
