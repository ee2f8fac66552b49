"""Which fields of a config.json are known: those that are applied, and those that text decoding does not depend on.

A field that is neither may change what the model computes, so it is named: as a warning, or an error if asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_mtp.config.rope import DEFAULT_ROPES, ROPE_FIELDS, rope_type
from gemma_mtp.families.base import Family
from gemma_mtp.families.known import family_of

#: what `parse.py` and `weight_types.py` read of the outer object of a target, and of a drafter
APPLIED_OF_TARGETS = frozenset({
    "model_type", "text_config", "tie_word_embeddings", "eos_token_id", "quantization_config", "transformers_weights",
})  # fmt: skip
APPLIED_OF_DRAFTERS = APPLIED_OF_TARGETS | {
    "backbone_hidden_size", "use_ordered_embeddings", "num_centroids", "centroid_intermediate_top_k",
}  # fmt: skip
#: what they read of the text model's object, once a family's own fields are translated
APPLIED_OF_TEXT = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads", "per_layer_config",
    "layer_types", "sliding_window", "num_kv_shared_layers", "use_double_wide_mlp", "attention_k_eq_v",
    "hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block", "num_experts", "top_k_experts",
    "moe_intermediate_size", "final_logit_softcapping", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    "rope_scaling", "hidden_activation", "attention_bias", "use_bidirectional_attention", "pad_token_id",
    "bos_token_id", "eos_token_id",
})  # fmt: skip

#: what no token depends on: how transformers runs, trains and stores a model, and parts that read images and sound
IRRELEVANT = frozenset({
    "transformers_version", "architectures", "name_or_path", "_name_or_path", "_commit_hash", "dtype", "torch_dtype",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "experts_implementation",
    "_experts_implementation", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
    "tie_last_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "decoder_start_token_id", "sep_token_id", "prefix", "tokenizer_class",
    "initializer_range", "attention_dropout", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
    "tie_encoder_decoder", "tie_word_embeddings", "unsloth_version", "unsloth_fixed", "vision_config", "audio_config",
    "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", "boa_token_id", "eoa_token_id",
    "eoa_token_index", "audio_token_id", "boi_token_index", "eoi_token_index", "boa_token_index", "image_token_index",
    "audio_token_index", "video_token_index", "vision_soft_tokens_per_image", "mm_tokens_per_image",
    "cache_implementation", "pad_token_id", "bos_token_id",
    "eos_token_id",
})  # fmt: skip
#: how to sample, which older tools wrote here: transformers takes it from generation_config.json alone, and so do we
SAMPLING = frozenset({
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "num_beam_groups", "diversity_penalty",
})  # fmt: skip
#: values at which a field of a rotary embedding does nothing, applied or not
NEUTRAL_ROPE_VALUES = {"factor": 1, "partial_rotary_factor": 1}


def config_notes(raw: Mapping[str, Any]) -> list[str]:
    """A sentence for each field that is not known, of a config.json parsed without error; null says nothing."""
    return [
        f"config.json has the field {path}, which is not known and not applied; remove it if the model needs none."
        for path in _unknown_fields(raw, family_of(str(raw.get("model_type"))))
    ]


def _unknown_fields(raw: Mapping[str, Any], family: Family | None) -> Iterator[str]:
    """Their paths, such as `text_config.rope_parameters.full_attention.beta_fast`."""
    nested = raw.get("text_config")
    drafter = family is not None and raw.get("model_type") in family.drafters
    text = dict(raw)
    outer: frozenset[str] = APPLIED_OF_TARGETS
    path = ""
    if isinstance(nested, dict):
        yield from _unknown(raw, APPLIED_OF_DRAFTERS if drafter else APPLIED_OF_TARGETS, "")
        text, outer, path = nested, frozenset(), "text_config."
    if family is not None:
        text = family.translated(text)
    yield from _unknown(text, APPLIED_OF_TEXT | outer, path)
    for name in ("rope_parameters", "rope_scaling"):
        yield from _unknown_of_ropes(text.get(name) or {}, f"{path}{name}.")


def _unknown(raw: Mapping[str, Any], applied: frozenset[str], path: str) -> Iterator[str]:
    for name, value in raw.items():
        if value is not None and name not in applied | IRRELEVANT | SAMPLING:
            yield path + name


def _unknown_of_ropes(ropes: Mapping[str, Any], path: str) -> Iterator[str]:
    for kind, entry in ropes.items():
        if kind not in DEFAULT_ROPES and entry is not None:
            yield path + kind
        elif entry is not None:
            for name, value in entry.items():
                neutral = value is None or NEUTRAL_ROPE_VALUES.get(name) == value
                if name not in ROPE_FIELDS[rope_type(entry)] and not neutral:
                    yield f"{path}{kind}.{name}"
