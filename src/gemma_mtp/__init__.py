"""Decode Gemma 4 models faster with Multi-Token-Prediction drafters, and with exactly the same output.

from gemma_mtp import SamplingParams, load_pair

pair = load_pair()  # the bundled pair; or load_pair("target-dir", "drafter-dir")
result = pair.generate("def fibonacci(n):", SamplingParams(max_tokens=64))
print(result.text, result.mean_acceptance_length)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_mtp.decoding.grammar import Grammar
    from gemma_mtp.decoding.params import SamplingParams
    from gemma_mtp.engine.pair import Pair, TextStream, load_pair
    from gemma_mtp.engine.result import GenerationResult, RoundStats, TokenLogprob
    from gemma_mtp.errors import GemmaMtpError

__version__ = "0.1.0"

_HOMES = {
    "Grammar": "gemma_mtp.decoding.grammar",
    "SamplingParams": "gemma_mtp.decoding.params",
    "Pair": "gemma_mtp.engine.pair",
    "TextStream": "gemma_mtp.engine.pair",
    "load_pair": "gemma_mtp.engine.pair",
    "GenerationResult": "gemma_mtp.engine.result",
    "RoundStats": "gemma_mtp.engine.result",
    "TokenLogprob": "gemma_mtp.engine.result",
    "GemmaMtpError": "gemma_mtp.errors",
}

__all__ = [
    "GemmaMtpError",
    "GenerationResult",
    "Grammar",
    "Pair",
    "RoundStats",
    "SamplingParams",
    "TextStream",
    "TokenLogprob",
    "__version__",
    "load_pair",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: importing torch takes seconds, reading `__version__` need not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gemma_mtp' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
