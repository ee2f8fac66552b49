"""A checkpoint directory's tokenizer files, read as transformers 5.22.2 reads them.

`tokenizer.json` holds the algorithm. What a program left switched on in it (truncation, padding, BPE dropout) is
switched off, as every call of a transformers tokenizer does; `tokenizer_config.json` and the older
`special_tokens_map.json` and `added_tokens.json` add tokens and name the special ones. The counterparts are
`PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from gemma_mtp.errors import TokenizerError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ADDED_FILE = "added_tokens.json"
GEMMA_CLASSES = ("GemmaTokenizer", "GemmaTokenizerFast")
#: what transformers' Gemma class calls its special tokens where the files do not
GEMMA_NAMES = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
               "mask_token": "<mask>"}  # fmt: skip
#: what cleans text up after decoding, for models that are no BPE and for those that are
CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_ADDED_FIELDS = {"content": str, "single_word": bool, "lstrip": bool, "rstrip": bool, "normalized": bool,
                 "special": bool}  # fmt: skip


def read_backend(directory: Path) -> RawTokenizer:
    """The tokenizer of `tokenizer.json`. Raises TokenizerError where it is missing or malformed."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{directory} has no tokenizer.json; add the tokenizer's files, or use token ids.")
    try:
        return RawTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(f"{path} is not a readable tokenizer file ({error}); copy it again.") from None


def read_settings(directory: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, and what the older files add where it lists no added tokens. Raises TokenizerError."""
    settings = _read_object(directory / "tokenizer_config.json")
    versions = settings.get("fast_tokenizer_files")
    if versions not in (None, ["tokenizer.json"]):
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'} chooses among the fast_tokenizer_files {versions} by a library's"
            " version; name the one to use tokenizer.json, and remove that field."
        )
    if settings.get("additional_special_tokens") and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    if "added_tokens_decoder" in settings:
        return settings
    legacy = _read_object(directory / "special_tokens_map.json")
    extra = legacy.pop("extra_special_tokens", [])
    if isinstance(extra, dict):
        legacy |= extra
    elif extra:
        legacy["extra_special_tokens"] = [*_extra(settings), *(each for each in extra if each not in _extra(settings))]
    elif "additional_special_tokens" in legacy and "extra_special_tokens" not in settings:
        legacy["extra_special_tokens"] = legacy.pop("additional_special_tokens")
    return {**settings, **legacy, ADDED_FILE: _read_object(directory / ADDED_FILE)}


def apply_settings(raw: RawTokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """Bring a tokenizer into the state that transformers uses it in. Returns the special tokens' texts by name.

    Raises TokenizerError for settings that are malformed, or change text in a way that is not offered.
    """
    _switch_off(raw)
    if str(settings.get("tokenizer_class")) in GEMMA_CLASSES:
        _make_gemma(raw)
        settings = {**GEMMA_NAMES, **settings}
    _refuse_clean_up(raw, settings)
    raw.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    named, extra = _named(settings), [_added(each, "extra_special_tokens") for each in _extra(settings)]
    special = [*named.values(), *extra]
    listed = _listed(settings) if "added_tokens_decoder" in settings else _older(raw, settings, special)
    names = {token.content for token in named.values()}
    for token in (*listed, *named.values()):
        token.special = token.special or token.content in names
    _add(raw, listed, special)
    return {name: token.content for name, token in named.items()}


def _switch_off(raw: RawTokenizer) -> None:
    """State that a program left: transformers resets the first two on every call, and dropout in its Gemma class."""
    raw.no_truncation()
    raw.no_padding()
    if getattr(raw.model, "dropout", None) is not None:  # of the models, BPE alone has it
        raw.model.dropout = None


def _make_gemma(raw: RawTokenizer) -> None:
    """What transformers' Gemma class sets, whatever the file says."""
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    model: Any = raw.model
    model.fuse_unk = model.byte_fallback = True
    model.ignore_merges = False


def _refuse_clean_up(raw: RawTokenizer, settings: Mapping[str, Any]) -> None:
    """transformers takes spaces out of decoded text where a setting asks for it, but for BPE only by another one."""
    bpe = type(raw.model).__name__ == "BPE"
    if settings.get(CLEAN_UP) and (not bpe or settings.get(CLEAN_UP_BPE)):
        name = CLEAN_UP_BPE if bpe else CLEAN_UP
        raise TokenizerError(
            f"tokenizer_config.json sets {name}, which changes text that was already given out; set it to false."
        )


def _listed(settings: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder`, by their ids."""
    decoder = settings["added_tokens_decoder"]
    where = "added_tokens_decoder"
    if not isinstance(decoder, dict) or not all(isinstance(token, dict) for token in decoder.values()):
        raise _malformed(where, "an object of token ids and tokens")
    try:
        entries = sorted((int(token_id), token) for token_id, token in decoder.items())
    except (TypeError, ValueError):
        raise _malformed(where, "an object of token ids and tokens") from None
    return [_added(token, where) for _, token in entries]


def _older(raw: RawTokenizer, settings: Mapping[str, Any], special: list[AddedToken]) -> list[AddedToken]:
    """The tokens of added_tokens.json and tokenizer.json, by their ids."""
    names = {token.content for token in special}
    older = {
        token_id: AddedToken(token, special=token in names, normalized=token not in names)
        for token, token_id in settings.get(ADDED_FILE, {}).items()
    }
    if not all(type(token_id) is int for token_id in older):
        raise _malformed(ADDED_FILE, "an object of tokens and their ids")
    return [token for _, token in sorted({**older, **raw.get_added_tokens_decoder()}.items())]


def _named(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Special tokens by name: the seven known names, then a model's own, which end in `_token` or are listed apart."""
    known = {name: settings[name] for name in NAMES if settings.get(name) is not None}
    tokens = {name: value for name, value in settings.items() if name.endswith("_token") and name not in NAMES}
    objects = {name: value for name, value in tokens.items() if isinstance(value, dict) and "content" in value}
    own = {name: value for name, value in tokens.items() if isinstance(value, str)}
    extra = settings.get("extra_special_tokens")
    own |= extra if isinstance(extra, dict) else {}
    own = own or settings.get("model_specific_special_tokens") or {}
    if not isinstance(own, dict):
        raise _malformed("model_specific_special_tokens", "an object of tokens by name")
    return {name: _added(value, name) for name, value in {**known, **objects, **own}.items()}


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Special tokens without a name."""
    extra = settings.get("extra_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise _malformed("extra_special_tokens", "a list of tokens, or an object of tokens by name")
    return extra if isinstance(extra, list) else []


def _add(raw: RawTokenizer, listed: list[AddedToken], special: list[AddedToken]) -> None:
    """Add the listed tokens, whose flags then hold, and those special ones that are not there yet."""
    there = {token.content for token in (*raw.get_added_tokens_decoder().values(), *listed)}
    new: dict[str, AddedToken] = {}
    for token in special:
        if token.content not in there:
            new.setdefault(token.content, token)
    raw.add_tokens([*listed, *new.values()])


def _added(entry: object, where: str) -> AddedToken:
    """A token as the files write it: its text, or an object with its `content` and flags."""
    if isinstance(entry, str):
        return AddedToken(_text(entry, where), special=True)
    if not isinstance(entry, dict) or "content" not in entry:
        raise _malformed(where, "a token's text, or an object with its content")
    fields = {name: entry[name] for name in _ADDED_FIELDS if name in entry}
    if not all(isinstance(value, _ADDED_FIELDS[name]) for name, value in fields.items()):
        raise _malformed(where, "a token with the fields " + ", ".join(_ADDED_FIELDS))
    _text(fields["content"], where)
    return AddedToken(**{"special": where != "added_tokens_decoder", **fields})


def _text(content: str, where: str) -> str:
    """Returns a text that can be one. Raises TokenizerError for halves of characters, which JSON can have."""
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _malformed(where, "a token's text of whole characters") from None
    return content


def _malformed(where: str, expected: str) -> TokenizerError:
    return TokenizerError(f"{where} in the tokenizer's files must be {expected}; copy the files again.")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number too long, nested too deep
        raise TokenizerError(f"{path} is not valid JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content
