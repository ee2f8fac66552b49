"""How quantisation is asked for, and its record in config.json."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_mtp.errors import QuantisationError
from gemma_mtp.weight_types import (
    QUANTISATIONS,
    UNIFORM,
    WeightTypes,
    merge,
    parse_quantization_config,
    parse_weight_types,
    weight_types_to_hf,
)

KINDS = st.sampled_from([None, *QUANTISATIONS])
TYPES = st.builds(WeightTypes, KINDS, KINDS, KINDS, KINDS)


@pytest.mark.parametrize(("text", "types"), [
    ("int8", WeightTypes("int8", "int8", "int8", "int8")),
    ("int4", UNIFORM["int4"]),
    ("none", WeightTypes()),
    ("target=int4", WeightTypes(target="int4")),
    ("target=int4,drafter=int8, drafter-head=int8", WeightTypes("int4", None, "int8", "int8")),
    ("int8,embeddings=none", WeightTypes("int8", None, "int8", "int8")),
    ("target=int4,int8", WeightTypes("int8", "int8", "int8", "int8")),
    ("embeddings=int8,embeddings=int4", WeightTypes(embeddings="int4")),
])  # fmt: skip
def test_spelling(text: str, types: WeightTypes) -> None:
    assert parse_weight_types(text) == types


@given(TYPES)
def test_every_choice_can_be_spelled(types: WeightTypes) -> None:
    assert parse_weight_types(",".join(f"{part}={kind or 'none'}" for part, kind in types.parts.items())) == types


@pytest.mark.parametrize(("text", "named"), [
    ("int5", ["'int5'", "none, int8, int4, q8_0", "PART=KIND"]),
    ("", ["''", "int8"]),
    ("target", ["'target'"]),
    ("head=int8", ["'head'", "target, embeddings, drafter, drafter-head"]),
    ("drafter_head=int8", ["'drafter_head'", "drafter-head"]),
    ("target=int2", ["'int2'", "int8, int4, q8_0 or none"]),
    ("target=", ["''", "int8, int4, q8_0 or none"]),
    ("int8,,target=int4", ["'int8,,target=int4'"]),
    ("INT8", ["'INT8'"]),
])  # fmt: skip
def test_bad_spelling(text: str, named: list[str]) -> None:
    with pytest.raises(QuantisationError) as caught:
        parse_weight_types(text)
    assert [part for part in named if part not in str(caught.value)] == []


@given(TYPES)
def test_the_record_in_config_json_is_read_back(types: WeightTypes) -> None:
    raw = weight_types_to_hf(types)
    assert raw["quant_method"] == "gemma-mtp"
    assert parse_quantization_config(raw) == types


def test_the_record_says_bits_and_group() -> None:
    raw = weight_types_to_hf(WeightTypes(target="int4", drafter_head="int8"))
    assert raw["parts"] == {
        "target": {"bits": 4, "group_size": 32}, "drafter-head": {"bits": 8, "group_size": 64},
    }  # fmt: skip


@pytest.mark.parametrize(("raw", "named"), [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'", "unquantised checkpoint"]),
    ({"quant_method": "compressed-tensors"}, ["'compressed-tensors'"]),
    ("int8", ["'int8'"]),
    ([], ["[]"]),
    ({"quant_method": "gemma-mtp"}, ["parts None"]),
    ({"quant_method": "gemma-mtp", "parts": {"vision": {"bits": 8, "group_size": 64}}}, ["vision"]),
    ({"quant_method": "gemma-mtp", "parts": {"target": {"bits": 4, "group_size": 128}}}, ["128", "(4, 32)"]),
    ({"quant_method": "gemma-mtp", "parts": {"target": {"bits": [4], "group_size": 32}}}, ["[4]"]),
    ({"quant_method": "gemma-mtp", "parts": {"target": None}}, ["None"]),
    ({"quant_method": "gemma-mtp", "parts": []}, ["parts []"]),
])  # fmt: skip
def test_a_record_that_can_not_be_read(raw: Any, named: list[str]) -> None:
    with pytest.raises(QuantisationError) as caught:
        parse_quantization_config(raw)
    assert [part for part in named if part not in str(caught.value)] == []


def test_without_a_record_nothing_is_quantised() -> None:
    assert not parse_quantization_config(None)
    assert not parse_quantization_config({})
    assert not parse_quantization_config({"quant_method": None, "bits": 4})  # beside plain tensors, as Google has it


@given(TYPES, TYPES)
def test_what_is_stored_quantised_stays_so(stored: WeightTypes, asked: WeightTypes) -> None:
    clash = [p for p, kind in stored.quantised.items() if asked.parts[p] not in (None, kind)]
    if clash:
        with pytest.raises(QuantisationError, match=f"part {clash[0]} is already {stored.parts[clash[0]]}"):
            merge(stored, asked)
    else:
        assert merge(stored, asked).parts == {p: kind or asked.parts[p] for p, kind in stored.parts.items()}
