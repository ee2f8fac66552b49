"""Small random Gemma 3 models built by transformers, and their GGUF files by the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_files import add, close
from oracle import F, S, randomise
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig
from transformers import SiglipVisionConfig as VisionConfig

from gemma_mtp.checkpoint.gguf_names import gguf_name

VOCAB, LAYERS, WINDOW, SCALAR, LINEAR = 61, 7, 8, 24, 8.0
IDS = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1))


def text_config(**changes: Any) -> Gemma3TextConfig:
    """Seven layers, of which the last is a sliding one, as in Gemma 3 1B and in no Gemma 4."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW,
        "max_position_embeddings": 512, "query_pre_attn_scalar": SCALAR,
        "rope_parameters": {S: {"rope_type": "default", "rope_theta": 1e4},
                            F: {"rope_type": "linear", "rope_theta": 1e6, "factor": LINEAR}},
    }  # fmt: skip
    return Gemma3TextConfig(**{**settings, **changes})


def build(seed: int = 0, **changes: Any) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    return randomise(Gemma3ForCausalLM(text_config(**changes)), seed)


def build_multimodal(seed: int = 0) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(seed)
    vision = VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          image_size=28, patch_size=14)  # fmt: skip
    config = Gemma3Config(text_config=text_config(), vision_config=vision, mm_tokens_per_image=4)
    return randomise(Gemma3ForConditionalGeneration(config), seed)


def write_gguf(model: Gemma3ForCausalLM, file: Path, kind: str = "F32", metadata: Mapping[str, Any] = {}) -> Path:
    """A file of architecture `gemma3` as llama.cpp's own conversion writes it: norms with the 1 inside."""
    config, writer = model.config, gguf.GGUFWriter(file, "gemma3")
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "attention.sliding_window": config.sliding_window,
        "rope.freq_base": float(config.rope_parameters[F]["rope_theta"]), "rope.scaling.type": "linear",
        "rope.scaling.factor": LINEAR,
    }  # fmt: skip
    for key, value in {**{f"gemma3.{name}": value for name, value in values.items()}, **metadata}.items():
        if value is not None:
            add(writer, key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = gguf_name(name)
        assert stored is not None
        array = tensor.float().numpy() + np.float32("norm" in name)
        if "norm" in name or kind == "F32":
            writer.add_tensor(stored, array)
        else:
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quantize(array, of), raw_dtype=of)
    close(writer)
    return file
