"""What files tell besides weights: how AutoRound found them, in whatever format, and what else tools round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gemma_mtp.checkpoint.quantisations.base import Quantised

#: its fields, of which the weights depend on none that does not show in their tensors
RECORDS = dict.fromkeys((
    "autoround_version", "data_type", "bits", "sym", "group_size", "block_name_to_quantize", "extra_config", "act_bits",
    "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "batch_size", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters", "lr", "low_gpu_mem_usage",
    "minmax_lr", "nsamples", "quant_block_list", "regex_config", "scale_dtype", "seqlen", "supported_types",
    "static_attention_dtype", "static_kv_dtype", "static_attention_granularity", "static_kv_granularity", "dataset",
))  # fmt: skip
#: names of what else belongs to a module in files of several tools, which weights do not depend on
ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale",
               "output_zero_point", "k_scale", "v_scale", "q_scale")  # fmt: skip
#: notes on what a format's own tools would do besides
ROUNDS_ACTIVATIONS = "its own tools round activations too; here they stay as they are."
ROUNDS_KEYS = "it says how to quantise keys and values, which is not followed: they are kept as always."


def notes(checkpoint: Quantised, others: Iterable[Mapping[str, Any]] = (), rounds: bool = False) -> list[str]:
    """Returns sentences on what is rounded besides weights by what config.json says of all matrices, and of `others`;
    `rounds`: activations are, whatever it says."""
    rounds = rounds or any(each.get("act_bits") not in (None, 16, 32) for each in (checkpoint.config, *others))
    keys = any(checkpoint.config.get(f"static_{part}_dtype") is not None for part in ("kv", "attention"))
    return [ROUNDS_ACTIVATIONS] * rounds + [ROUNDS_KEYS] * keys
