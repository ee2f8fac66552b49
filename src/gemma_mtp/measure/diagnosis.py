"""Why a pair accepts few drafts, each cause by a measurement.

The target writes; then the first draft of every position is made under other assumptions than the pair's: other donor
layers, other windows, text that the target did not write. All of that is one pass of the target and one of the drafter
for each assumption, over whole sequences.

A cause is named where it is more than noise: what differs is tested position by position (a normal bound on the mean of
paired differences), at a chance of a false alarm that all alternatives that are tried share (Bonferroni), and with it
mended the pair must draft. A drafter that is no better than one guess for every position has none of these causes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
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
#: an assumption counts as better where it gains so much, and explains what is wrong where so many hits come of it
LEAST_GAIN, EXPLAINS = 0.05, 0.25
#: how often a question may name a cause that is chance, if positions were independent; being of one text, they are less
FALSE_ALARM = 0.01
#: hits that are as good as none
NEAR_ZERO = 0.1
#: of text that others wrote: what share of the target's own hits a drafter of the same family makes
KNOWS_TEXT = 0.5
WRITTEN_TOKENS = 96
ITSELF, FINE_TUNE = "the drafter itself", "the target's fine-tune"
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


@dataclass(frozen=True)
class Written:
    """Prompts that the target went on from: each whole sequence, and where the target's own part of it begins."""

    rows: Sequence[Rows]
    begins: Sequence[int]


@torch.inference_mode()
def write(pair: Pair, prompts: Sequence[Prompt], tell: Callable[[str], object] = lambda what: None) -> Written:
    """Each prompt is gone on from, greedily: what costs most here, and is done once for all that is asked of it."""
    params = SamplingParams(max_tokens=WRITTEN_TOKENS, ignore_eos=True)
    rows, begins = [], []
    for i, prompt in enumerate(prompts):
        tell(f"the target writes text {i + 1} of {len(prompts)}")
        ids = pair.encode(prompt.content)
        rows.append(target_rows(pair.target, [*ids, *pair.generate(ids, params, draft_tokens=0).token_ids]))
        begins.append(len(ids))
    return Written(rows, begins)


@torch.inference_mode()
def diagnose(
    pair: Pair, written: Written, foreign: Sequence[Prompt] = (), tell: Callable[[str], object] = lambda what: None
) -> list[Finding]:
    """Returns what was found of a pair with a drafter, the acceptance itself first.

    `written` goes on from prompts as the pair is used; `foreign` is text that the target did not write, at least 3
    tokens each. `tell` is told what is under way.
    """
    drafter = pair.drafter
    assert drafter is not None
    base = hits(pair, drafter, written)
    share, in_order = _share(base), not surely_above(ENOUGH - base.double())
    overall = Finding(
        "first drafts", "in order" if in_order else "cause",
        f"{share:.0%} of {len(base)} first drafts are the target's choice, on text that it wrote itself",
    )  # fmt: skip
    tell("drafting with other layers and windows")
    wirings = [make(pair, drafter, written, base) for make in (_donors, _window)]
    found = [overall, *(finding for finding, _ in wirings)]
    if in_order:
        return [*found, *(Finding(name, "not it", overall.measured) for name in (ITSELF, FINE_TUNE))]
    if any(finding.verdict == "cause" for finding, _ in wirings):
        first = "another cause comes first: mend that, and look again"
        return [*found, *(Finding(name, "not measured", first) for name in (ITSELF, FINE_TUNE))]
    choices = torch.cat(
        [rows.choices_T[1:][max(0, begin - 1) :] for rows, begin in zip(written.rows, written.begins, strict=True)]
    )
    tell("drafting text that others wrote")
    tried = [base, *(alternative for _, alternatives in wirings for alternative in alternatives)]
    return [*found, *_itself(pair, drafter, foreign, share, knows_something(choices, tried))]


def target_rows(target: Target, token_ids: Sequence[int]) -> Rows:
    """Returns what the target says of one sequence, in the dtype of its weights."""
    tokens_T = torch.tensor(token_ids, device=target.norm.weight.device)
    (hidden_TD,), stored = target.forward_sequence(tokens_T[None])
    choices_T = torch.cat([target.scores(part).argmax(-1) for part in hidden_TD.split(32)])
    return Rows(tokens_T, hidden_TD, choices_T, stored)


def hits(
    pair: Pair, drafter: Drafter, written: Written,
    donors: Mapping[LayerType, int] | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Returns whether the first draft at each position is the target's choice, boolean [positions].

    `donors`: the layers whose keys and values the drafter reads; `window`: of its sliding layers. Both are the pair's
    own where they are None. Positions before the target's own part are left out.
    """
    config = drafter.config if window is None else _with_window(drafter.config, window)
    layers = {**pair.target.config.donor_layers, **(donors or {})}
    found = []
    for rows, begin in zip(written.rows, written.begins, strict=True):
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


def sigmas(comparisons: int = 1) -> float:
    """Returns the standard errors that a mean must be above zero by, so that `FALSE_ALARM` bounds the chance that one
    of so many is by accident."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / comparisons)


def surely_above(difference: Tensor, least: float = 0.0, comparisons: int = 1) -> bool:
    """Whether the mean of differences [positions] is at least `least`, and above zero by more than chance, of the best
    of so many comparisons."""
    if len(difference) < 2:
        return False
    error = float(difference.double().std()) / math.sqrt(len(difference))
    mean = float(difference.double().mean())
    return mean > 0 and mean >= max(least, sigmas(comparisons) * error)


def explains(one: Tensor, other: Tensor, comparisons: int = 1) -> bool:
    """Whether `other`, the best of so many alternatives, surely hits more than `one`, and often enough to be a drafter
    that fits: boolean [positions], the same positions."""
    gained = other.double() - one.double()
    return _share(other) >= EXPLAINS and surely_above(gained, LEAST_GAIN, comparisons)


def knows_something(choices: Tensor, tried: Sequence[Tensor]) -> bool:
    """Whether hits under any assumption that was tried, boolean [positions] each, are more than those of who says the
    commonest of the choices [positions] everywhere, and more than next to none."""
    if not len(choices):
        return False
    constant = (choices == choices.mode().values).double()
    return any(_share(hits) >= NEAR_ZERO and surely_above(hits.double() - constant, 0.0, len(tried)) for hits in tried)


def _donors(pair: Pair, drafter: Drafter, written: Written, base: Tensor) -> tuple[Finding, list[Tensor]]:
    """Whether the keys and values of other layers than the pair's donors suit the drafter better."""
    config = pair.target.config
    best, place, tried = base, "", list[Tensor]()
    for kind in LAYER_TYPES:
        if kind not in drafter.config.text.layer_types:
            continue
        for layer in range(config.first_kv_shared_layer):
            if config.layer_types[layer] == kind and layer != config.donor_layers[kind]:
                found = hits(pair, drafter, written, donors={kind: layer})
                tried.append(found)
                if found.sum() > best.sum():
                    best, place = found, f"layer {layer} in place of {config.donor_layers[kind]} ({kind})"
    name = "donor layers"
    if not place:
        return Finding(name, "not it", "no other layer's keys and values give more hits"), tried
    measured = f"{_share(best):.0%} with {place}, {_share(base):.0%} as configured"
    if not explains(base, best, len(tried)):
        return Finding(name, "not it", measured), tried
    advice = (
        "the drafter was trained on other layers' keys and values: restore layer_types and num_kv_shared_layers of the"
        " target's config.json from its source"
    )
    return Finding(name, "cause", measured, advice), tried


def _window(pair: Pair, drafter: Drafter, written: Written, base: Tensor) -> tuple[Finding, list[Tensor]]:
    """Whether another sliding window suits the drafter better."""
    name, window = "sliding window", drafter.config.text.sliding_window
    longest = max(len(rows.tokens_T) for rows in written.rows)
    if SLIDING not in drafter.config.text.layer_types:
        return Finding(name, "not measured", "the drafter has no sliding layers"), []
    others = (window // 4, window // 2, 2 * window, longest)
    tried = sorted({w for w in others if w >= 2 and min(w, longest) != min(window, longest)})
    if not tried:
        return Finding(name, "not measured", f"no text reaches beyond {window // 4} tokens; give longer prompts"), []
    scores = {w: hits(pair, drafter, written, window=w) for w in tried}
    alternatives = list(scores.values())
    best = max(scores, key=lambda w: int(scores[w].sum()))
    measured = f"{_share(scores[best]):.0%} with a window of {best} tokens, {_share(base):.0%} with {window}"
    if not explains(base, scores[best], len(tried)):
        return Finding(name, "not it", measured), alternatives
    advice = (
        "the drafter was trained with another window: restore sliding_window of both config.json files from the source"
    )
    return Finding(name, "cause", measured, advice), alternatives


def _itself(pair: Pair, drafter: Drafter, foreign: Sequence[Prompt], share: float, something: bool) -> list[Finding]:
    """Of a pair that is put together as it should be: whether the drafter knows nothing, little, or another target."""
    rows = [target_rows(pair.target, pair.encode(text.content)) for text in foreign]
    rows = [row for row in rows if len(row.tokens_T) >= 3]
    if not rows:
        needed = "it needs text that others wrote; give --data"
        return [
            Finding(ITSELF, "not measured", needed) if something else _unfit(f"{share:.0%} of first drafts are right"),
            Finding(FINE_TUNE, "not measured", needed),
        ]
    texts = [replace(row, choices_T=torch.cat((row.tokens_T[1:], row.tokens_T[-1:]))) for row in rows]
    right = hits(pair, drafter, Written([_cut(row) for row in texts], [1] * len(rows)))
    targets = torch.cat([row.choices_T[1:-1] == row.tokens_T[2:] for row in rows])
    measured = (
        f"of others' text the drafter foretells {_share(right):.0%} of tokens and the target {_share(targets):.0%}"
    )
    if surely_above(right.double() - KNOWS_TEXT * targets.double()):
        advice = (
            "the drafter was made for another fine-tune of this model: adapt it with gemma-mtp train --target TARGET"
            " --drafter DRAFTER --data YOUR-TEXT --out DIRECTORY"
        )
        of_others = f"{measured}, but only {share:.0%} of what the target chooses itself"
        return [Finding(ITSELF, "not it", measured), Finding(FINE_TUNE, "cause", of_others, advice)]
    says_little = Finding(FINE_TUNE, "not it", measured)
    if not something and not knows_something(torch.cat([row.tokens_T[2:] for row in rows]), [right]):
        return [_unfit(f"{measured}, and {share:.0%} of what the target chooses itself"), says_little]
    advice = "the drafter knows some of the text, but little: train it longer, or on more, with gemma-mtp train"
    return [Finding(ITSELF, "cause", measured, advice), says_little]


def _unfit(measured: str) -> Finding:
    return Finding(
        ITSELF, "cause", f"{measured}: no more than one guess for all, however the pair is put together",
        "the drafter does not fit this target at all: it is untrained, damaged or of another model; copy it again, or"
        " make one with gemma-mtp train --new",
    )  # fmt: skip


def _cut(row: Rows) -> Rows:
    """Without the last row, of which the text does not say what follows."""
    T = len(row.tokens_T) - 1
    stored = {layer: (k[:, :T], v[:, :T]) for layer, (k, v) in row.stored.items()}
    return Rows(row.tokens_T[:T], row.hidden_TD[:T], row.choices_T[:T], stored)


@torch.inference_mode()
def first_drafts(pair: Pair, written: Written) -> Tensor:
    """Returns whether first drafts are the target's choice where it went on from prompts, boolean [positions]."""
    assert pair.drafter is not None
    return hits(pair, pair.drafter, written)


def compare_prompts(pair: Pair, plain: Written, templated: Written) -> Finding:
    """Whether the drafter suits prompts through the chat template less than the same ones as plain text."""
    return compare_shares(
        "chat template", first_drafts(pair, templated), first_drafts(pair, plain), "through the chat template",
        "as plain text",
        "the drafter was trained on another template: compare chat_template.jinja and tokenizer_config.json with the"
        " source's, or adapt the drafter on conversations with gemma-mtp train",
    )  # fmt: skip


def compare_types(pair: Pair, written: Written, unquantised: Pair, of_unquantised: Written) -> Finding:
    """Whether the drafter suits the target as it is quantised less than the target as it was."""
    return compare_shares(
        "the target's quantisation", first_drafts(pair, written), first_drafts(unquantised, of_unquantised),
        "quantised", "unquantised",
        "the drafter was made for other weights: use the drafter of the quantised checkpoint (QAT to QAT), a finer"
        " --quantize, or adapt the drafter with gemma-mtp train --quantize",
    )  # fmt: skip


def compare_shares(name: str, own: Tensor, other: Tensor, how: str, else_how: str, advice: str) -> Finding:
    """Whether `other` has surely the larger share of hits; the positions are not the same ones."""
    error = math.sqrt(0.25 / max(1, len(own)) + 0.25 / max(1, len(other)))
    measured = f"{_share(own):.0%} {how}, {_share(other):.0%} {else_how}"
    if _share(other) < EXPLAINS or _share(other) - _share(own) < max(2 * LEAST_GAIN, 2 * sigmas() * error):
        return Finding(name, "not it", measured)
    return Finding(name, "cause", measured, advice)
