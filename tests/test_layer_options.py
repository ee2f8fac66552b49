"""Layers of another family: Gemma 3 as a table of options, against transformers' own Gemma 3, in fp32."""

import dataclasses

import pytest
import torch
from models import TINY, backends, opened
from oracle import F, S, randomise
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_mtp.backend.base import Backend, Rows
from gemma_mtp.backend.reference import ReferenceBackend
from gemma_mtp.config import LayerOptions, TargetConfig, TextConfig, target_config_to_hf
from gemma_mtp.config.rope import RopeConfig
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.round import forward
from gemma_mtp.errors import ConfigError
from gemma_mtp.model.target import Target

VOCAB, SCALAR, LINEAR = 61, 24, 8.0
#: what Gemma 3 does otherwise than Gemma 4
GEMMA3 = LayerOptions(value_norm=False, score_scale=SCALAR**-0.5, layer_scalar=False)
CONFIG = TextConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, num_global_key_value_heads=2, head_dim=16, global_head_dim=16,
    layer_types=("sliding_attention",) * 5 + ("full_attention",), sliding_window=8, max_position_embeddings=512,
    sliding_rope=RopeConfig(1e4), full_rope=RopeConfig(1e6, factor=LINEAR), options=GEMMA3,
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, layer_types=list(CONFIG.layer_types), sliding_window=8,
        max_position_embeddings=512, query_pre_attn_scalar=SCALAR, final_logit_softcapping=None,
        rope_parameters={S: {"rope_type": "default", "rope_theta": 1e4},
                         F: {"rope_type": "linear", "rope_theta": 1e6, "factor": LINEAR}},
    )  # fmt: skip
    return randomise(Gemma3ForCausalLM(config), 0)


def loaded(theirs: Gemma3ForCausalLM) -> Target:
    """Ours with their weights. Their norms multiply by 1 + weight, which is ours as it is loaded."""
    target = Target(CONFIG).eval().requires_grad_(False)
    ours, given = target.checkpoint_tensors(), theirs.state_dict()
    for name, weight in ours.items():
        weight.copy_(1 + given[name] if "norm" in name else given[name])
    assert set(ours) == set(given) - {"lm_head.weight"}
    return target


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Within 1e-4 of the largest value."""
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


def through_the_cache(backend: Backend, tokens: Tensor) -> Tensor:
    """Logits of the rows after the 20th, by calls of one row and of several."""
    cache = opened(backend, tokens[:20].tolist(), SamplingParams(), room=40, chunk_rows=7)[0].cache
    out, start = [], 20
    for rows in [1, 1, 5, 3, 9, 1, 8]:
        out.append(backend.logits(forward(backend, [Rows(cache, tokens[start : start + rows].tolist(), rows)])))
        cache.table.commit(rows)
        start += rows
    return torch.cat(out)


TOKENS = torch.randint(3, VOCAB, (48,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_gemma_3_is_a_table(theirs: Gemma3ForCausalLM) -> None:
    """The reference layers, and the native ones, give transformers' logits beyond the window."""
    expected, target = theirs(TOKENS[None]).logits[0], loaded(theirs)
    assert close(target.logits(target.forward_sequence(TOKENS[None]).hidden_BTD[0]), expected)
    for backend in backends(target).values():
        assert close(through_the_cache(backend, TOKENS), expected[20:])


@pytest.mark.parametrize(
    "option", [{"value_norm": True}, {"score_scale": 1.0}, {"score_scale": 16**-0.5}], ids=lambda option: str(option)
)
@torch.inference_mode()
def test_every_option_counts(theirs: Gemma3ForCausalLM, option: dict[str, float]) -> None:
    """With one of Gemma 4's instead, the logits are others, natively too."""
    target, other = loaded(theirs), loaded(theirs)
    config = dataclasses.replace(CONFIG, options=dataclasses.replace(GEMMA3, **option))  # type: ignore[arg-type]
    changed = Target(config).eval().requires_grad_(False)
    changed.load_state_dict(other.state_dict())
    whole, through = (target.forward_sequence(TOKENS[None]).hidden_BTD[0], through_the_cache)
    assert not close(changed.forward_sequence(TOKENS[None]).hidden_BTD[0], whole)
    expected = through(ReferenceBackend(changed), TOKENS)
    for backend in backends(changed).values():
        assert close(through(backend, TOKENS), expected)
        assert not close(through(backend, TOKENS), through(ReferenceBackend(target), TOKENS))


@torch.inference_mode()
def test_a_linear_rope_divides_the_frequencies(theirs: Gemma3ForCausalLM) -> None:
    plain = Target(dataclasses.replace(CONFIG, full_rope=RopeConfig(1e6)))
    plain.load_state_dict(loaded(theirs).state_dict())
    assert not close(plain.logits(plain.forward_sequence(TOKENS[None]).hidden_BTD[0]), theirs(TOKENS[None]).logits[0])


def test_another_family_is_not_written_as_gemma_4() -> None:
    for config in (CONFIG, dataclasses.replace(TINY, options=GEMMA3)):
        with pytest.raises(ConfigError, match="can not be written as one"):
            target_config_to_hf(TargetConfig(config))
