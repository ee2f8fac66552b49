"""Names of tensors in GGUF files of Gemma 4 targets and drafters, and the official names of the same tensors."""

from __future__ import annotations

import re

#: which dimensions of full layers rotate: a part of the configuration
ROPE_FACTORS = "rope_freqs.weight"
#: queries, keys and values in one tensor, which some files have
FUSED_QKV = "blk.{layer}.attn_qkv.weight"
#: experts' gates and the rest of the same product in two tensors, which some files have
SPLIT_EXPERTS = ("blk.{layer}.ffn_gate_exps.weight", "blk.{layer}.ffn_up_exps.weight")
GATE_UP_EXPERTS = "model.layers.{layer}.experts.gate_up_proj"

WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight", "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "pre_projection.weight": "nextn.pre_projection.weight", "post_projection.weight": "nextn.post_projection.weight",
}  # fmt: skip
OF_A_LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight",
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight", "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight", "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight", "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight", "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight", "experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
_OFFICIAL = {theirs: ours for ours, theirs in WHOLE_MODEL.items()}
_OFFICIAL_OF_A_LAYER = {theirs: ours for ours, theirs in OF_A_LAYER.items()}


def gguf_name(official: str) -> str | None:
    """Returns what GGUF files call a tensor, or None where they do not have it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", official)
    if layer is None:
        return WHOLE_MODEL.get(official)
    found = OF_A_LAYER.get(layer[2])
    return None if found is None else f"blk.{layer[1]}.{found}"


def official_name(stored: str) -> str | None:
    """Returns the official name of a tensor of a GGUF file, or None where it has none."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.*)", stored)
    if layer is None:
        return _OFFICIAL.get(stored)
    found = _OFFICIAL_OF_A_LAYER.get(layer[2])
    return None if found is None else f"model.layers.{layer[1]}.{found}"
