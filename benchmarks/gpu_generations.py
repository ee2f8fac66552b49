"""Part 4 of `gpu_check.py`: generations of a pair with and without drafts, alone and in batches: tokens and the bits of
log-probabilities."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpu_run import Line, Run

from gemma_mtp.backend.cuda.backend import CudaBackend
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair
from gemma_mtp.engine.request import Generation, Request
from gemma_mtp.engine.result import GenerationResult
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread

#: what was compared: a name, how many generations, how many differ, a note
Found = tuple[str, int, int, str]
KINDS = {"greedy": {}, "drawn": {"temperature": 0.9}, "top-k": {"temperature": 1.0, "top_k": 64, "top_p": 0.95}}
DRAFTS = (1, 2, 4, 8)


def requests_of(kind: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[Request]:
    """Requests that report log-probabilities, so that logits are compared too, but for every other drawn one: what the
    kernels choose themselves reports none."""
    return [
        Request(list(prompt), SamplingParams(max_tokens=tokens, seed=i, ignore_eos=True, logprobs=2 if i % 2 else None,
                                             **KINDS[kind]), 0)  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def same(one: GenerationResult, other: GenerationResult) -> bool:
    """Whether tokens and log-probabilities are equal."""
    return one.token_ids == other.token_ids and one.logprobs == other.logprobs


def finished(generation: Generation) -> GenerationResult:
    """Read to the end."""
    for _ in generation:
        pass
    return generation.result


def compare(
    pair: Pair,
    kind: str,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    drafts: Sequence[int],
    settings: EngineSettings,
) -> Iterator[Found]:
    """Plain generations against drafted ones, and against a batch that preempts and reuses beginnings."""
    requests = requests_of(kind, prompts, tokens)
    plain = [pair.generate(request.prompt_token_ids, request.params, draft_tokens=0) for request in requests]
    for K in drafts:
        drafted = [pair.generate(request.prompt_token_ids, request.params, draft_tokens=K) for request in requests]
        wrong = sum(not same(one, other) for one, other in zip(plain, drafted, strict=True))
        yield f"{kind}, {K} drafts", len(plain), wrong, ""
    for K in (0, max(drafts)):
        with EngineThread(pair, settings) as engine:
            pending = [engine.submit(replace(request, draft_tokens=K)) for request in requests]
            together = [finished(one) for one in pending]
            stats = engine.stats()
        wrong = sum(not same(one, other) for one, other in zip(plain, together, strict=True))
        note = f"{stats.preemptions} preempted, {stats.prefix_hit_tokens} tokens reused"
        yield f"{kind}, batch, {K} drafts", len(plain), wrong, note


def prompts_of(pair: Pair, count: int, longest: int) -> list[list[int]]:
    """Prompts that often begin alike."""
    rng, vocab = random.Random(1), min(2000, pair.target.config.vocab_size)
    beginnings = [[rng.randrange(3, vocab) for _ in range(longest)] for _ in range(3)]
    return [
        [*beginnings[i % 3][: rng.randint(longest // 8 + 1, longest)], rng.randrange(3, vocab)] for i in range(count)
    ]


def check_generations(run: Run) -> None:
    """A pair in bfloat16 on the card: the bundled one."""
    scale = run.scale
    loaded = scale.pair(run.device)
    assert loaded.drafter is not None
    backend = CudaBackend(loaded.target, loaded.drafter, run.launch, None, run.replays())
    pair = replace(loaded, backend=backend)
    prompts = prompts_of(pair, scale.prompts, scale.prompt_tokens)
    if run.on_card:
        run.attempt(4, "logits beside float32", lambda: _add(run, logits_beside(pair, prompts[0])))
    drafts = DRAFTS if run.on_card else scale.drafts
    settings = EngineSettings(max_running=scale.sequences, max_tokens=400 if run.on_card else 40, kv_memory_mb=6)

    def check(kind: str) -> None:
        for found in compare(pair, kind, prompts, scale.tokens, drafts, settings):
            _add(run, found)
            if run.spent():
                return

    for kind in KINDS:
        if not run.spent():
            run.attempt(4, kind, functools.partial(check, kind))


def _add(run: Run, found: Found) -> None:
    what, compared, wrong, note = found
    run.add(Line(4, what, compared, wrong, note=note))


def logits_beside(pair: Pair, prompt: Sequence[int]) -> Found:
    """How far the logits are from those of float32 on the CPU. No bits are compared."""
    from models_beside import prompt_logits

    wide = load_pair(dtype="float32", device="cpu", use_drafter=False)
    expected = prompt_logits(ReferenceBackend(wide.target), list(prompt))
    found = prompt_logits(pair.backend, list(prompt)).cpu().float()
    return "logits beside float32", 0, 0, f"largest difference {(found - expected).abs().max():.3f}"
