"""Every field of a config.json in turn set to what it should not be: a typed error, or the reference's tokens.

What a changed file still describes is built with weights that fit it, so that no difference of shapes hides what
decoding makes of it.
"""

import array
import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_seeds import GEMMA3
from models import TINY, VOCAB, F, S, agreeing_pair, backends, letters, random_drafter, random_target, save_pair

from gemma_mtp import SamplingParams
from gemma_mtp.checkpoint.read import empty_model
from gemma_mtp.checkpoint.tensor_files import load_tensors, save_tensors
from gemma_mtp.cli import main
from gemma_mtp.config import (
    DrafterConfig,
    TargetConfig,
    config_to_hf,
    parse_drafter_config,
    parse_target_config,
)
from gemma_mtp.config.generation import HONOURED, GenerationDefaults, parse_generation_config
from gemma_mtp.config.pairing import pair_verdict
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.engine.pair import Pair
from gemma_mtp.errors import CheckpointError, ConfigError
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.target import Target
from gemma_mtp.training.shapes import initialise
from gemma_mtp.weight_types import WeightTypes

Raw = dict[str, Any]
GREEDY = SamplingParams(max_tokens=2, ignore_eos=True)
#: models of more numbers are not built, and fewer positions do not hold what is decoded
MOST_NUMBERS, POSITIONS = 100_000, 64
SMALL = dataclasses.replace(TINY, num_hidden_layers=4, layer_types=(S, F, S, F))
EXPERTS = dataclasses.replace(
    SMALL, num_hidden_layers=2, layer_types=(S, F), hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    use_double_wide_mlp=False, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
)  # fmt: skip
DRAFTED = random_drafter(SMALL, centroids=True).config
RAW: dict[str, Raw] = {
    "per-layer inputs": config_to_hf(TargetConfig(SMALL)),
    "experts": config_to_hf(TargetConfig(EXPERTS, "gemma4")),
    "Gemma 3": config_to_hf(TargetConfig(GEMMA3, "gemma3_text")),
    "drafter": config_to_hf(DRAFTED),
}


def others(value: Any) -> list[Any]:
    """Values of other sizes and kinds than the one that is there."""
    found: list[Any] = [
        0, -1, 1, 2**31 - 1, 2**40, 10**400, 1.5, -1.5, 1e-300, 1e300, float("nan"), float("inf"), True, False, "2", "",
        None, [], [1] * 100, {},
    ]  # fmt: skip
    if type(value) is int:
        found += [value - 1, value + 1, value * 2, float(value)]
    if type(value) is float:
        found += [-value, value * 1e6, value * 1e-6]
    if isinstance(value, list):
        found += [value[:-1], value + value[-1:], value[::-1], value[-1:] * len(value), [None] * len(value)]
    return found


def places(raw: Raw, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in raw.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def changed(raw: Raw) -> Iterator[tuple[str, Raw]]:
    """A text on every change, and the content with it."""
    for path in places(raw):
        for value in others(_holder(raw, path)[path[-1]]):
            made = copy.deepcopy(raw)
            _holder(made, path)[path[-1]] = value
            yield f"{'.'.join(path)} = {str(value)[:60]}", made


def _holder(raw: Raw, path: tuple[str, ...]) -> Raw:
    for name in path[:-1]:
        raw = raw[name]
    return raw


def pair_of(config: TargetConfig | DrafterConfig) -> tuple[Target, Drafter | None] | None:
    """Models of a configuration, with one that fits at the other side; None where they are too large or fit none."""
    weights = empty_model(config, WeightTypes()).checkpoint_tensors().values()
    if sum(weight.numel() for weight in weights) > MOST_NUMBERS:
        return None
    if isinstance(config, TargetConfig):
        return random_target(config=config.text), None
    if pair_verdict(TargetConfig(SMALL), config) is not None:
        return None
    drafter = Drafter(config).requires_grad_(False)
    initialise(drafter, 1)
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.token_ordering.copy_(torch.randperm(config.text.vocab_size))
    return random_target(config=SMALL), drafter


def fault(target: Target, drafter: Drafter | None) -> str | None:
    """What is wrong with what the backends decode, from the last token of the vocabulary on, past a small window."""
    prompt = [max(0, target.config.vocab_size - 1 - i) for i in range(10)]

    @functools.cache  # of backends that decode the same
    def logits_of(made: tuple[int, ...]) -> torch.Tensor:
        rows = target.forward_sequence(torch.tensor([[*prompt, *made[:-1]]])).hidden_BTD[0, len(prompt) - 1 :]
        return target.logits(rows)

    for name, backend in backends(target, drafter).items():
        pair = Pair(backend, None, GenerationDefaults(()))
        made = pair.generate(prompt, GREEDY, draft_tokens=0 if drafter is None else 2).token_ids
        logits = logits_of(tuple(made))
        if not logits.isfinite().all():
            return "logits are not finite"
        if logits.argmax(-1).tolist() != made:
            return f"{name} decodes {made}, but {logits.argmax(-1).tolist()} was expected"
    return None


def decoded(config: TargetConfig | DrafterConfig) -> object:
    """What of a configuration decoding depends on."""
    text = dataclasses.replace(
        config.text, pad_token_id=None, bos_token_id=None, eos_token_ids=(), max_position_embeddings=POSITIONS
    )
    return dataclasses.replace(config, text=text)


@pytest.mark.parametrize("kind", RAW)
def test_any_field_is_refused_or_decodes_as_the_reference(kind: str) -> None:
    parse = parse_drafter_config if kind == "drafter" else parse_target_config
    known, wrong, refused, played = {decoded(parse(RAW[kind]))}, {}, 0, 0
    for change, raw in changed(RAW[kind]):
        try:
            config = parse(raw)
            if decoded(config) in known or config.text.max_position_embeddings < POSITIONS:
                continue
            known.add(decoded(config))
            models = pair_of(config)
            played += models is not None
            found = None if models is None else fault(*models)
        except ConfigError as error:
            refused, message = refused + 1, str(error)
            found = None if message.endswith(".") and len(message) < 400 and "\n" not in message else message
        except Exception as error:
            found = repr(error)
        if found is not None:
            wrong[change] = found
    assert wrong == {}
    assert refused > 400
    assert played > 20


# -- through the commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with a tokenizer and data, whose target has one row too few for the tokens' per-layer embeddings."""
    root = tmp_path_factory.mktemp("fields")
    save_pair(root, *agreeing_pair())
    letters(root / "target")
    (root / "data.jsonl").write_text(json.dumps({"text": "ABCDEFGH" * 20}) + "\n")
    path = root / "target" / "model.safetensors"
    tensors, _ = load_tensors(path)
    name = "model.embed_tokens_per_layer.weight"
    save_tensors(path, {**tensors, name: tensors[name][:-1].contiguous()}, {"format": "pt"})
    config = root / "target" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size_per_layer_input": VOCAB - 1}))
    return root


@pytest.mark.parametrize("command", [
    ["generate", "--token-ids", str(VOCAB - 1)], ["train", "--data", "data.jsonl", "--out", "out", "--new"],
])  # fmt: skip
def test_too_few_per_layer_embeddings_are_refused(
    command: list[str], files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    assert main([*command, "--target", "target"]) == 2
    shown = capsys.readouterr().err
    assert f"vocab_size_per_layer_input = {VOCAB - 1}" in shown
    assert f"vocab_size = {VOCAB}" in shown


def test_more_per_layer_embeddings_than_tokens_decode() -> None:
    more = dataclasses.replace(SMALL, vocab_size_per_layer_input=VOCAB + 3)
    assert fault(random_target(config=parse_target_config(config_to_hf(TargetConfig(more))).text), None) is None


# -- generation_config.json


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_any_field_of_a_generation_config_is_refused_or_usable(name: str) -> None:
    """What GGUF keeps in 32 bits has room there."""
    for value in [*others(1), *([one] for one in others(1))]:
        with contextlib.suppress(CheckpointError):
            found = parse_generation_config({name: value}, (1,))
            array.array("i", [*found.eos_token_ids, *found.suppress_tokens, found.top_k or 0])
            array.array("f", [found.temperature or 0, found.top_p or 0, found.min_p or 0])


def test_ends_that_no_token_has_are_no_ends_of_a_grammar(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    tokenizer = letters(tmp_path)
    state = GrammarCompiler(tokenizer, VOCAB).start(Grammar("regex", "A"), [-4, -300, VOCAB, 5, 2**31 - 1], "cpu")
    (letter,) = state.allowed([])[0].nonzero().flatten().tolist()
    assert tokenizer.decode([letter]) == "A"
    assert state.allowed([letter])[1].nonzero().flatten().tolist() == [5]
