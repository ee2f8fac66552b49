"""Gemma 3's text model as a table: what another family of the skeleton needs, for tests. Users have no such family."""

from typing import Any

from oracle import F, S

from gemma_mtp.config import LayerOptions
from gemma_mtp.errors import ConfigError
from gemma_mtp.families.base import Family


def options(raw: Any) -> LayerOptions:
    return LayerOptions(value_norm=False, score_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5, layer_scalar=False)


def translated(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of transformers 5 and of the hub's older files as the skeleton's."""
    text = {
        name: value for name, value in raw.items() if name not in ("query_pre_attn_scalar", "_sliding_window_pattern")
    }
    if text.pop("attn_logit_softcapping", None) is not None:
        raise ConfigError("config.json has attn_logit_softcapping, which Gemma 3 does not use.")
    pattern = text.pop("sliding_window_pattern", 6)
    theta, local, scaling = (
        text.pop("rope_theta", 1e6),
        text.pop("rope_local_base_freq", 1e4),
        text.pop("rope_scaling", {}),
    )
    if text.get("rope_parameters") is None:
        text["rope_parameters"] = {
            S: {"rope_type": "default", "rope_theta": local},
            F: {"rope_type": "default", "rope_theta": theta, **scaling},
        }
    if text.get("layer_types") is None:
        text["layer_types"] = [S if (i + 1) % pattern else F for i in range(text["num_hidden_layers"])]
    return text


GEMMA3 = Family(
    name="Gemma 3",
    targets={"gemma3_text": None, "gemma3": "text_config"},
    text_model_type="gemma3_text",
    defaults=lambda model_type: {
        "head_dim": 256, "hidden_size_per_layer_input": 0, "max_position_embeddings": 131072,
    },
    translated=translated,
    options=options,
    ends_full=False,
    norm_offset=1.0,
)  # fmt: skip
