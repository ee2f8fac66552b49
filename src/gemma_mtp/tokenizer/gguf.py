"""The tokenizer in a GGUF file's metadata: that of Gemma's kind as a list of tokens, or a whole tokenizer.json."""

from __future__ import annotations

import array
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, processors

from gemma_mtp.chat.template import Templates
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer.tokenizer import Tokenizer

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
ADD_BOS, ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
HF_JSON = "tokenizer.huggingface.json"
TEMPLATE = "tokenizer.chat_template"
#: special tokens that have names which no key of the format's has, as a JSON object; ours alone
OWN_NAMES = "gemma_mtp.special_tokens"
#: keys of special tokens' ids, by the names that templates know them by
SPECIAL_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id", "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id", "mask_token": "tokenizer.ggml.mask_token_id",
    "eot_token": "tokenizer.ggml.eot_token_id", "eom_token": "tokenizer.ggml.eom_token_id",
}  # fmt: skip
#: of these, tokens that end a model's turn; llama.cpp ends one at these texts as well
ENDS = ("eos_token", "eot_token", "eom_token")
END_TEXTS = ("<eos>", "<turn|>", "<|tool_response>", "<end_of_turn>")
#: SentencePiece's byte-pair encoding: `gemma4` has its merges in the file, `llama` by scores
GEMMA_MODELS = ("gemma4", "llama")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
#: special tokens that llama.cpp's converter makes USER_DEFINED, so that its output shows them
SHOWN = frozenset({
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
})  # fmt: skip


def unused(token_id: int) -> str:
    """Returns the text that llama.cpp's converter gives an id that the tokenizer does not have."""
    return f"[PAD{token_id}]"


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether there is one that can be read."""
    return HF_JSON in metadata or metadata.get(MODEL) in GEMMA_MODELS


def unreadable(metadata: Mapping[str, Any]) -> str | None:
    """Returns a sentence on a tokenizer that can not be read, or None."""
    model = metadata.get(MODEL, "none")
    if has_tokenizer(metadata) or model in ("none", "no_vocab"):
        return None
    return f"its tokenizer is of the model {model!r}, which can not be read; give token ids."


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer with its chat templates. Raises TokenizerError where it is missing or malformed."""
    if not has_tokenizer(metadata):
        raise TokenizerError(f"the file has no tokenizer: {unreadable(metadata) or 'give token ids.'}")
    if HF_JSON in metadata:
        return Tokenizer(_of_json(metadata[HF_JSON]), _names(metadata), _templates(metadata))
    raw = _of_tokens(metadata)
    settings = {"tokenizer_class": "GemmaTokenizer", **_names(metadata), "added_tokens_decoder": _added(metadata)}
    return Tokenizer(raw, settings, _templates(metadata))


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Returns the ids of tokens that end a model's turn, in order."""
    given = [metadata.get(SPECIAL_IDS[name]) for name in ENDS]
    texts = metadata.get(TOKENS, [])
    known = {text: i for i, text in enumerate(texts) if text in END_TEXTS} if isinstance(texts, list) else {}
    return sorted({i for i in given if type(i) is int} | set(known.values()))


def _of_json(content: Any) -> RawTokenizer:
    try:
        return RawTokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"{HF_JSON} in the file is not readable ({error}); convert the model again.") from None


def _of_tokens(metadata: Mapping[str, Any]) -> RawTokenizer:
    """Byte-pair encoding with byte fallback; what else Gemma's have is set by their class (`files.apply_settings`)."""
    tokens = _tokens(metadata)
    if len(set(tokens)) < len(tokens):
        raise _malformed(TOKENS, "different texts")
    kinds = _types(metadata, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens) if not (kinds[i] == UNUSED and token == unused(i))}
    unknown = _special(metadata, tokens).get("unk_token", "<unk>")
    merges = _merges(metadata, tokens, vocab)
    try:
        model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
        raw = RawTokenizer(model)
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"the file's tokenizer can not be built ({error}); convert the model again.") from None
    _surround(raw, metadata, _special(metadata, tokens), vocab)
    return raw


def _surround(
    raw: RawTokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], vocab: dict[str, int]
) -> None:
    """What is put around a text: a BOS token, always for `gemma4` as in llama.cpp, and an EOS token if asked for."""
    wanted = {"bos_token": metadata.get(MODEL) == "gemma4" or bool(metadata.get(ADD_BOS, True)),
              "eos_token": bool(metadata.get(ADD_EOS, False))}  # fmt: skip
    bos, eos = (special[name] if wanted[name] and name in special else None for name in wanted)
    around = [token for token in (bos, eos) if token is not None]
    if around:
        template = " ".join([*([] if bos is None else [bos]), "$A", *([] if eos is None else [eos])])
        pairs = [(token, vocab[token]) for token in around]
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise _malformed(TOKENS, "a list of texts")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:  # bytes that are no text
        raise _malformed(TOKENS, "texts in UTF-8") from None
    return tokens


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    given = metadata.get(TYPES)
    if given is None:
        return [NORMAL] * count
    if not isinstance(given, array.array) or given.typecode in "fd" or len(given) != count:
        raise _malformed(TYPES, f"{count} whole numbers")
    return list(given)


def _merges(metadata: Mapping[str, Any], tokens: list[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Of the file's own, two texts with a space between them, or of the scores: a better token is made first."""
    given = metadata.get(MERGES)
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(merge, str) and " " in merge[1:] for merge in given):
            raise _malformed(MERGES, "pairs of texts")
        places = [merge.index(" ", 1) for merge in given]
        return [(merge[:place], merge[place + 1 :]) for merge, place in zip(given, places, strict=True)]
    scores = metadata.get(SCORES)
    if metadata.get(MODEL) != "llama" or not isinstance(scores, array.array) or len(scores) != len(tokens):
        raise _malformed(f"{MERGES} or, of the model llama, {SCORES}", "there")
    plain = {
        token: kind in (NORMAL, USER_DEFINED) for token, kind in zip(tokens, _types(metadata, len(tokens)), strict=True)
    }
    made: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        if plain[token]:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            known = [pair for pair in pairs if plain.get(pair[0]) and plain.get(pair[1])]
            known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
            made += [(score, len(left), len(right), left, right) for left, right in known]
    made.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in made]


def _special(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """Special tokens' texts by name."""
    named: dict[str, str] = {}
    for name, key in SPECIAL_IDS.items():
        token_id = metadata.get(key)
        if token_id is None:
            continue
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            raise _malformed(key, f"a token id below {len(tokens)}")
        named[name] = tokens[token_id]
    return named


def _names(metadata: Mapping[str, Any]) -> dict[str, str]:
    own = metadata.get(OWN_NAMES)
    names: Any = {}
    if own is not None:
        try:
            names = json.loads(own)
        except (TypeError, ValueError, RecursionError):
            names = None
        if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
            raise _malformed(OWN_NAMES, "a JSON object of texts")
    return {**_special(metadata, _tokens(metadata)), **names}


def _added(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tokens that are looked for in a text before it is encoded, as tokenizer_config.json lists them."""
    tokens = _tokens(metadata)
    kinds = _types(metadata, len(tokens))
    return {
        str(i): {"content": token, "special": kind == CONTROL or token in SHOWN, "normalized": False}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    }


def _templates(metadata: Mapping[str, Any]) -> Templates | None:
    """The default one, and others, whose names stand after its key."""
    found = {key.removeprefix(TEMPLATE).removeprefix(".") or "default": text
             for key, text in metadata.items() if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")}  # fmt: skip
    if not all(isinstance(text, str) for text in found.values()):
        raise _malformed(TEMPLATE, "a text")
    return found["default"] if list(found) == ["default"] else found or None


def _malformed(key: str, expected: str) -> TokenizerError:
    return TokenizerError(f"{key} in the file must be {expected}; convert the model again.")
