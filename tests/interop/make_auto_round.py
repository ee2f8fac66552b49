"""A tiny target of experts as AutoRound packs it, and what its own layers make of the weights:
`make_auto_round.py DIRECTORY`, with auto-round 0.15.1 and what it depends on (no list of ours: it pins much).

Most matrices have 4 bits in groups of 32, some 2, 3 and 8, one stays as it is. Beside the checkpoint,
expected.safetensors has the values of packed matrices, float16, as its layers compute them: products with one.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

directory = Path(sys.argv[1])
TEXT: dict[str, Any] = {
    "vocab_size": 61, "vocab_size_per_layer_input": 0, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32,
    "sliding_window": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "enable_moe_block": True,
    "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 32, "max_position_embeddings": 512,
}  # fmt: skip
OTHERS = {"0.mlp.down_proj": 8, "1.self_attn.q_proj": 2, "1.mlp.up_proj": 3, "0.experts.1.up_proj": 8,
          "1.mlp.gate_proj": 16}  # fmt: skip

torch.manual_seed(0)
model = Gemma4ForCausalLM(Gemma4TextConfig(**TEXT)).bfloat16()
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
with tempfile.TemporaryDirectory() as made:
    model.save_pretrained(f"{made}/source")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t3"))
    AutoRound(
        AutoModelForCausalLM.from_pretrained(f"{made}/source", dtype="bfloat16"),
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t3"), scheme="W4A16", group_size=32, iters=0,
        disable_opt_rtn=True, device_map="cpu",
        layer_config={f"model.layers.{name}": {"bits": bits} for name, bits in OTHERS.items()},
    ).quantize_and_save(f"{made}/packed", format="auto_round")  # fmt: skip
    (written,) = Path(made, "packed").glob("**/model.safetensors")
    directory.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(written.parent / name, directory / name)
    layers = AutoModelForCausalLM.from_pretrained(written.parent, dtype=torch.float32, device_map="cpu")
expected = {
    f"{name}.weight": layer(torch.eye(layer.infeatures)).T.half().contiguous()
    for name, layer in layers.named_modules() if hasattr(layer, "qweight")
}  # fmt: skip
save_file(expected, directory / "expected.safetensors")
