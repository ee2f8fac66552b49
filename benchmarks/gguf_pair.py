"""A dense Gemma 4 pair as GGUF, for llama.cpp (architectures `gemma4` and `gemma4-assistant`).

Keys and names are those of llama.cpp's own conversion (conversion/gemma.py, src/models/gemma4*.cpp as vendored in
llama-cpp-python 0.3.36). There is no tokenizer inside: the files are driven by token ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from gemma_mtp.checkpoint import read_drafter_config, read_target_config, text_headers
from gemma_mtp.checkpoint.pieces import read_pieces
from gemma_mtp.config import FULL, TextConfig

TYPES = {
    "F32": gguf.GGMLQuantizationType.F32, "BF16": gguf.GGMLQuantizationType.BF16,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}  # fmt: skip
#: part of a file's name: another recipe writes other files
RECIPE = 1
#: rotary frequencies are divided by this where a dimension does not rotate
UNROTATED = 1e30
#: a matrix is converted in pieces of so many values
PIECE_VALUES = 1 << 24
WHOLE_MODEL = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.embed_tokens_per_layer": "per_layer_token_embd", "model.per_layer_projection_norm": "per_layer_proj_norm",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "pre_projection": "nextn.pre_projection", "post_projection": "nextn.post_projection",
}  # fmt: skip
OF_A_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "layer_scalar": "layer_output_scale", "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}  # fmt: skip


def gguf_pair(target: Path, drafter: Path, kind: str, cache: Path) -> tuple[Path, Path]:
    """Both files, of matrices of type `kind` (F32, BF16, Q8_0, Q4_0), written to `cache` at the first call.

    llama.cpp scores a drafter's whole vocabulary: a centroid head's tensors are left out.
    """
    config = read_drafter_config(drafter)
    extra = {"embedding_length_out": config.backbone_hidden_size, "nextn_predict_layers": config.text.num_hidden_layers}
    return (
        _written(target, read_target_config(target).text, "gemma4", {}, kind, cache),
        _written(drafter, config.text, "gemma4-assistant", extra, kind, cache),
    )


def _written(
    directory: Path, text: TextConfig, architecture: str, extra: Mapping[str, int], kind: str, cache: Path
) -> Path:
    """The file of a checkpoint's present content, by its path, size and time of change."""
    state = [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(directory.iterdir())
    ]
    key = hashlib.sha256(json.dumps([RECIPE, state]).encode()).hexdigest()[:12]
    file = cache / "gguf" / f"{architecture}-{kind}-{key}.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        _write(partial, directory, text, architecture, extra, kind)
        partial.replace(file)
    return file


def _write(
    file: Path, directory: Path, text: TextConfig, architecture: str, extra: Mapping[str, int], kind: str
) -> None:
    writer = gguf.GGUFWriter(file, architecture, use_temp_file=False)
    _add_keys(writer, text, architecture, extra)
    headers = text_headers(directory)
    for name, header in headers.items():
        if "masked_embedding" in name:
            continue
        (tensor,) = read_pieces([(header, None)])
        data = _converted(tensor, kind if tensor.ndim == 2 else "F32")
        writer.add_tensor(_gguf_name(name), data, raw_dtype=TYPES[kind] if data.dtype == np.uint8 else None)
    writer.add_tensor("rope_freqs.weight", _rope_divisors(text))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(writer: gguf.GGUFWriter, text: TextConfig, architecture: str, extra: Mapping[str, int]) -> None:
    layers = range(text.num_hidden_layers)
    numbers = {
        "vocab_size": text.vocab_size, "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size, "block_count": text.num_hidden_layers,
        "attention.head_count": text.num_attention_heads, "attention.sliding_window": text.sliding_window,
        "attention.key_length": text.global_head_dim, "attention.value_length": text.global_head_dim,
        "attention.key_length_swa": text.head_dim, "attention.value_length_swa": text.head_dim,
        "rope.dimension_count": text.global_head_dim, "rope.dimension_count_swa": text.head_dim,
        "attention.shared_kv_layers": text.num_kv_shared_layers,
        "embedding_length_per_layer_input": text.hidden_size_per_layer_input, **extra,
    }  # fmt: skip
    for name, value in numbers.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    reals = {
        "attention.layer_norm_rms_epsilon": text.rms_norm_eps, "rope.freq_base": text.full_rope.rope_theta,
        "rope.freq_base_swa": text.sliding_rope.rope_theta,
        "final_logit_softcapping": text.final_logit_softcapping or 0.0,
    }  # fmt: skip
    for name, real in reals.items():
        writer.add_float32(f"{architecture}.{name}", real)
    by_layer: dict[str, list[int] | list[bool]] = {
        "attention.head_count_kv": [text.layer_kv_heads(i) for i in layers],
        "feed_forward_length": [text.layer_intermediate_size(i) for i in layers],
        "attention.sliding_window_pattern": [text.is_sliding(i) for i in layers],
    }
    for name, values in by_layer.items():
        writer.add_array(f"{architecture}.{name}", values)
    writer.add_string("tokenizer.ggml.model", "none")


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
    return f"{WHOLE_MODEL[stem]}.weight" if layer is None else f"blk.{layer[1]}.{OF_A_LAYER[layer[2]]}.weight"


def _converted(tensor: Tensor, kind: str) -> np.ndarray:
    """Float32, or the type's bytes [rows, bytes of a row]."""
    if kind == "F32":
        return tensor.float().numpy()
    if kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    step = max(1, PIECE_VALUES // tensor.shape[1])
    return np.concatenate([gguf.quants.quantize(part.float().numpy(), TYPES[kind]) for part in tensor.split(step)])


def _rope_divisors(text: TextConfig) -> np.ndarray:
    """Full layers rotate only their first dimensions, by frequencies of the whole head."""
    assert FULL in text.layer_types
    half = text.global_head_dim // 2
    rotated = int(half * text.full_rope.partial_rotary_factor)
    return np.array([1.0] * rotated + [UNROTATED] * (half - rotated), dtype=np.float32)
