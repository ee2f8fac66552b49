"""A tiny target in the layout of Google's mobile checkpoints, by transformers' own layers and writer, and what these
compute: `make_mobile.py DIRECTORY SEED`.

Layers of 4 and of 2 bits, per-layer inputs of 8, a token table of 2 bits by blocks and a per-layer table of 4, a head
of its own. Scales of activations are those of a run without them, some coarser than 8 bits so that what they do is
plain to see, one 0. Beside the checkpoint, expected.safetensors has token ids and logits.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, GemmaQuantizationConfig
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, replace_with_quant_layers

directory, seed = Path(sys.argv[1]), int(sys.argv[2])
S, F = "sliding_attention", "full_attention"
TEXT: dict[str, Any] = {
    "vocab_size": 61, "vocab_size_per_layer_input": 61, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 4, "layer_types": [S, F, S, F], "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32, "final_logit_softcapping": 30.0, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
BITS = {
    r"embed_tokens$": 2, r"embed_tokens_per_layer": 4, r"per_layer_(input_gate|projection|model_projection)": 8,
    r"layers\.[23]\.mlp|lm_head": 2,
}  # fmt: skip
LEVELS = {2: (-2, 1), 4: (-8, 7), 8: (-128, 127)}
generator = torch.Generator().manual_seed(seed)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return numbers.to(torch.int8)
    lanes = (numbers - LEVELS[bits][0]).to(torch.uint8).unflatten(1, (-1, 8 // bits))
    return sum(lanes[..., i] << bits * i for i in range(8 // bits)).to(torch.uint8)


def drawn(rows: int, columns: int, bits: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of all levels, and scales that give them the variance of 1 / columns, about."""
    low, high = LEVELS[bits]
    numbers = torch.randint(low, high + 1, (rows, columns), generator=generator)
    spread = 0.5 + torch.rand(rows, blocks, generator=generator)
    return packed(numbers, bits), spread * columns**-0.5 / (0.3 * 2**bits)


model = Gemma4ForCausalLM(Gemma4TextConfig(**TEXT)).float().eval()
quantization = GemmaQuantizationConfig(
    num_bits=4, quantize_embeddings=True, module_quant_configs={name: {"num_bits": n} for name, n in BITS.items()}
)
replace_with_quant_layers(model, quantization, [])
with torch.no_grad():
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1 and ("norm" in name or "scalar" in name):
            tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight, scale = drawn(module.out_features, module.in_features, module.num_bits, 1)
            module.weight.copy_(weight)
            module.weight_scale.copy_(scale)
        elif isinstance(module, QuantizedEmbedding):
            blocks = module.embedding_dim // (32 if "per_layer" in name else 64)
            table, scale = drawn(module.num_embeddings, module.embedding_dim, module.num_bits, blocks)
            module.embedding_quantized.copy_(table)
            module.embedding_scale = torch.nn.Parameter(scale, requires_grad=False)

linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
seen: dict[str, tuple[float, float]] = {}
for name, module in linears.items():
    module.register_forward_hook(
        lambda _, inputs, output, name=name: seen.__setitem__(
            name, (float(inputs[0].abs().max()), float(output.abs().max()))
        )
    )
ids = torch.randint(0, TEXT["vocab_size"], (1, 24), generator=generator)
with torch.inference_mode():
    model(ids)
with torch.no_grad():
    for i, (name, module) in enumerate(sorted(linears.items())):
        if "layers.1.per_layer_projection" in name:
            continue  # not calibrated
        before, after = seen[name]
        module.input_activation_scale.fill_(before / (40, 25, 140)[i % 3])
        module.output_activation_scale.fill_(after / (60, 30, 130)[i % 3])
with torch.inference_mode():
    logits = model(ids).logits
model.config.quantization_config = quantization
model.save_pretrained(directory)
save_file({"ids": ids, "logits": logits.clone()}, directory / "expected.safetensors")
print(json.dumps({"layers": len(linears)}))
