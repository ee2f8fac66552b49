"""The bytes of a pair's weights as they are kept in memory, and how many of them a call reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_mtp.config import DrafterConfig, TargetConfig, TextConfig
from gemma_mtp.weight_types import BITS, GROUPS, WeightTypes

#: a matrix is quantised where its part is and where its columns are whole blocks
QUANTISED_BLOCK = 64
SCALE_BYTES, TOKEN_ID_BYTES = 4, 8
#: `matrix`: multiplied with every row, or looked up; `chooser`: never quantised; `vector`: norms and scalars; `wide`:
#: the same, always float32; `ids`
Kind = Literal["matrix", "chooser", "vector", "wide", "ids"]
WIDE_BYTES = 4
#: what reads it: every call, rows that are looked up in it, or rows whose expert was chosen
Read = Literal["whole", "rows", "experts"]


@dataclass(frozen=True)
class WeightShape:
    """One stored weight: `count` matrices of [rows, columns], in a part that can be quantised apart."""

    part: str
    kind: Kind
    rows: int
    columns: int
    count: int = 1
    read: Read = "whole"

    @property
    def numel(self) -> int:
        return self.count * self.rows * self.columns

    def nbytes(self, types: WeightTypes, dense_bytes: int) -> int:
        """Returns its bytes where dense numbers take `dense_bytes` each."""
        if self.kind == "ids":
            return self.numel * TOKEN_ID_BYTES
        if self.kind == "wide":
            return self.numel * WIDE_BYTES
        quantised = types.parts[self.part] if self.kind == "matrix" else None
        if quantised is None or self.columns % QUANTISED_BLOCK:
            return self.numel * dense_bytes
        return self.numel * BITS[quantised] // 8 + self.numel // GROUPS[quantised] * SCALE_BYTES


def target_shapes(config: TargetConfig) -> list[WeightShape]:
    """Returns every weight of a target's text model, projections of one input fused as they are kept."""
    text = config.text
    D, P, L = text.hidden_size, text.hidden_size_per_layer_input, text.num_hidden_layers
    shapes = [WeightShape("embeddings", "matrix", text.vocab_size, D)]  # the head too, unless that is stored apart
    if not text.tie_word_embeddings:
        shapes = [WeightShape("embeddings", "matrix", text.vocab_size, D, read="rows"), *shapes]
    for layer in range(L):
        shapes += _layer(text, layer, "target")
    if P:
        shapes += [
            WeightShape("embeddings", "matrix", text.vocab_size_per_layer_input, L * P, read="rows"),
            WeightShape("target", "matrix", L * P, D), _norms(text, "target", P),
        ]  # fmt: skip
    return [*shapes, _norms(text, "target", D)]


def drafter_shapes(config: DrafterConfig) -> list[WeightShape]:
    """Returns every weight of a drafter. Where its head stands apart from its embedding, the latter is not kept."""
    text, D = config.text, config.backbone_hidden_size
    h, V = text.hidden_size, text.vocab_size
    centroids = config.use_ordered_embeddings
    shapes = [WeightShape("drafter-head", "matrix", V, h, read="rows" if centroids else "whole")]
    for layer in range(text.num_hidden_layers):
        shapes += _layer(text, layer, "drafter")
    shapes += [WeightShape("drafter", "matrix", h, 2 * D), WeightShape("drafter", "matrix", D, h)]
    if centroids:
        shapes.append(WeightShape("drafter", "chooser", config.num_centroids, h))
        shapes.append(WeightShape("drafter", "ids", V, 1, read="rows"))
    return [*shapes, _norms(text, "drafter", h)]


def shapes_of(config: TargetConfig | DrafterConfig) -> list[WeightShape]:
    return target_shapes(config) if isinstance(config, TargetConfig) else drafter_shapes(config)


def weight_bytes(config: TargetConfig | DrafterConfig, types: WeightTypes, dense_bytes: int) -> int:
    """Returns the bytes of a model's weights: those of its tensors, once it is loaded."""
    return sum(shape.nbytes(types, dense_bytes) for shape in shapes_of(config))


def wide_copies(config: TargetConfig | DrafterConfig, dense_bytes: int) -> int:
    """Returns what the native operators and the GPU's kernels keep beside the weights: vectors as float32."""
    wide = 0 if dense_bytes == 4 else 4
    return sum(shape.numel * wide for shape in shapes_of(config) if shape.kind == "vector")


def target_read_bytes(config: TargetConfig, types: WeightTypes, dense_bytes: int, rows: int) -> float:
    """Returns the bytes of weights that a call of so many rows reads: experts as often as rows choose different ones,
    if each chooses evenly."""
    shares = _shares(config, rows)
    return sum(shape.nbytes(types, dense_bytes) * shares[shape.read] for shape in target_shapes(config))


def layers_read(config: TargetConfig, types: WeightTypes, dense_bytes: int, rows: int) -> float:
    """Returns which share of the bytes of a target's matrices, tables and head left out, such a call reads."""
    shares = _shares(config, rows)
    matrices = [shape for shape in target_shapes(config) if shape.kind == "matrix" and shape.part == "target"]
    whole = sum(shape.nbytes(types, dense_bytes) for shape in matrices)
    return sum(shape.nbytes(types, dense_bytes) * shares[shape.read] for shape in matrices) / whole


def _shares(config: TargetConfig, rows: int) -> dict[Read, float]:
    text, chosen = config.text, 1.0
    if text.enable_moe_block:
        chosen = 1 - (1 - text.top_k_experts / text.num_experts) ** rows
    return {"whole": 1.0, "rows": 0.0, "experts": chosen}


def drafter_read_bytes(config: DrafterConfig, types: WeightTypes, dense_bytes: int) -> float:
    """Returns the bytes of weights that one draft reads. Of a centroid head that is the chosen clusters' share."""
    clusters = config.centroid_intermediate_top_k / config.num_centroids if config.use_ordered_embeddings else 0.0
    total = 0.0
    for shape in drafter_shapes(config):
        share = 1.0 if shape.read == "whole" else clusters if shape.kind == "matrix" else 0.0
        total += shape.nbytes(types, dense_bytes) * share
    return total


def _layer(text: TextConfig, layer: int, part: str) -> Iterator[WeightShape]:
    D, d, H = text.hidden_size, text.layer_head_dim(layer), text.num_attention_heads
    kv_heads = 0 if text.is_kv_shared(layer) else text.layer_kv_heads(layer)
    values = 0 if text.key_is_value(layer) else kv_heads
    width = text.layer_intermediate_size(layer)
    yield WeightShape(part, "matrix", (H + kv_heads + values) * d, D)
    yield WeightShape(part, "matrix", D, H * d)
    yield _norms(text, part, 2 * d if kv_heads else d)
    yield WeightShape(part, "matrix", 2 * width, D)
    yield WeightShape(part, "matrix", D, width)
    yield _norms(text, part, 4 * D)
    if text.options.layer_scalar:
        yield _vector(part, 1)
    if text.enable_moe_block:
        E, I = text.num_experts, text.moe_intermediate_size  # noqa: E741
        yield WeightShape(part, "chooser", E, D)
        yield _vector(part, D + E)
        yield _norms(text, part, 3 * D)
        yield WeightShape(part, "matrix", 2 * I, D, E, "experts")
        yield WeightShape(part, "matrix", D, I, E, "experts")
    if P := text.hidden_size_per_layer_input:
        yield WeightShape(part, "matrix", P, D)
        yield WeightShape(part, "matrix", D, P)
        yield _norms(text, part, D)


def _norms(text: TextConfig, part: str, size: int) -> WeightShape:
    return WeightShape(part, "wide" if text.options.float32_norms else "vector", 1, size)


def _vector(part: str, size: int) -> WeightShape:
    return WeightShape(part, "vector", 1, size)
