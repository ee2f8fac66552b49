"""A tokenizer as a GGUF file's metadata."""

from __future__ import annotations

import array
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer import gguf as keys

#: what is written where a tokenizer's own way to split text has no name in llama.cpp
OTHER_MODEL, OTHER_PRE = "gpt2", "gpt-2"
#: the score of a token that is not made of others, below all that are
UNMADE = -1e6


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, *, scored: bool = False) -> dict[str, Any]:
    """Returns the metadata of a tokenizer for a model of `vocab_size` tokens.

    One of Gemma's kind is as llama.cpp has it: with its merges (`gemma4`), or `scored`, as Gemma 3's are (`llama`).
    What its form can not say of a tokenizer goes along as a whole tokenizer.json, which gemma-mtp reads and llama.cpp
    does not. Raises TokenizerError for more tokens than the model has.
    """
    content = json.loads(tokenizer.raw.to_str())
    metadata = _tokens(tokenizer, vocab_size)
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in content["model"].get("merges", [])]
    if scored and _is_gemmas(content):
        metadata |= {keys.MODEL: "llama", keys.SCORES: _scores(metadata[keys.TOKENS], merges)}
    else:
        own = {keys.MODEL: "gemma4"} if _is_gemmas(content) else {keys.MODEL: OTHER_MODEL, keys.PRE: OTHER_PRE}
        metadata |= {**own, keys.MERGES: [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]}
    metadata |= _special(tokenizer)
    encoded = tokenizer.raw.encode("").ids
    metadata |= {keys.ADD_BOS: _is(tokenizer, encoded[:1], "bos_token"), "tokenizer.ggml.add_space_prefix": False}
    metadata |= _templates(tokenizer)
    if not same_as_read(tokenizer, metadata):
        metadata[keys.HF_JSON] = tokenizer.raw.to_str()
    return metadata


def same_as_read(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> bool:
    """Whether what is read of the metadata is this tokenizer."""
    try:
        read = keys.read_tokenizer(metadata)
    except TokenizerError:
        return False
    return _plain(read.raw) == _plain(tokenizer.raw) and read.special_tokens == tokenizer.special_tokens


def _plain(raw: RawTokenizer) -> dict[str, Any]:
    """A tokenizer.json's content without what makes no difference: the order of added tokens, which are looked for
    before all else, and whether the model's own vocabulary has them too."""
    content: dict[str, Any] = json.loads(raw.to_str())
    content["model"]["vocab"] = raw.get_vocab(with_added_tokens=True)
    content["added_tokens"] = sorted(content["added_tokens"], key=lambda token: token["id"])
    return content


def _is_gemmas(content: Mapping[str, Any]) -> bool:
    model, normalizer = content["model"], content.get("normalizer") or {}
    return bool(model.get("byte_fallback")) and normalizer.get("content") == "▁"


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Every token's text and type. Ids that the tokenizer does not have are unused."""
    raw = tokenizer.raw
    added = raw.get_added_tokens_decoder()
    by_id = {token_id: token for token, token_id in raw.get_vocab(with_added_tokens=True).items()}
    if max(by_id, default=0) >= vocab_size:
        raise TokenizerError(f"the tokenizer has ids up to {max(by_id)}, but the model only {vocab_size} tokens.")
    tokens = [by_id.get(i, keys.unused(i)) for i in range(vocab_size)]
    fallback = bool(getattr(raw.model, "byte_fallback", False))
    types = array.array("i")
    for i, token in enumerate(tokens):
        if i in added:
            types.append(keys.CONTROL if added[i].special else keys.USER_DEFINED)
        elif i not in by_id:
            types.append(keys.UNUSED)
        else:
            is_byte = fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)
            types.append(keys.BYTE if is_byte else keys.NORMAL)
    return {keys.TOKENS: tokens, keys.SCORES: array.array("f", [-1000.0] * vocab_size), keys.TYPES: types}


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> array.array[float]:
    """A token's is the better, the sooner it is made of others. Those whose merges stand among each other's have the
    same one, as they had it where the merges were made of scores."""
    made = ["".join(merge) for merge in merges]
    last = {token: rank for rank, token in enumerate(made)}
    scores: dict[str, float] = {}
    group, end = 0, -1
    for rank, token in enumerate(made):
        if token not in scores:
            group -= rank > end
            scores[token], end = float(group), max(end, last[token])
    return array.array("f", [scores.get(token, UNMADE) for token in tokens])


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {name: tokenizer.raw.token_to_id(text) for name, text in tokenizer.special_tokens.items()}
    found = {keys.SPECIAL_IDS[name]: i for name, i in ids.items() if name in keys.SPECIAL_IDS and i is not None}
    own = {name: text for name, text in tokenizer.special_tokens.items() if keys.SPECIAL_IDS.get(name) not in found}
    return {**found, **({keys.OWN_NAMES: json.dumps(own, ensure_ascii=False)} if own else {})}


def _templates(tokenizer: Tokenizer) -> dict[str, str]:
    templates = tokenizer.chat_template or {}
    named = {"default": templates} if isinstance(templates, str) else templates
    return {keys.TEMPLATE if name == "default" else f"{keys.TEMPLATE}.{name}": text for name, text in named.items()}


def _is(tokenizer: Tokenizer, ids: list[int], name: str) -> bool:
    text = tokenizer.special_tokens.get(name)
    return text is not None and ids == [tokenizer.raw.token_to_id(text)]
