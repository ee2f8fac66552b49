"""Tokenizer directories in every state that other programs leave them in, against transformers' AutoTokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_fallback import BOS, CLOSE, OPEN, gemma_like
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gemma_mtp.datasets import Example
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import Tokenizer
from gemma_mtp.training.material import gather

TEXTS = [
    "", "hello", "hello the ok hello the ok hello the ok hello the ok, and so on",
    "<|turn>user\nhi<turn|>",
    "a<tool>b <tool> c<TOOL>", "x<end>y <end>  z", " <|image|>  word<extra> the wordy word", "日本 ᚠᚢᚦ é", "hello!?",
    "<eos>",
]  # fmt: skip
NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
GEMMA = {"tokenizer_class": "GemmaTokenizer"}
Parts = dict[str, Any]


def entry(content: str, **flags: bool) -> Parts:
    no = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **no, **flags}


def config(**settings: Any) -> Parts:
    return {"tokenizer_config.json": {**GENERIC, **settings}}


def gemma(**settings: Any) -> Parts:
    return {"tokenizer_config.json": {**GEMMA, **settings}}


def older(**settings: Any) -> Parts:
    return {
        "special_tokens_map.json": {"eos_token": entry("<end>"), "additional_special_tokens": ["<|image|>", "<extra>"]},
        "added_tokens.json": {"<end>": 400, "<tool>": 401, "word": 402},
        **config(**settings),
    }


TRUNCATION = {"direction": "Left", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
PADDING = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<pad>"}  # fmt: skip
ADDED = {
    "400": entry("<end>", special=True),
    "399": entry("<tool>", normalized=True),
    "9": entry("<|image|>", lstrip=True),
}
STATES: dict[str, Parts] = {
    "as it is": config(),
    "without a configuration": {},
    "truncation": {"truncation": TRUNCATION, **config()},
    "padding": {"padding": PADDING, **config()},
    "both, Gemma's class": {"truncation": TRUNCATION, "padding": PADDING, **gemma()},
    "added by id": config(added_tokens_decoder=ADDED),
    "added by id, Gemma's class": gemma(),
    "added by id, an eos among them": config(added_tokens_decoder={"400": entry("<end>")}, eos_token="<end>"),
    "added, of words": config(
        added_tokens_decoder={
            "300": entry("word", single_word=True), "301": entry("the", rstrip=True), "302": entry("ᚠ", normalized=True)
        }
    ),
    "additional": config(additional_special_tokens=["<extra>", "<tool>", "<eos>"]),
    "extra as a list": config(
        extra_special_tokens=["<extra>", {"__type": "AddedToken", **entry("<tool>", special=True)}]
    ),
    "extra by name": config(extra_special_tokens={"boi_token": "<tool>", "image_token": "<|image|>"}),
    "own": config(eot_token="<turn|>", boi_token="<tool>", etc_token=None),
    "own, listed apart": config(model_specific_special_tokens={"boi_token": "<tool>", "eot_token": "<turn|>"}),
    "tokens as objects": config(sep_token={"__type": "AddedToken", **entry("<end>", lstrip=True, special=True)}),
    "pad and mask not in the vocabulary": config(pad_token="<extra>", mask_token="<tool>", cls_token="<end>"),
    "Gemma's class with own": gemma(boi_token="<tool>", eos_token="<end>"),
    "older files": older(),
    "older files beside newer": older(added_tokens_decoder=ADDED),
    "older map with extra by name": {
        "special_tokens_map.json": {"extra_special_tokens": {"x_token": "<tool>"}}, **config(),
    },
    "older map with an extra list": {
        "special_tokens_map.json": {"extra_special_tokens": ["<tool>", {"content": "<end>", "rstrip": True}]},
        **config(extra_special_tokens=["<extra>"]),
    },
    "split special tokens": config(split_special_tokens=True, additional_special_tokens=["<extra>"]),
    "no bos wanted": config(add_bos_token=False),
    "eos wanted": config(add_bos_token=True, add_eos_token=True),
    "no post-processor": {"post_processor": None, **config(add_bos_token=True)},
    "no post-processor, Gemma's class": {"post_processor": None, **gemma(add_bos_token=True)},
    "eos by the post-processor": {
        "post_processor": json.loads(
            processors.TemplateProcessing(
                single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", 1)]
            ).__getstate__()
        ),
        **config(),
    },
    "clean-up, which BPE ignores": config(clean_up_tokenization_spaces=True),
    "another normalizer, Gemma's class": {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": None, **gemma()},
    "another decoder, Gemma's class": {"decoder": {"type": "Fuse"}, **gemma()},
    "a decoder that strips": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        **config(),
    },
    "a decoder of spaces": {
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, **config(),
    },
    "no decoder": {"decoder": None, **config()},
}  # fmt: skip


def write(directory: Path, parts: Parts) -> Path:
    """Files by their names; other parts go into tokenizer.json."""
    content = json.loads(gemma_like().to_str())
    content |= {name: part for name, part in parts.items() if not name.endswith(".json")}
    files = {"tokenizer.json": content, **{name: part for name, part in parts.items() if name.endswith(".json")}}
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return directory


@pytest.mark.parametrize("state", STATES)
def test_a_directory_is_read_as_transformers_reads_it(tmp_path: Path, state: str) -> None:
    directory = write(tmp_path, STATES[state])
    ours, theirs = Tokenizer.from_dir(directory), load(directory)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for text in TEXTS:
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False) == bare, text
        assert ours.encode(text) == theirs(text)["input_ids"], text
        for skip in (False, True):
            assert ours.decode(bare, skip) == theirs.decode(bare, skip_special_tokens=skip), text


def load(directory: Path) -> PreTrainedTokenizerFast:
    """transformers asks the network about directories without config.json."""
    if not (directory / "config.json").exists():
        (directory / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    return AutoTokenizer.from_pretrained(directory)


def test_the_states_are_not_all_the_same(tmp_path: Path) -> None:
    made = set()
    for number, parts in enumerate(STATES.values()):
        (tmp_path / str(number)).mkdir()
        ours = Tokenizer.from_dir(write(tmp_path / str(number), parts))
        made.add(str([(ours.encode(text), ours.decode(ours.encode(text))) for text in TEXTS]))
    assert len(made) >= 18


def test_what_a_training_script_leaves_is_gone(tmp_path: Path) -> None:
    """As `save_pretrained` writes it after a call with truncation and padding: prompts, chat and training text."""
    script = load(write(tmp_path, config()))
    script.chat_template = "{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}<|turn>"
    text = "hello " * 40
    script([text, "a"], truncation=True, max_length=12, padding=True)
    script.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved["truncation"]["max_length"] == 12
    assert saved["padding"] is not None
    ours = Tokenizer.from_dir(tmp_path / "saved")
    assert ours.encode(text) == script(text)["input_ids"]
    assert len(ours.encode(text)) > 40
    assert ours.encode("a") == script("a")["input_ids"]
    messages = [{"role": "user", "content": text}]
    assert ours.encode_chat(messages)[-1] == OPEN
    (unit,) = gather(
        [Example("messages", (*messages, {"role": "assistant", "content": text}), "x", "x")], ours, 999, 512
    )
    assert unit.ids == script.apply_chat_template([*messages, *messages], return_dict=False)
    (row,) = gather([Example("text", text, "x", "x")], ours, 999, 512)
    assert row.ids == script(text)["input_ids"]


def test_dropout_is_off(tmp_path: Path) -> None:
    """Only transformers' Gemma class switches it off: others encode by chance."""
    content = json.loads(gemma_like().to_str())["model"] | {"dropout": 0.9}
    ours = Tokenizer.from_dir(write(tmp_path, {"model": content, **gemma()}))
    assert [ours.encode("hello the ok" * 9)] * 20 == [ours.encode("hello the ok" * 9) for _ in range(20)]
    assert ours.encode("hello the ok" * 9) == load(tmp_path)("hello the ok" * 9)["input_ids"]


def test_a_bos_that_a_text_has_is_not_doubled(tmp_path: Path) -> None:
    """The one thing that transformers does otherwise."""
    ours = Tokenizer.from_dir(write(tmp_path, config()))
    assert ours.encode("<bos>hello") == ours.encode("hello")
    assert ours.encode("<bos><bos>hello", special=False)[:2] == [BOS, BOS]
    assert ours.encode("<turn|>")[-1] == CLOSE


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (config(added_tokens_decoder=["<x>"]), "added_tokens_decoder .* must be an object"),
        (config(added_tokens_decoder={"x": entry("<x>")}), "added_tokens_decoder .* must be an object"),
        (config(added_tokens_decoder={"1": {"special": True}}), "added_tokens_decoder .* must be a token"),
        (config(added_tokens_decoder={"1": {"content": 3}}), "added_tokens_decoder .* must be a token"),
        (config(eos_token=3), "eos_token .* must be a token"),
        (config(extra_special_tokens="<x>"), "extra_special_tokens .* must be a list"),
        (config(extra_special_tokens=[3]), "extra_special_tokens .* must be a token"),
        (config(model_specific_special_tokens=["x"]), "model_specific_special_tokens .* must be an object"),
        ({"added_tokens.json": {"<x>": "one"}}, "added_tokens.json .* must be an object"),
        ({"special_tokens_map.json": ["<x>"]}, "must hold a JSON object"),
        (config(fast_tokenizer_files=["tokenizer.4.0.json"]), "fast_tokenizer_files"),
        (
            config(clean_up_tokenization_spaces=True,
                   clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True),
            "changes text that was already given out",
        ),
        (
            {"decoder": {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}},
            "token by token",
        ),
        ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "decoder is BPEDecoder"),
    ],
)  # fmt: skip
def test_what_is_malformed_or_not_offered_is_refused_by_name(tmp_path: Path, parts: Parts, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(write(tmp_path, parts))


def test_a_token_added_by_the_configuration_is_one_token(tmp_path: Path) -> None:
    ours = Tokenizer.from_dir(write(tmp_path, config(added_tokens_decoder={"400": entry("<tool>", special=True)})))
    assert len(ours.encode("<tool>", special=False)) == 1
    assert ours.raw.get_added_tokens_decoder()[ours.vocab_size - 1] == AddedToken("<tool>", special=True)
