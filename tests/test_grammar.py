"""Constrained output: always of its grammar, the same with and without drafts, and no draft that breaks it."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, agreeing_pair, backends, opened, random_drafter, random_target
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from gemma_mtp.cli import main
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.grammar_compiler import GrammarCompiler
from gemma_mtp.decoding.grammar_state import GrammarState
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.sampling import process
from gemma_mtp.decoding.verify import VERIFICATIONS, Verification
from gemma_mtp.engine import draft as draft_module
from gemma_mtp.engine import round as round_module
from gemma_mtp.engine.draft import propose
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.round import verify_round
from gemma_mtp.engine.sequence import Turn
from gemma_mtp.errors import GemmaMtpError, SamplingError, TokenizerError
from gemma_mtp.tokenizer import Tokenizer

EOS = 1
PROMPT = [9, 8, 7]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "import"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PERSON_SCHEMA = Grammar("json_schema", json.dumps(PERSON))
NUMBER = Grammar("json_schema", '{"type": "integer", "minimum": -40, "maximum": 2000}')
WORDS = Grammar("regex", r"([a-m]{2,5} ){2,6}end")
DIGITS = Grammar("regex", r"[0-9]{3}-[0-9]{4}")
OPEN = Grammar("regex", r"[a-z]{4,}")
GRAMMARS = {"person": PERSON_SCHEMA, "object": Grammar("json_object"), "number": NUMBER, "words": WORDS, "open": OPEN}


def matches(grammar: Grammar, text: str | None) -> bool:
    assert text is not None
    if grammar.kind == "regex":
        return re.fullmatch(grammar.source, text) is not None
    schema = json.loads(grammar.source) if grammar.source else {"type": "object"}
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_the_check_sees_text_that_is_not_of_the_grammar() -> None:
    assert matches(DIGITS, "123-4567") and not matches(DIGITS, "123-456")
    assert matches(PERSON_SCHEMA, '{"name": "x", "age": 3, "tags": []}')
    assert not matches(PERSON_SCHEMA, '{"name": "x", "age": 300, "tags": []}')
    assert not matches(PERSON_SCHEMA, '{"name": "x", "age": 30, "tags": [')


SCHEMAS = {
    "anything": {}, "object": {"type": "object"}, "person": PERSON,
    "numbers": {"type": "array", "items": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 10}, "minItems": 2,
                "maxItems": 4},
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 7, "minimum": 0}, "maxItems": 3},
    "patterns": {"type": "object", "patternProperties": {"^a[0-9]$": {"type": "boolean"}},
                 "additionalProperties": False, "maxProperties": 3},
    "tree": {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "value": {"type": ["string", "null"], "maxLength": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}, "required": ["value", "next"],
        "additionalProperties": False}}},
    "tuple": {"type": "array", "prefixItems": [{"const": "é\n"}, {"enum": [1, None, {"a": []}]}], "items": False,
              "minItems": 2},
    "text": {"type": "string", "pattern": "^[A-Z][a-z]+( [0-9]{2})?$", "minLength": 4, "maxLength": 9},
    "all": {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                      {"properties": {"b": {"type": "string", "maxLength": 2}}, "required": ["b"]}], "type": "object",
            "maxProperties": 2},
    "no blanks": {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
                  "required": ["a"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}},
}  # fmt: skip
EXPRESSIONS = [
    "abc|abd|x", "^[a-f]{3}$", r"\d{2,4}/\w+", "(?i)hello", r"[^\n]{1,5}\n.", "é{1,3}|日本語?",
    r"a\.b\*\\", r"(\s*\w){4}",
    "(ab?|c){3,5}", r"[\x00-\x7f]{5}", "\"[^\"]*\"", r"\p{Lu}\p{Ll}{2}",
]  # fmt: skip


def random_text(compiler: GrammarCompiler, grammar: Grammar, seed: int) -> str | None:
    """Text of tokens drawn evenly from what is allowed, ended as soon as it may be; None where it grows long."""
    state, generator = compiler.start(grammar, (EOS,), "cpu"), torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    for _ in range(200):
        allowed = state.allowed([])[0]
        if allowed[EOS]:
            return compiler._tokenizer.decode_bytes(tokens).decode()  # UTF-8, and no special token
        tokens.append(int(torch.multinomial(allowed.float(), 1, generator=generator)))
        assert state.commit(tokens[-1:]) is None
    return None


def random_texts(compiler: GrammarCompiler, grammar: Grammar) -> list[str]:
    """A dozen, or those of 25 seeds where many grow long."""
    found = (text for seed in range(25) if (text := random_text(compiler, grammar, seed)) is not None)
    return list(itertools.islice(found, 12))


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_tokens_make_json_of_the_schema(compiler: GrammarCompiler, name: str) -> None:
    grammar = Grammar("json_schema", json.dumps(SCHEMAS[name]))
    texts = random_texts(compiler, grammar)
    assert len(texts) >= 2
    for text in texts:
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(text))
        assert re.search(r"[\n ]{35}", text) is None
        assert name != "no blanks" or re.fullmatch(r'\{"a":[0-9]\}', text)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_random_tokens_make_what_the_expression_matches(compiler: GrammarCompiler, expression: str) -> None:
    grammar = Grammar("regex", expression)
    # re knows no \p, and one of the expressions has upper and lower case letters by that name
    known = expression.replace(r"\p{Lu}", "[^\\W\\d_a-z]").replace(r"\p{Ll}", "[^\\W\\d_A-Z]")
    texts = random_texts(compiler, grammar)
    assert len(texts) >= 2
    assert [text for text in texts if re.fullmatch(known, text) is None] == []


def characters() -> Tokenizer:
    """One character a token, as many as the tiny models have; beside <pad> and <eos> what JSON needs."""
    text = 'Ċ{}[]":,.-+_Ġ0123456789abcdefghijklmnopqrstuvwxyzEABCDIMNT'
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *text, "\\"])}
    assert len(vocab) <= VOCAB
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<pad>", "<eos>"])
    return Tokenizer(raw, {})


def tiny_pair(eos: tuple[int, ...] = (EOS,), seed: int = 3, centroids: bool = False, fast: bool = True) -> Pair:
    target, drafter = agreeing_pair(seed)
    if centroids:
        target, drafter = random_target(seed), random_drafter(seed=seed + 1, centroids=True)
    backend = list(backends(target, drafter).values())[-1 if fast else 0]
    return Pair(backend, characters(), GenerationDefaults(eos_token_ids=eos))


TINY = {
    "agreeing": tiny_pair(),
    "agreeing, by PyTorch": tiny_pair(fast=False),
    "centroids": tiny_pair(centroids=True),
    "two ends": tiny_pair(eos=(EOS, 0)),
    "no end": tiny_pair(eos=()),
}


@pytest.fixture(scope="module")
def compiler(pair: Pair) -> GrammarCompiler:
    return pair._grammars


@given(
    st.sampled_from(sorted(TINY)),
    st.sampled_from(sorted(GRAMMARS)),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_k=st.sampled_from([0, 0, 3]),
        top_p=st.sampled_from([1.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
        logit_bias=st.sampled_from([{}, {}, {5: 3.0, 20: float("-inf")}, dict.fromkeys(range(VOCAB), float("-inf"))]),
        ignore_eos=st.sampled_from([False, False, True]),
        seed=st.integers(0, 2**63 - 1),
        max_tokens=st.sampled_from([1, 12, 40]),
    ),
    st.integers(1, 7),
)
@settings(max_examples=40)
def test_drafted_equals_plain_and_is_of_the_grammar(name: str, of: str, params: SamplingParams, drafts: int) -> None:
    pair, params = TINY[name], dataclasses.replace(params, grammar=GRAMMARS[of])
    plain = pair.generate(PROMPT, params, draft_tokens=0)
    drafted = pair.generate(PROMPT, params, draft_tokens=drafts)
    assert drafted.token_ids == plain.token_ids
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
    if plain.finish_reason == "stop":
        assert matches(GRAMMARS[of], plain.text)
    else:
        assert len(plain.token_ids) == params.max_tokens


def test_the_cases_above_end_by_themselves_too() -> None:
    """So that the check of finished text is not empty."""
    for name, pair in TINY.items():
        for of in ("number", "words"):
            params = SamplingParams(temperature=1.0, max_tokens=60, grammar=GRAMMARS[of])
            result = pair.generate(PROMPT, params, draft_tokens=4)
            assert result.finish_reason == "stop", (name, of)
            assert (result.token_ids[-1] in pair.eos_token_ids) == bool(pair.eos_token_ids)


@pytest.mark.parametrize("grammar", [PERSON_SCHEMA, WORDS, DIGITS], ids=["schema", "words", "digits"])
@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.8, 1)])
def test_the_bundled_pair_writes_it(pair: Pair, grammar: Grammar, temperature: float, seed: int) -> None:
    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=90, grammar=grammar)
    plain, *drafted = (pair.generate("config = ", params, draft_tokens=k) for k in (0, 2, 6))
    assert plain.finish_reason == "stop" and matches(grammar, plain.text)
    assert [result.token_ids for result in drafted] == [plain.token_ids] * 2
    assert sum(result.accepted for result in drafted) > 0


def test_a_state_that_does_not_move_on_is_seen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the first token's mask in every row, the output is not of the grammar."""
    monkeypatch.setattr(GrammarState, "commit", lambda state, token_ids: None)
    result = pair.generate("config = ", SamplingParams(max_tokens=9, grammar=DIGITS), draft_tokens=0)
    assert not matches(DIGITS, result.text)


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("grammar", [PERSON_SCHEMA, WORDS], ids=["schema", "words"])
def test_every_verification_keeps_the_grammar(pair: Pair, grammar: Grammar, verification: Verification) -> None:
    for seed in range(2):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=400, grammar=grammar)
        result = pair.generate("config = ", params, draft_tokens=4, verification=verification)
        assert result.finish_reason == "stop" and matches(grammar, result.text)


def test_rejection_keeps_the_masked_distribution() -> None:
    """Frequencies of the second token against plain decoding's exact chances; the test can tell from even chances."""
    scipy_stats = pytest.importorskip("scipy.stats")
    pair, grammar = TINY["agreeing"], Grammar("regex", "[ab][c-e][ab]{3}")
    params = SamplingParams(temperature=1.0, max_tokens=3, grammar=grammar)
    logits = []

    def spy(rows: Tensor, *arguments: Any, **named: Any) -> Any:
        logits.append(rows)
        return process(rows, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_module, "process", spy)
        first = pair.generate(PROMPT, dataclasses.replace(params, max_tokens=2), draft_tokens=0).token_ids[0]
    assert pair.tokenizer is not None
    ids = [pair.tokenizer.raw.token_to_id(letter) for letter in "cde"]
    chances = logits[1][0, ids].softmax(-1)
    counts, biased = dict.fromkeys(ids, 0), {first: 100.0}
    for seed in range(150):
        seeded = dataclasses.replace(params, seed=seed, logit_bias=biased)
        counts[pair.generate(PROMPT, seeded, draft_tokens=1, verification="rejection").token_ids[1]] += 1
    expected = chances * sum(counts.values())
    assert scipy_stats.chisquare(list(counts.values()), expected.tolist(), sum_check=False).pvalue > 1e-3
    uniform = [sum(counts.values()) / 3] * 3
    assert scipy_stats.chisquare(list(counts.values()), uniform).pvalue < 1e-3


@pytest.mark.parametrize("of", ["person", "words"])
@pytest.mark.parametrize("name", ["agreeing", "agreeing, by PyTorch", "centroids", "no end"])
@torch.inference_mode()
def test_drafts_are_of_the_grammar_and_rejected_ones_leave_no_trace(name: str, of: str) -> None:
    pair, params = TINY[name], SamplingParams(temperature=1.0, max_tokens=40, grammar=GRAMMARS[of])
    state = pair.grammar_state(params)
    assert state is not None
    sequence, tokens = opened(pair.backend, PROMPT, params, grammar=state)
    drafted = rejected = 0
    while len(tokens) < params.max_tokens - 6 and not state.ended_after([]):
        turns = [Turn(sequence, 5)]
        (drafts,) = propose(pair.backend, turns)
        fresh = pair.grammar_state(params)
        assert fresh is not None
        fresh.commit(tokens)
        for draft in drafts.token_ids:
            assert fresh.allowed([])[0, draft] and not fresh.ended_after([])
            fresh.commit([draft])
        (output,) = verify_round(pair.backend, turns, [drafts])
        tokens += output.token_ids[: output.complete_after]
        drafted, rejected = drafted + output.drafted, rejected + output.drafted - output.accepted
        fresh = pair.grammar_state(params)
        assert fresh is not None
        fresh.commit(tokens)
        assert state.allowed([]).equal(fresh.allowed([]))
    assert drafted > 10 and rejected > 5


@given(st.data())
@settings(max_examples=40)
def test_a_state_is_a_function_of_the_tokens_alone(data: st.DataObject) -> None:
    """A walk with drafts that are taken, refused or of no grammar gives the masks of a fresh state at every row."""
    grammar = GRAMMARS[data.draw(st.sampled_from(sorted(GRAMMARS)))]
    compiler, choices = TINY["agreeing"]._grammars, st.integers(0, 2**30)

    def walk(state: GrammarState, count: int) -> list[int]:
        tokens: list[int] = []
        for _ in range(count):
            if state.ended_after(tokens):
                break
            allowed = state.allowed(tokens, first=len(tokens))[0].nonzero().flatten().tolist()
            tokens.append(allowed[data.draw(choices) % len(allowed)])
        return tokens

    committed: list[int] = []
    state = compiler.start(grammar, (EOS,), "cpu")
    for _ in range(6):
        drafts = walk(state, data.draw(st.integers(0, 4)))
        if data.draw(st.booleans()):
            drafts.insert(data.draw(st.integers(0, len(drafts))), data.draw(st.integers(0, VOCAB - 1)))
        rows = state.allowed(drafts)
        fresh = compiler.start(grammar, (EOS,), "cpu")
        fresh.commit(committed)
        assert fresh.allowed([]).equal(rows[:1])
        for i in range(len(drafts)):
            if fresh.ended_after(drafts[: i + 1]):
                assert rows[i + 1 :].all()
                break
            other = compiler.start(grammar, (EOS,), "cpu")
            other.commit([*committed, *drafts[: i + 1]])
            assert other.allowed([]).equal(rows[i + 1 : i + 2])
        good = next((i for i in range(len(drafts)) if state.ended_after(drafts[: i + 1])), len(drafts))
        kept = drafts[: data.draw(st.integers(0, good))]
        state.commit(kept)
        committed += kept


def test_a_state_that_is_not_rolled_back_is_seen() -> None:
    """Negative control of the test above."""
    compiler = TINY["agreeing"]._grammars
    state, fresh = compiler.start(DIGITS, (EOS,), "cpu"), compiler.start(DIGITS, (EOS,), "cpu")
    digits = [compiler._tokenizer.tokenize_str(digit)[0] for digit in "12345"]
    state.allowed(digits[:2])
    state._cursor = NoRollback(state._cursor)
    state.commit(digits[2:3])
    fresh.commit(digits[2:3])
    assert not state.allowed([]).equal(fresh.allowed([]))


def test_a_draft_into_what_is_too_complex_is_no_error() -> None:
    """It changes nothing unless it is accepted and a token has to be chosen after it."""
    names = {f"property{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i % 50 + 1}}}$"} for i in range(800)}
    grammar = Grammar(
        "json_schema", json.dumps({"anyOf": [{"type": "integer"}, {"type": "object", "properties": names}]})
    )
    compiler = TINY["agreeing"]._grammars
    brace, seven = (compiler._tokenizer.tokenize_str(text)[0] for text in "{7")
    state, fresh = compiler.start(grammar, (EOS,), "cpu"), compiler.start(grammar, (EOS,), "cpu")
    assert state.ended_after([brace]) and not state.ended_after([])
    assert state.allowed([brace, seven])[1:].all()
    state.commit([seven])
    fresh.commit([seven])
    assert state.allowed([seven]).equal(fresh.allowed([seven]))
    for tokens in ([brace], [brace, seven]):
        state = compiler.start(grammar, (EOS,), "cpu")
        with pytest.raises(SamplingError, match="the JSON schema can not be used"):  # noqa: PT012 (either may see it)
            state.commit(tokens)
            state.allowed([])


class NoRollback:
    """A cursor that forgets to roll back."""

    def __init__(self, cursor: Any) -> None:
        self.cursor = cursor

    def __getattr__(self, name: str) -> Any:
        return (lambda count: True) if name == "back" else getattr(self.cursor, name)


def acceptance_length(pair: Pair, grammar: Grammar) -> float:
    params = SamplingParams(temperature=0.5, max_tokens=50, grammar=grammar)
    results = [pair.generate(prompt, params, draft_tokens=4) for prompt in ("config = ", "def f(x):\n    ")]
    rounds = [played for result in results for played in result.decode_rounds]
    return sum(played.committed for played in rounds) / len(rounds)


def test_masked_drafts_are_accepted_more_often(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = (PERSON_SCHEMA, WORDS)
    masked = [acceptance_length(pair, grammar) for grammar in grammars]

    def unmasked(logits: Any, params: Any, token_ids: Any = None, counts: Any = None, allowed: Any = None) -> Any:
        return process(logits, dataclasses.replace(params, grammar=None), token_ids, counts)

    monkeypatch.setattr(draft_module, "process", unmasked)
    free = [acceptance_length(pair, grammar) for grammar in grammars]
    print("acceptance length with masked drafts", masked, "without", free)
    assert all(m >= f for m, f in zip(masked, free, strict=True)) and masked != free


def test_what_ends_the_output(compiler: GrammarCompiler) -> None:
    digits = [compiler._tokenizer.tokenize_str(digit)[0] for digit in "78"]
    state = compiler.start(Grammar("regex", "[78]{1,2}"), (1, 106), "cpu")
    ends = [1, 106]
    before, open_, full, after = state.allowed([*digits, 1])
    assert not before[ends].any()
    assert open_[ends].all() and open_[digits].all()
    assert full.nonzero().flatten().tolist() == ends
    assert after.all() and state.ended_after([*digits, 1]) and not state.ended_after(digits)
    assert state.commit([*digits, 1]) is None
    without = compiler.start(Grammar("regex", "[78]{1,2}"), (), "cpu")
    assert not without.allowed(digits[:1])[:, ends].any()
    assert without.commit([*digits, 9, 9]) == 2


def test_a_bias_against_everything_allowed_yields(pair: Pair) -> None:
    tokens = pair._grammars.start(DIGITS, (), "cpu").allowed([])[0].nonzero().flatten().tolist()
    for temperature in (0.0, 1.0):
        params = SamplingParams(
            temperature=temperature, grammar=DIGITS, logit_bias=dict.fromkeys(tokens, float("-inf")), top_k=3, top_p=0.9
        )
        for verification in VERIFICATIONS:
            result = pair.generate("x = ", params, draft_tokens=3, verification=verification)
            assert matches(DIGITS, result.text)


def test_process_masks_before_everything_else() -> None:
    params = SamplingParams(temperature=1.0, top_k=2, min_p=0.01, repetition_penalty=1.0, grammar=DIGITS)
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    allowed = torch.tensor([[False, False, True, True, True]])
    kept = process(logits, params, None, None, allowed)
    assert kept.token_ids_RC is not None
    assert sorted(kept.token_ids_RC[0].tolist()) == [2, 3]  # places are counted among what is allowed
    ids = torch.tensor([[1, 4]])
    assert process(logits[:, [1, 4]], params, ids, None, allowed).logits_RC[0].isinf().tolist() == [True, False]
    assert logits[0, 0] == 5


def test_a_grammar_is_not_an_arg_max() -> None:
    assert SamplingParams().choice == "argmax" and SamplingParams(grammar=DIGITS).choice == "processed"
    assert hash(SamplingParams(grammar=DIGITS)) == hash(SamplingParams(grammar=Grammar("regex", DIGITS.source)))


def test_a_tokenizer_with_spaces_as_letters() -> None:
    """Gemma's kind: a space is "▁", and bytes stand in for what the vocabulary lacks."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", "▁", "a", "▁a", "b"])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    for vocab_size in (len(vocab) - 3, len(vocab), len(vocab) + 1, len(vocab) + 50):
        state = GrammarCompiler(Tokenizer(raw, {}), vocab_size).start(Grammar("regex", "( a|é)b"), (1,), "cpu")
        allowed = state.allowed([])[0]
        assert len(allowed) == vocab_size
        assert {vocab["▁"], vocab["▁a"], vocab["<0xC3>"]} <= set(allowed.nonzero().flatten().tolist())
        assert not allowed[[0, 1, 2, vocab["b"]]].any()
        last = state.allowed([vocab["▁a"], vocab["b"]])[-1]
        assert last.nonzero().flatten().tolist() == [1]


def deep(opening: str, closing: str, times: int) -> str:
    return opening * times + "{}" + closing * times


BAD_SCHEMAS = {
    "empty": "", "no JSON": "{", "null": "null", "number": "3", "list": "[]", "false": "false", "NaN": '{"const": NaN}',
    "unknown type": '{"type": "strin"}', "type of a type": '{"type": 3}', "properties": '{"properties": [1]}',
    "minLength above maxLength": '{"type": "string", "minLength": 5, "maxLength": 3}',
    "minimum above maximum": '{"type": "integer", "minimum": 5, "maximum": 3}', "enum of nothing": '{"enum": []}',
    "pattern": '{"type": "string", "pattern": "("}', "look-ahead": '{"type": "string", "pattern": "(?=a)b"}',
    "format": '{"type": "string", "format": 3}', "not": '{"not": {"type": "string"}}',
    "uniqueItems": '{"type": "array", "uniqueItems": true}', "minItems": '{"type": "array", "minItems": -1}',
    "remote": '{"$ref": "http://localhost:1/x.json"}', "dangling": '{"$ref": "#/$defs/zz"}',
    "circular": '{"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}], "$defs": {"a": {"allOf": '
                '[{"$ref": "#/$defs/a"}, {"type": "object"}]}}}',
    "multipleOf 0": '{"type": "integer", "multipleOf": 0}', "multipleOf": '{"type": "integer", "multipleOf": 1000003}',
    "two multiples": '{"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}',
    "multipleOf of a property with a keyword's name": '{"properties": {"default": {"multipleOf": 1000003}}}',
    "true multipleOf": '{"type": "integer", "multipleOf": true}', "huge multipleOf": f'{{"multipleOf": {7**900}}}',
    "tiny multipleOf": '{"type": "number", "multipleOf": 1e-300}', "half a pair": '{"const": "\\ud800"}',
    "deep": deep('{"items":', "}", 500), "very deep": deep('{"anyOf":[', "]}", 100_000), "deep list": "[" * 100_000,
    "long": json.dumps({"enum": [str(i) * 9 for i in range(20_000)]}),
    "product": json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(6)]}
                                     for i in range(8)]}),
    "pasted": '{}}], "max_tokens": 1, "x": [{"y": {}',
}  # fmt: skip
BAD_REGEXES = {
    "empty": "", "unclosed": "(", "star": "*", "look-ahead": "(?=a)b", "back-reference": r"(a)\1", "class": "[z-a]",
    "property": r"\p{Nope}", "range": "a{2,1}", "word boundary": r"\bfoo\b", "flag": "(?z)a", "surrogate": "\ud800",
    "deep": "(" * 90_000 + "a" + ")" * 90_000, "long": "a" * 200_001,
}  # fmt: skip
#: refused when they meet a tokenizer
BAD_WITH_TOKENIZER = {
    "nothing": ("regex", r"[^\s\S]"), "empty text": ("regex", "()"), "bomb": ("regex", "((a{1000}){1000}){1000}"),
    "endless reference": ("json_schema", '{"$ref": "#"}'),
    "mutual": ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, '
               '"b": {"$ref": "#/$defs/a"}}}'),
}  # fmt: skip


def one_sentence(error: GemmaMtpError) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and 20 < len(text) < 450


@pytest.mark.parametrize(
    ("kind", "source"),
    [*(("json_schema", text) for text in BAD_SCHEMAS.values()), *(("regex", text) for text in BAD_REGEXES.values())],
    ids=[*BAD_SCHEMAS, *(f"regex {name}" for name in BAD_REGEXES)],
)  # fmt: skip
def test_bad_grammars(kind: Any, source: str) -> None:
    with pytest.raises(SamplingError) as caught:
        Grammar(kind, source)
    assert one_sentence(caught.value), str(caught.value)


@pytest.mark.parametrize(("kind", "source"), BAD_WITH_TOKENIZER.values(), ids=list(BAD_WITH_TOKENIZER))
def test_grammars_that_no_text_is_of(pair: Pair, kind: Any, source: str) -> None:
    with pytest.raises(SamplingError) as caught:
        pair.generate("x", SamplingParams(max_tokens=20, grammar=Grammar(kind, source)))
    assert one_sentence(caught.value), str(caught.value)


def test_other_bad_grammars() -> None:
    for arguments, message in (
        (("yaml", "x"), "kind is 'yaml'"), (("regex", 3), "source is a int"), (("json_object", "{}"), "no source"),
    ):  # fmt: skip
        with pytest.raises(SamplingError, match=message):
            Grammar(*arguments)
    with pytest.raises(SamplingError, match="must be a Grammar"):
        SamplingParams(grammar="[a-z]+")  # type: ignore[arg-type]


@pytest.mark.parametrize("multiple", [1, 5, 7, 0.01, 2.5, 1000, 65536, 999])
def test_multiples_that_are_taken(multiple: float) -> None:
    Grammar(
        "json_schema",
        json.dumps({"anyOf": [{"type": "number", "multipleOf": multiple}, {"const": {"multipleOf": 1000003}}]}),
    )


def test_a_grammar_needs_a_tokenizer(pair: Pair) -> None:
    with pytest.raises(TokenizerError, match="a grammar needs a tokenizer"):
        Pair(pair.backend, None, pair.generation).generate([5], SamplingParams(grammar=DIGITS))


def test_a_grammar_needs_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SamplingError, match=r"pip install 'gemma-mtp\[grammar\]'"):
        Grammar("json_object")


def test_llguidance_is_imported_by_the_first_grammar_only() -> None:
    code = "import sys; from gemma_mtp.engine import pair; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    assert main(["generate", "config = ", "-q", "--json-schema", str(schema), "-k", "3"]) == 0
    assert matches(PERSON_SCHEMA, capsys.readouterr().out)
    assert main(["generate", "x", "-q", "--regex", DIGITS.source, "-k", "3", "--compare", "--repeats", "1"]) == 0
    assert matches(DIGITS, capsys.readouterr().out.splitlines()[0])
    assert main(["generate", "config = ", "-q", "--json-object", "-k", "0", "-n", "8"]) == 4, "cut by the limit"
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regex", "("], "unclosed group"),
        (["--regex", "a", "--json-object"], "--json-object and --regex exclude each other"),
        (["--json-schema", "absent.json"], "the schema file absent.json can not be read"),
    ],
)
def test_command_line_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", *arguments]) == 2
    assert message in capsys.readouterr().err
