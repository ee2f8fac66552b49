"""What `gpu_check.py` looks at: the five sizes on a card, or tiny ones in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemma_mtp.config import PRESETS, DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.engine.pair import Pair, load_pair

Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Scale:
    """`products`: N, K by size; `gated`: of gate and up together; `heads`: of tables. `rows`: of calls that are
    compared. `attention`: query heads, key-value heads, head size, window. `chunks`: rows of a sequence in a call.
    `models`: configurations by name. `context`: committed rows that calls and rounds are timed at."""

    instructions: tuple[int, int]
    products: dict[str, Shapes]
    gated: dict[str, Shapes]
    heads: dict[str, Shapes]
    rows: tuple[int, ...]
    attention: tuple[tuple[int, int, int, int], ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    sequences: int
    models: dict[str, tuple[TextConfig, DrafterConfig]]
    context: int
    drafts: tuple[int, ...]
    prompts: int
    prompt_tokens: int
    tokens: int
    pair: Callable[[torch.device], Pair]


def full() -> Scale:
    """The five sizes. Generations of `prompts` prompts each: more than 200 are compared with plain ones."""
    return Scale(
        instructions=(8192, 5376),
        products={
            "E2B": ((2560, 1536), (1536, 2048), (1536, 6144)), "E4B": ((3072, 2560), (2560, 2048), (2560, 10240)),
            "12B": ((8192, 3840), (3840, 4096), (3840, 15360)), "26B-A4B": ((8192, 2816), (2816, 4096), (2816, 2112)),
            "31B": ((16384, 5376), (5376, 8192), (5376, 21504)),
        },
        gated={"E2B": ((6144, 1536),), "E4B": ((10240, 2560),), "12B": ((15360, 3840),), "31B": ((21504, 5376),)},
        heads={"E2B": ((262144, 1536),), "31B": ((262144, 5376),)},
        rows=(1, 2, 3, 5, 9, 16, 17, 64, 144, 512),
        attention=((32, 16, 256, 1024), (32, 4, 512, 0), (8, 1, 256, 512), (16, 1, 512, 0)),
        contexts=(1, 31, 32, 33, 255, 256, 257, 4096, 32768),
        chunks=(1, 2, 9, 64, 512),
        sequences=16,
        models={name: _preset(name) for name in ("E2B", "E4B", "12B", "26B-A4B", "31B")},
        context=1024, drafts=(2, 4, 8), prompts=12, prompt_tokens=160, tokens=48,
        pair=lambda device: load_pair(dtype="bfloat16", device=device),
    )  # fmt: skip


def _preset(name: str) -> tuple[TextConfig, DrafterConfig]:
    drafter = PRESETS[f"gemma-4-{name}-it-assistant"]
    target = PRESETS[f"gemma-4-{name}-it"]
    assert isinstance(target, TargetConfig) and isinstance(drafter, DrafterConfig)
    return target.text, drafter


def tiny() -> Scale:
    """Sizes that the interpreter gets through in a minute; needs the tests' models."""
    from models import WIDE, random_target, wide_drafter

    from gemma_mtp.backend.reference import ReferenceBackend
    from gemma_mtp.config.generation import GenerationDefaults

    def pair(device: torch.device) -> Pair:
        target, drafter = random_target(5, WIDE["ple"]).bfloat16(), wide_drafter(WIDE["ple"], True).bfloat16()
        return Pair(ReferenceBackend(target, drafter), None, GenerationDefaults(eos_token_ids=()))

    return Scale(
        instructions=(8, 64), products={"tiny": ((40, 576),)}, gated={"tiny": ((20, 64),)}, heads={"tiny": ((70, 64),)},
        rows=(1, 2, 17), attention=((4, 2, 16, 40),), contexts=(1, 33), chunks=(1, 9), sequences=2,
        models={name: (WIDE[name], wide_drafter(WIDE[name], name == "ple").config) for name in ("ple", "moe")},
        context=40, drafts=(2,), prompts=1, prompt_tokens=4, tokens=2, pair=pair,
    )  # fmt: skip
