"""Tokenizers in GGUF files: those that the `gguf` package writes are the checkpoint's, and what we write comes back."""

import array
import contextlib
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from byte_fallback import CHARACTERS, gemma_like
from gguf_files import close
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import TokenizerError
from gemma_mtp.files.gguf import read_header
from gemma_mtp.interop.gguf_tokenizer import same_as_read, tokenizer_metadata
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.tokenizer import gguf as keys
from gemma_mtp.tokenizer.gguf import end_token_ids, read_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + m['role'] + m['content'] + '<turn|>\n' }}{% endfor %}"
SETTINGS = {
    "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>", "chat_template": TEMPLATE,
    "extra_special_tokens": {"sot_token": "<|turn>", "eot_token": "<turn|>", "tool_token": "<|tool_call>"},
}  # fmt: skip
Metadata = dict[str, Any]


def gemma_directory(root: Path) -> Path:
    raw = gemma_like()
    raw.add_special_tokens([AddedToken("<|tool_call>", special=True, normalized=False)])
    raw.add_tokens([AddedToken("<image>", normalized=False)])
    raw.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (root / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    return root


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_directory(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def theirs(gemma: Path) -> Metadata:
    """What llama.cpp's converter writes, by the package's own reading of the checkpoint's tokenizer."""
    vocab = gguf.LlamaHfVocab(gemma)
    shown = {"<|tool_call>", "<|channel>"}  # of those the converter has, the ones that are here
    tokens, scores, types = zip(*vocab.all_tokens(), strict=True)
    types = tuple(4 if text.decode() in shown else kind for text, kind in zip(tokens, types, strict=True))
    writer = gguf.GGUFWriter(gemma / "theirs.gguf", "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(gemma, load_merges=True).add_to_gguf(writer)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    close(writer)
    return read_header(gemma / "theirs.gguf").metadata


WORDS = [*CHARACTERS, " ", "\t", "ß", "😀", "<bos>", "<|turn>", "<image>", "<|tool_call>", "hello"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)


@given(text=TEXTS, special=st.booleans())
def test_ids_and_texts_are_the_checkpoints(gemma: Path, theirs: Metadata, text: str, special: bool) -> None:
    ours, original = read_tokenizer(theirs), Tokenizer.from_dir(gemma)
    ids = original.encode(text, special)
    assert ours.encode(text, special) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == original.decode(ids, skip)


def test_ids_are_transformers(gemma: Path, theirs: Metadata) -> None:
    oracle, ours = AutoTokenizer.from_pretrained(gemma), read_tokenizer(theirs)
    for text in ("hello the ok", "<|turn>user\nhé 😀<turn|>\n", "a  b\n\nc", "", "<image> x<|tool_call>{}"):
        assert ours.encode(text) == oracle(text)["input_ids"], text


def test_templates_and_special_tokens(gemma: Path, theirs: Metadata) -> None:
    ours, original = read_tokenizer(theirs), Tokenizer.from_dir(gemma)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.encode_chat(messages) == original.encode_chat(messages)
    named = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
    assert [ours.special_tokens[name] for name in named] == [original.special_tokens[name] for name in named]
    several = {**theirs, "tokenizer.chat_template.tool_use": "tools"}
    assert read_tokenizer(several).chat_template == {"default": TEMPLATE, "tool_use": "tools"}
    assert read_tokenizer({**theirs, keys.TEMPLATE: None} | {keys.TEMPLATE: "x"}).chat_template == "x"


def test_what_ends_a_turn(theirs: Metadata) -> None:
    """As in llama.cpp: by the keys, and by texts that Gemma 4 has."""
    tokens = theirs[keys.TOKENS]
    assert end_token_ids(theirs) == [tokens.index("<eos>"), tokens.index("<turn|>")]
    assert end_token_ids({"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eom_token_id": 4}) == [4, 9]
    assert end_token_ids({}) == []


def test_merges_of_scores(theirs: Metadata) -> None:
    """An older file has no merges: a token with a better score is made first, as transformers makes them."""
    tokens = theirs[keys.TOKENS]
    scores = array.array("f", [-float(i) for i in range(len(tokens))])
    metadata = {name: value for name, value in theirs.items() if name != keys.MERGES}
    metadata |= {keys.MODEL: "llama", keys.SCORES: scores}
    plain = {t: i for i, t in enumerate(tokens) if theirs[keys.TYPES][i] in (keys.NORMAL, keys.USER_DEFINED)}
    expected = generate_merges(plain, {token: scores[i] for token, i in plain.items()})
    model = json.loads(read_tokenizer(metadata).raw.to_str())["model"]
    assert [tuple(merge) for merge in model["merges"]] == expected
    assert ("hell", "o") in expected
    original = read_tokenizer(theirs)
    assert read_tokenizer(metadata).encode("hello the ok") == original.encode("hello the ok")
    assert read_tokenizer({**metadata, keys.ADD_BOS: False}).encode("ok") == original.encode("ok")[1:]


def test_scores_give_the_same_merges_again(theirs: Metadata) -> None:
    """As Gemma 3's files have them, where several tokens have one score too: their merges stand among each other's."""
    tokens = theirs[keys.TOKENS]
    for scores in ([-float(i) for i in range(len(tokens))], [-float(i // 20) for i in range(len(tokens))]):
        metadata = {name: value for name, value in theirs.items() if name != keys.MERGES}
        original = read_tokenizer({**metadata, keys.MODEL: "llama", keys.SCORES: array.array("f", scores)})
        written = tokenizer_metadata(original, len(tokens), scored=True)
        assert written[keys.MODEL] == "llama" and keys.HF_JSON not in written and keys.MERGES not in written
        assert json.loads(read_tokenizer(written).raw.to_str()) == json.loads(original.raw.to_str())


def test_ours_comes_back(gemma: Path) -> None:
    """Gemma's form is written as llama.cpp has it; ids that the tokenizer does not have are no tokens."""
    original = Tokenizer.from_dir(gemma)
    size = original.vocab_size
    metadata = tokenizer_metadata(original, size + 3)
    assert metadata[keys.MODEL] == "gemma4"
    assert keys.HF_JSON not in metadata
    assert metadata[keys.TOKENS][size:] == [f"[PAD{size + i}]" for i in range(3)]
    read = read_tokenizer(metadata)
    assert read.vocab_size == size
    assert same_as_read(original, metadata)
    assert read.special_tokens == original.special_tokens
    assert read.encode_chat([{"role": "user", "content": "hi"}]) == original.encode_chat(
        [{"role": "user", "content": "hi"}]
    )
    with pytest.raises(TokenizerError, match=f"the tokenizer has ids up to {size - 1}, but the model only 9"):
        tokenizer_metadata(original, 9)


def test_another_form_goes_along_whole() -> None:
    original = Tokenizer.from_dir(bundled_directory() / "target")
    metadata = tokenizer_metadata(original, 4096)
    assert metadata[keys.MODEL] == "gpt2"
    read = read_tokenizer(metadata)
    text = "def f(x):\n    return x  # ü <|turn> \t日"
    assert read.encode(text) == original.encode(text)
    assert read.special_tokens == original.special_tokens
    assert read.chat_template == original.chat_template


MALFORMED: dict[str, Metadata] = {
    keys.TOKENS: {keys.TOKENS: None},
    "tokens in the file must be a list": {keys.TOKENS: ["a", 3]},
    "texts in UTF-8": {keys.TOKENS: ["a", "\udcff"]},
    "different texts": {keys.TOKENS: ["a", "a"]},
    "token_type in the file must be 2 whole numbers": {keys.TOKENS: ["a", "b"], keys.TYPES: array.array("i", [1])},
    "merges in the file must be pairs": {keys.MERGES: ["ab"]},
    "can not be built": {keys.MERGES: ["a zz"]},
    "bos_token_id in the file must be a token id below": {"tokenizer.ggml.bos_token_id": 10**6},
    "eos_token_id in the file must be a token id below": {"tokenizer.ggml.eos_token_id": "one"},
    "or, of the model llama": {keys.MERGES: None},
    "special_tokens in the file must be a JSON object": {keys.OWN_NAMES: "{"},
    "chat_template in the file must be a text": {keys.TEMPLATE: 7},
    "huggingface.json in the file is not readable": {keys.HF_JSON: "{}"},
    "no tokenizer: its tokenizer is of the model 'bert'": {keys.MODEL: "bert"},
    "the file has no tokenizer: give token ids": {keys.MODEL: "none"},
}  # fmt: skip


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_tokenizers(theirs: Metadata, reason: str) -> None:
    metadata = {name: value for name, value in {**theirs, **MALFORMED[reason]}.items() if value is not None}
    if keys.TOKENS in MALFORMED[reason] and keys.TYPES not in MALFORMED[reason]:
        metadata.pop(keys.TYPES)
    with pytest.raises(TokenizerError, match=reason):
        read_tokenizer(metadata)


@given(st.data())
def test_any_metadata_gives_a_tokenizer_or_a_typed_error(theirs: Metadata, data: st.DataObject) -> None:
    values = st.one_of(
        st.none(), st.integers(-9, 10**6), st.text(max_size=5), st.booleans(), st.floats(),
        st.lists(st.text(max_size=3), max_size=3), st.just(array.array("i", [1, 3])), st.just(array.array("f", [0.5])),
    )  # fmt: skip
    names = st.sampled_from([name for name in theirs if name.startswith("tokenizer.")] + [keys.OWN_NAMES, keys.HF_JSON])
    changed = data.draw(st.dictionaries(names, values, max_size=3))
    with contextlib.suppress(TokenizerError):
        read_tokenizer({name: value for name, value in {**theirs, **changed}.items() if value is not None})
    end_token_ids({**theirs, **changed})
