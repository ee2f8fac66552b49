"""Sound checkpoints of every format, which `fuzz_checkpoints.py` damages."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from io import BytesIO
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models as tokenizer_models

from gemma_mtp.checkpoint import save_drafter, save_target
from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.config import FULL, SLIDING, DrafterConfig, LayerOptions, RopeConfig, TargetConfig, TextConfig
from gemma_mtp.files.gguf import read_header
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.training.shapes import initialise

VOCAB = 64
#: before the names of files that are not changed
BASE = "base-"
TEXT = TextConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, global_head_dim=32, num_global_key_value_heads=1,
    layer_types=(SLIDING, FULL, FULL), sliding_window=8, num_kv_shared_layers=1, max_position_embeddings=64,
)  # fmt: skip
PLAIN = LayerOptions(value_norm=False, score_scale=32**-0.5, layer_scalar=False, float32_norms=True)
GEMMA3 = TextConfig(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, global_head_dim=32, num_global_key_value_heads=1, layer_types=(SLIDING, FULL),
    sliding_window=8, max_position_embeddings=64, full_rope=RopeConfig(1e6), options=PLAIN, model_type="gemma3_text",
)  # fmt: skip


class Seeds:
    """Sound checkpoints, made once, by kind: the files of a directory."""

    def __init__(self, root: Path) -> None:
        target, drafter, plain = root / "target", root / "drafter", root / "plain"
        self._save(TEXT, "gemma4_text", target)
        self._save(GEMMA3, "gemma3_text", plain)
        text = dataclasses.replace(TEXT, num_hidden_layers=2, layer_types=(SLIDING, FULL), num_kv_shared_layers=2)
        config = DrafterConfig(text, 64, use_ordered_embeddings=True, num_centroids=8, centroid_intermediate_top_k=2)
        made = Drafter(config)
        initialise(made, 1)
        assert made.masked_embedding is not None
        made.masked_embedding.token_ordering.copy_(torch.arange(VOCAB))
        save_drafter(made, config, drafter, torch.float32)
        for name, kind in (("f32", "F32"), ("q8", "Q8_0"), ("q4", "Q4_0")):
            (root / name).mkdir()
            export_gguf(target, root / name / "model.gguf", kind)
        (root / "drafter.gguf").mkdir()
        export_gguf(drafter, root / "drafter.gguf" / "model.gguf", "Q8_0")
        self._split(root / "f32" / "model.gguf", root / "split")
        self._shard(target, root / "sharded")
        self._adapt(root / "adapter")
        self.files = {
            directory.name: {
                file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.suffix != ".md"
            }
            for directory in sorted(root.iterdir())
        }

    def whole(self, kind: str) -> dict[str, bytes]:
        """The files of a kind, and those of the target that an adapter is for."""
        base = self.files["target"] if kind == "adapter" else {}
        return {**self.files[kind], **{BASE + name: content for name, content in base.items()}}

    def _save(self, config: TextConfig, model_type: str, directory: Path) -> None:
        model = Target(config)
        initialise(model, 0)
        save_target(model, TargetConfig(config, model_type), directory, torch.float32)
        raw = RawTokenizer(tokenizer_models.BPE(vocab={chr(48 + i): i for i in range(VOCAB)}, merges=[]))
        raw.save(str(directory / "tokenizer.json"))
        special = {"eos_token": "0", "chat_template": "{{ messages[0].content }}"}
        (directory / "tokenizer_config.json").write_text(json.dumps(special))
        (directory / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [1], "top_k": 4, "do_sample": True})
        )

    def _split(self, file: Path, out: Path) -> None:
        """Two parts: all but the header's counts are of the first, and the second is empty."""
        out.mkdir()
        content = file.read_bytes()
        count = struct.unpack_from("<Q", content, 8)[0]
        pairs = struct.unpack_from("<Q", content, 16)[0]
        first = content[:16] + struct.pack("<Q", pairs + 2) + _number("split.no", 0) + _number("split.count", 2)
        begin, old = 24, len(content[:24])
        rest = content[old:]
        end = read_header(file)
        data = min(entry.offset for entry in end.tensors.values())
        head = first + rest[: _header_bytes(content) - begin]
        padded = head + bytes(-len(head) % 32)
        (out / "model-00001-of-00002.gguf").write_bytes(padded + content[data:])
        assert count == len(end.tensors)
        last = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + _number("split.no", 1) + _number("split.count", 2)
        (out / "model-00002-of-00002.gguf").write_bytes(last + bytes(-len(last) % 32))

    def _shard(self, target: Path, out: Path) -> None:
        shutil.copytree(target, out)
        tensors, _ = load_tensors(target / "model.safetensors")
        (out / "model.safetensors").unlink()
        names, files = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        parts = {files[0]: names[::2], files[1]: names[1::2]}
        for file, own in parts.items():
            save_tensors(out / file, {name: tensors[name] for name in own}, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))

    def _adapt(self, out: Path) -> None:
        out.mkdir()
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        save_tensors(out / "adapter_model.safetensors",
                     {f"{name}A.weight": torch.ones(2, 64), f"{name}B.weight": torch.ones(64, 2)})  # fmt: skip
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {r"layers\.0\..*": 2}, "bias": "none",
                  "target_modules": ["q_proj"]}  # fmt: skip
        (out / "adapter_config.json").write_text(json.dumps(config))


def _number(key: str, value: int) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IH", 2, value)


def _header_bytes(content: bytes) -> int:
    """Where a GGUF file's header ends, by walking over it."""
    file = BytesIO(content)
    file.seek(8)
    tensors, pairs = struct.unpack("<QQ", file.read(16))

    def text() -> None:
        file.seek(struct.unpack("<Q", file.read(8))[0], 1)

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = struct.unpack("<IQ", file.read(12))
            for _ in range(count):
                value(inner)
        else:
            file.seek(sizes[kind], 1)

    for _ in range(pairs):
        text()
        value(struct.unpack("<I", file.read(4))[0])
    for _ in range(tensors):
        text()
        dimensions = struct.unpack("<I", file.read(4))[0]
        file.seek(8 * dimensions + 12, 1)
    return file.tell()
