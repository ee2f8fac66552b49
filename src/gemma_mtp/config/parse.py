"""Model configurations, read from and written to Hugging Face `config.json` dictionaries.

Field names are Hugging Face's, so that a reader of either finds the other. `TextConfig` describes a stack of Gemma 4
decoder layers: the target's own, and the one inside a drafter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemma_mtp.config.rope import DEFAULT_ROPES, RopeConfig, parse_ropes, rope_to_hf
from gemma_mtp.config.values import field_value
from gemma_mtp.errors import ConfigError

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

#: top-level model_type -> key of the text config inside it (None: the file is the text config)
TARGET_MODEL_TYPES: dict[str, str | None] = {
    "gemma4": "text_config",
    "gemma4_unified": "text_config",
    "gemma4_text": None,
    "gemma4_unified_text": None,
}
DRAFTER_MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True)
class LayerOptions:
    """What families of this skeleton do differently in a decoder layer. The defaults are Gemma 4's.

    `value_norm`: values are normalised. `score_scale`: attention scores are multiplied by it. `layer_scalar`: a stored
    number multiplies the layer's output.
    """

    value_norm: bool = True
    score_scale: float = 1.0
    layer_scalar: bool = True


@dataclass(frozen=True)
class TextConfig:
    """A stack of Gemma 4 decoder layers. All sizes are counts of elements.

    `global_head_dim` and `num_global_key_value_heads` are those of full-attention layers, resolved on load.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    attention_k_eq_v: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    enable_moe_block: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    sliding_rope: RopeConfig = DEFAULT_ROPES[SLIDING]
    full_rope: RopeConfig = DEFAULT_ROPES[FULL]
    options: LayerOptions = LayerOptions()
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    model_type: str = "gemma4_text"

    def __post_init__(self) -> None:
        _check_text_config(self)

    @property
    def first_kv_shared_layer(self) -> int:
        """Index of the first layer that has no keys and values of its own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def is_kv_shared(self, layer: int) -> bool:
        return layer >= self.first_kv_shared_layer

    def layer_head_dim(self, layer: int) -> int:
        return self.head_dim if self.is_sliding(layer) else self.global_head_dim

    def layer_kv_heads(self, layer: int) -> int:
        return self.num_key_value_heads if self.is_sliding(layer) else self.num_global_key_value_heads

    def layer_intermediate_size(self, layer: int) -> int:
        """Width of a layer's MLP: doubled on KV-shared layers of models that say so (E2B)."""
        doubled = self.use_double_wide_mlp and self.first_kv_shared_layer > 0 and self.is_kv_shared(layer)
        return self.intermediate_size * (2 if doubled else 1)

    def key_is_value(self, layer: int) -> bool:
        """Whether the layer's value is its unnormalised key projection (no v_proj tensor)."""
        return self.attention_k_eq_v and not self.is_sliding(layer)

    def rope(self, layer_type: LayerType) -> RopeConfig:
        return self.sliding_rope if layer_type == SLIDING else self.full_rope

    @functools.cached_property  # asked for at every call of the drafter
    def donor_layers(self) -> dict[LayerType, int]:
        """The last layer of each type with its own KV; KV-shared layers and the drafter read its cache."""
        return {kind: i for i, kind in enumerate(self.layer_types[: self.first_kv_shared_layer])}

    def kv_layer(self, layer: int) -> int:
        """Index of the layer whose cached keys and values `layer` reads."""
        return self.donor_layers[self.layer_types[layer]] if self.is_kv_shared(layer) else layer


@dataclass(frozen=True)
class TargetConfig:
    """A target checkpoint: its text stack and the Hugging Face model_type it is stored as."""

    text: TextConfig
    model_type: str = "gemma4_text"


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter checkpoint ("assistant" in Hugging Face naming)."""

    text: TextConfig
    backbone_hidden_size: int
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    model_type: str = "gemma4_assistant"

    def __post_init__(self) -> None:
        _check_drafter_config(self)


def parse_target_config(raw: dict[str, Any]) -> TargetConfig:
    """Read a target's `config.json` dictionary. Raises ConfigError naming the field that is wrong."""
    model_type = _model_type(raw)
    if model_type not in TARGET_MODEL_TYPES:
        hint = "; it is a drafter: pass it as the drafter" if model_type in DRAFTER_MODEL_TYPES else ""
        raise ConfigError(
            f"config.json has model_type {model_type!r}, which is not a Gemma 4 target"
            f" (expected one of {', '.join(TARGET_MODEL_TYPES)}){hint}."
        )
    key = TARGET_MODEL_TYPES[model_type]
    if key is not None and not isinstance(raw.get(key), dict):
        raise ConfigError(
            f"config.json of model_type {model_type!r} has no {key!r} object; restore it from the source."
        )
    return TargetConfig(text=_parse_text_config(raw if key is None else raw[key], raw), model_type=model_type)


def parse_drafter_config(raw: dict[str, Any]) -> DrafterConfig:
    """Read a drafter's `config.json` dictionary. Raises ConfigError naming the field that is wrong."""
    model_type = _model_type(raw)
    if model_type not in DRAFTER_MODEL_TYPES:
        hint = "; it is a target: pass it as the target" if model_type in TARGET_MODEL_TYPES else ""
        raise ConfigError(
            f"config.json has model_type {model_type!r}, which is not a Gemma 4 drafter"
            f" (expected one of {', '.join(DRAFTER_MODEL_TYPES)}){hint}."
        )
    if not isinstance(raw.get("text_config"), dict):
        raise ConfigError("the drafter's config.json has no 'text_config' object; restore it from the source.")
    text_raw = dict(raw["text_config"])
    # transformers writes 0 where an all-shared stack was left to the default (Gemma4AssistantConfig.__post_init__)
    text_raw["num_kv_shared_layers"] = text_raw.get("num_kv_shared_layers") or text_raw.get("num_hidden_layers")
    text_raw.setdefault("hidden_size_per_layer_input", 0)  # no drafter has any
    return DrafterConfig(
        text=_parse_text_config(text_raw, raw),
        backbone_hidden_size=field_value(raw, "backbone_hidden_size", int, 1536),
        use_ordered_embeddings=field_value(raw, "use_ordered_embeddings", bool, False),
        num_centroids=field_value(raw, "num_centroids", int, 2048),
        centroid_intermediate_top_k=field_value(raw, "centroid_intermediate_top_k", int, 32),
        model_type=model_type,
    )


def target_config_to_hf(config: TargetConfig) -> dict[str, Any]:
    """The `config.json` dictionary of a target, in the official layout. Inverse of `parse_target_config`."""
    text = _text_config_to_hf(config.text)
    if TARGET_MODEL_TYPES[config.model_type] is None:
        architecture = "Gemma4UnifiedForCausalLM" if "unified" in config.model_type else "Gemma4ForCausalLM"
        return {"architectures": [architecture], **text, "model_type": config.model_type}
    unified = config.model_type == "gemma4_unified"
    architecture = "Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "text_config": text,
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def drafter_config_to_hf(config: DrafterConfig) -> dict[str, Any]:
    """The `config.json` dictionary of a drafter, in the official layout. Inverse of `parse_drafter_config`."""
    unified = config.model_type == "gemma4_unified_assistant"
    return {
        "architectures": ["Gemma4UnifiedAssistantForCausalLM" if unified else "Gemma4AssistantForCausalLM"],
        "model_type": config.model_type,
        "backbone_hidden_size": config.backbone_hidden_size,
        "use_ordered_embeddings": config.use_ordered_embeddings,
        "num_centroids": config.num_centroids,
        "centroid_intermediate_top_k": config.centroid_intermediate_top_k,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": _text_config_to_hf(config.text),
    }


def _model_type(raw: Any) -> str:
    if not isinstance(raw, dict):
        raise ConfigError(f"config.json must hold a JSON object, but holds a {type(raw).__name__}.")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json has no 'model_type'; it should say which Gemma 4 model the checkpoint holds.")
    return model_type


def _parse_text_config(raw: dict[str, Any], outer: dict[str, Any]) -> TextConfig:
    layers = field_value(raw, "num_hidden_layers", int)
    layer_types = _parse_layer_types(raw, layers)
    head_dim = field_value(raw, "head_dim", int, 256)
    kv_heads = field_value(raw, "num_key_value_heads", int)
    k_eq_v = field_value(raw, "attention_k_eq_v", bool, False)
    # transformers >= 5.20 stores what differs in full layers in per_layer_config; the hub's files name it directly
    overrides = full_layer_overrides(raw, layer_types)
    if overrides is not None:
        global_head_dim = field_value(overrides, "head_dim", int, head_dim)
        global_kv = field_value(overrides, "num_key_value_heads", int, kv_heads)
        _check_agrees(raw, "global_head_dim", "head_dim", global_head_dim)
        if k_eq_v:  # elsewhere transformers does not look at it
            _check_agrees(raw, "num_global_key_value_heads", "num_key_value_heads", global_kv)
    else:
        global_head_dim = field_value(raw, "global_head_dim", int, 512)
        # Gemma4TextConfig applies num_global_key_value_heads only where keys are values
        global_kv = field_value(raw, "num_global_key_value_heads", int, kv_heads) if k_eq_v else kv_heads
    activation = field_value(raw, "hidden_activation", str, "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise ConfigError(f"config.json has hidden_activation {activation!r}, but Gemma 4 uses 'gelu_pytorch_tanh'.")
    if field_value(raw, "attention_bias", bool, False):
        raise ConfigError("config.json has attention_bias true, but Gemma 4 attention has no biases.")
    if raw.get("use_bidirectional_attention") == "all":
        raise ConfigError("config.json has use_bidirectional_attention 'all': such an encoder cannot decode text.")
    if outer.get("transformers_weights") is not None:
        raise ConfigError(
            f"config.json has transformers_weights = {outer['transformers_weights']!r}, but weights are read from"
            " model.safetensors or model.safetensors.index.json; rename the file, and remove the field."
        )
    model_type = field_value(raw, "model_type", str, "gemma4_text")
    unified = "unified" in model_type  # whose configuration has no per-layer embeddings, and another default context
    ple = field_value(raw, "hidden_size_per_layer_input", int, 0 if unified else 256)
    vocab = field_value(raw, "vocab_size", int)
    ropes = parse_ropes(raw, layer_types)
    eos = outer.get("eos_token_id")
    return TextConfig(
        vocab_size=vocab,
        hidden_size=field_value(raw, "hidden_size", int),
        intermediate_size=field_value(raw, "intermediate_size", int),
        num_hidden_layers=layers,
        num_attention_heads=field_value(raw, "num_attention_heads", int),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        global_head_dim=global_head_dim,
        num_global_key_value_heads=global_kv,
        layer_types=layer_types,
        sliding_window=field_value(raw, "sliding_window", int),
        num_kv_shared_layers=field_value(raw, "num_kv_shared_layers", int, 0),
        use_double_wide_mlp=field_value(raw, "use_double_wide_mlp", bool, False),
        attention_k_eq_v=k_eq_v,
        hidden_size_per_layer_input=ple,
        vocab_size_per_layer_input=field_value(raw, "vocab_size_per_layer_input", int, vocab if ple else 0),
        enable_moe_block=field_value(raw, "enable_moe_block", bool, False),
        num_experts=field_value(raw, "num_experts", int, 0),
        top_k_experts=field_value(raw, "top_k_experts", int, 0),
        moe_intermediate_size=field_value(raw, "moe_intermediate_size", int, 0),
        final_logit_softcapping=field_value(raw, "final_logit_softcapping", float, None),
        rms_norm_eps=field_value(raw, "rms_norm_eps", float, 1e-6),
        max_position_embeddings=field_value(raw, "max_position_embeddings", int, 262144 if unified else 131072),
        sliding_rope=ropes[SLIDING],
        full_rope=ropes[FULL],
        tie_word_embeddings=field_value(outer, "tie_word_embeddings", bool, True),
        pad_token_id=field_value(raw, "pad_token_id", int, None),
        bos_token_id=field_value(raw, "bos_token_id", int, None),
        eos_token_ids=_parse_eos(raw.get("eos_token_id", 1) if eos is None else eos),
        model_type=model_type,
    )


def _parse_layer_types(raw: dict[str, Any], layers: int) -> tuple[LayerType, ...]:
    given = raw.get("layer_types")
    if given is None:  # every sixth layer is full, and the last always (Gemma4TextConfig.__post_init__)
        return tuple(FULL if (i + 1) % 6 == 0 or i == layers - 1 else SLIDING for i in range(layers))
    if not isinstance(given, list) or len(given) != layers or any(kind not in LAYER_TYPES for kind in given):
        raise ConfigError(
            f"config.json has layer_types that do not fit num_hidden_layers {layers}: expected one of"
            f" {LAYER_TYPES} for each layer."
        )
    return tuple(given)


#: what per_layer_config can say of full-attention layers
PER_LAYER_FIELDS = ("head_dim", "num_key_value_heads")


def full_layer_overrides(raw: dict[str, Any], layer_types: Sequence[LayerType]) -> dict[str, Any] | None:
    """What per_layer_config says of full layers, the same for all of them; None where there is no such field.

    Raises ConfigError for anything else that it says: of sliding layers, or of other fields.
    """
    per_layer = field_value(raw, "per_layer_config", dict, None)
    if per_layer is None:
        return None
    # transformers pads the keys with zeros to the width of the highest
    named = {key.lstrip("0") or "0": entry for key, entry in per_layer.items()}
    for key, entry in named.items():
        _check_layer_entry(key, entry, raw, layer_types)
    entries = [named.get(str(i), {}) for i, kind in enumerate(layer_types) if kind == FULL]
    first: dict[str, Any] = entries[0] if entries else {}
    if any(entry != first for entry in entries):
        raise ConfigError("config.json has a per_layer_config that differs between full-attention layers.")
    return first


def _check_layer_entry(key: str, entry: Any, raw: dict[str, Any], layer_types: Sequence[LayerType]) -> None:
    where = f"config.json has per_layer_config of layer {key!r}"
    if key not in map(str, range(len(layer_types))):
        raise ConfigError(f"{where}, but the layers are 0 to {len(layer_types) - 1}.")
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} = {entry!r}, but an object was expected.")
    full = layer_types[int(key)] == FULL
    for name, value in entry.items():
        if value != raw.get(name) and not (full and name in PER_LAYER_FIELDS):
            raise ConfigError(
                f"{where} ({layer_types[int(key)]}) with {name} = {value!r}, but {name} = {raw.get(name)!r} for all;"
                f" only {' and '.join(PER_LAYER_FIELDS)} of full-attention layers can differ."
            )


def _check_agrees(raw: dict[str, Any], name: str, per_layer_name: str, value: int) -> None:
    given = field_value(raw, name, int, None)
    if given not in (None, value):
        raise ConfigError(
            f"config.json has {name} = {given}, but per_layer_config gives full-attention layers {per_layer_name} ="
            f" {value}; remove the one that is wrong."
        )


def _parse_eos(raw: Any) -> tuple[int, ...]:
    ids = [] if raw is None else raw if isinstance(raw, list) else [raw]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise ConfigError(f"config.json has eos_token_id {raw!r}, but a token id or a list of them was expected.")
    return tuple(ids)


def _text_config_to_hf(config: TextConfig) -> dict[str, Any]:
    if config.options != LayerOptions():
        raise ConfigError("a model whose layers differ from Gemma 4's (LayerOptions) can not be written as one.")
    raw = dataclasses.asdict(config)
    del raw["options"]
    raw["layer_types"] = list(config.layer_types)
    raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
    raw["rope_parameters"] = {SLIDING: rope_to_hf(config.sliding_rope), FULL: rope_to_hf(config.full_rope)}
    del raw["sliding_rope"], raw["full_rope"]
    if config.num_global_key_value_heads == config.num_key_value_heads:
        raw["num_global_key_value_heads"] = None
    elif not config.attention_k_eq_v:  # only per_layer_config can say so
        full = {"head_dim": config.global_head_dim, "num_key_value_heads": raw.pop("num_global_key_value_heads")}
        raw["per_layer_config"] = {str(i): full for i, kind in enumerate(config.layer_types) if kind == FULL}
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        raw[name] = raw[name] or None
    raw["hidden_activation"] = "gelu_pytorch_tanh"
    return raw


def _check_text_config(c: TextConfig) -> None:
    positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "global_head_dim", "num_global_key_value_heads", "sliding_window",
                "max_position_embeddings")  # fmt: skip
    for name in positive:
        if getattr(c, name) < 1:
            raise ConfigError(f"config.json has {name} = {getattr(c, name)}, but a positive number was expected.")
    if c.hidden_size_per_layer_input < 0:
        raise ConfigError(f"config.json has hidden_size_per_layer_input = {c.hidden_size_per_layer_input}; expected 0"
                          " (none) or more.")  # fmt: skip
    cap = c.final_logit_softcapping
    for name, value in (("rms_norm_eps", c.rms_norm_eps), ("final_logit_softcapping", 1.0 if cap is None else cap)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"config.json has {name} = {value}, but a positive number was expected.")
    for name in ("num_key_value_heads", "num_global_key_value_heads"):
        if c.num_attention_heads % getattr(c, name):
            raise ConfigError(f"config.json has {name} = {getattr(c, name)}, which does not divide num_attention_heads"
                              f" = {c.num_attention_heads}.")  # fmt: skip
    if not 0 <= c.num_kv_shared_layers <= c.num_hidden_layers:
        raise ConfigError(f"config.json has num_kv_shared_layers = {c.num_kv_shared_layers}, but it must lie between 0"
                          f" and num_hidden_layers = {c.num_hidden_layers}.")  # fmt: skip
    if 0 < c.first_kv_shared_layer < c.num_hidden_layers:
        missing = set(c.layer_types[c.first_kv_shared_layer :]) - set(c.donor_layers)
        if missing:
            raise ConfigError(f"config.json has num_kv_shared_layers = {c.num_kv_shared_layers}, which leaves no"
                              f" {missing.pop()} layer with keys and values for the others to read.")  # fmt: skip
    if c.enable_moe_block and not (0 < c.top_k_experts <= c.num_experts and c.moe_intermediate_size > 0):
        raise ConfigError("config.json has enable_moe_block true without usable num_experts, top_k_experts and"
                          " moe_intermediate_size.")  # fmt: skip
    if c.layer_types[-1] != FULL:  # transformers makes a full layer of it, whatever its weights are
        raise ConfigError(f"config.json has layer_types that end in {c.layer_types[-1]!r}, but the last layer of"
                          f" Gemma 4 is {FULL!r}.")  # fmt: skip


def _check_drafter_config(c: DrafterConfig) -> None:
    if c.text.first_kv_shared_layer != 0:
        raise ConfigError("the drafter's layers must all be KV-shared: num_kv_shared_layers must equal"
                          f" num_hidden_layers = {c.text.num_hidden_layers}.")  # fmt: skip
    if c.text.hidden_size_per_layer_input or c.text.enable_moe_block or c.text.use_double_wide_mlp:
        raise ConfigError("the drafter's config.json must have hidden_size_per_layer_input 0, and enable_moe_block and"
                          " use_double_wide_mlp false.")  # fmt: skip
    if c.backbone_hidden_size < 1:
        raise ConfigError(
            f"config.json has backbone_hidden_size = {c.backbone_hidden_size}; expected a positive number."
        )
    if c.use_ordered_embeddings:
        if c.num_centroids < 1 or c.text.vocab_size % c.num_centroids:
            raise ConfigError(f"config.json has num_centroids = {c.num_centroids}, which does not divide vocab_size ="
                              f" {c.text.vocab_size}.")  # fmt: skip
        if not 1 <= c.centroid_intermediate_top_k <= c.num_centroids:
            raise ConfigError(f"config.json has centroid_intermediate_top_k = {c.centroid_intermediate_top_k}; expected"
                              f" 1 to num_centroids = {c.num_centroids}.")  # fmt: skip


def _layer_pattern(sliding: int, repeats: int) -> tuple[LayerType, ...]:
    return ((SLIDING,) * sliding + (FULL,)) * repeats


def _official_target(hidden: int, intermediate: int, pattern: tuple[int, int], heads: int, kv: tuple[int, int],
                     window: int, context: int, **rest: Any) -> TextConfig:  # fmt: skip
    types = _layer_pattern(*pattern)
    return TextConfig(
        vocab_size=262144, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=len(types),
        num_attention_heads=heads, num_key_value_heads=kv[0], num_global_key_value_heads=kv[1], head_dim=256,
        global_head_dim=512, layer_types=types, sliding_window=window, final_logit_softcapping=30.0,
        max_position_embeddings=context, eos_token_ids=(1, 106, 50), **rest,
    )  # fmt: skip


def _official_drafter(target: TextConfig, hidden: int, heads: int, ordered: bool, model_type: str) -> DrafterConfig:
    types = _layer_pattern(3, 1)
    text = TextConfig(
        vocab_size=target.vocab_size, hidden_size=hidden, intermediate_size=8 * hidden, num_hidden_layers=len(types),
        num_attention_heads=heads, num_key_value_heads=target.num_key_value_heads,
        num_global_key_value_heads=target.num_global_key_value_heads, head_dim=target.head_dim,
        global_head_dim=target.global_head_dim, layer_types=types, sliding_window=target.sliding_window,
        num_kv_shared_layers=len(types), attention_k_eq_v=target.attention_k_eq_v,
        max_position_embeddings=target.max_position_embeddings, eos_token_ids=target.eos_token_ids,
        model_type="gemma4_unified_text" if "unified" in model_type else "gemma4_text",
    )  # fmt: skip
    return DrafterConfig(text, target.hidden_size, use_ordered_embeddings=ordered, model_type=model_type)


_PLE = {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144}
_MOE = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
_E2B = _official_target(1536, 6144, (4, 7), 8, (1, 1), 512, 131072, num_kv_shared_layers=20, use_double_wide_mlp=True,
                        **_PLE)  # fmt: skip
_E4B = _official_target(2560, 10240, (5, 7), 8, (2, 2), 512, 131072, num_kv_shared_layers=18, **_PLE)
_12B = _official_target(3840, 15360, (5, 8), 16, (8, 1), 1024, 262144, attention_k_eq_v=True,
                        model_type="gemma4_unified_text")  # fmt: skip
_26B = _official_target(2816, 2112, (5, 5), 16, (8, 2), 1024, 262144, attention_k_eq_v=True, **_MOE)
_31B = _official_target(5376, 21504, (5, 10), 32, (16, 4), 1024, 262144, attention_k_eq_v=True)

#: The ten official checkpoints' geometries (five targets, five drafters), by the name used on the hub.
PRESETS: dict[str, TargetConfig | DrafterConfig] = {
    "gemma-4-E2B-it": TargetConfig(_E2B, "gemma4"),
    "gemma-4-E4B-it": TargetConfig(_E4B, "gemma4"),
    "gemma-4-12B-it": TargetConfig(_12B, "gemma4_unified"),
    "gemma-4-26B-A4B-it": TargetConfig(_26B, "gemma4"),
    "gemma-4-31B-it": TargetConfig(_31B, "gemma4"),
    "gemma-4-E2B-it-assistant": _official_drafter(_E2B, 256, 4, True, "gemma4_assistant"),
    "gemma-4-E4B-it-assistant": _official_drafter(_E4B, 256, 4, True, "gemma4_assistant"),
    "gemma-4-12B-it-assistant": _official_drafter(_12B, 1024, 16, False, "gemma4_unified_assistant"),
    "gemma-4-26B-A4B-it-assistant": _official_drafter(_26B, 1024, 16, False, "gemma4_assistant"),
    "gemma-4-31B-it-assistant": _official_drafter(_31B, 1024, 32, False, "gemma4_assistant"),
}
