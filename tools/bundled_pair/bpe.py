"""The bundled pair's tokenizer: byte-level BPE with Gemma's special ids, trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bundled_pair.corpus import save_json
from gemma_mtp.files.replace import replace_text

VOCAB_SIZE = 4096
PAD, EOS, BOS, UNK, MASK, TURN_OPEN, TURN_CLOSE = 0, 1, 2, 3, 4, 105, 106
NAMED = {PAD: "<pad>", EOS: "<eos>", BOS: "<bos>", UNK: "<unk>", MASK: "<mask>",
         TURN_OPEN: "<|turn>", TURN_CLOSE: "<turn|>"}  # fmt: skip
#: ids 0 to 106 as in Gemma's vocabulary, whose names we do not use standing empty
SPECIAL_TOKENS = [NAMED.get(i, f"<unused{i}>") for i in range(TURN_CLOSE + 1)]

#: Newlines and a line's indentation are tokens of their own, so text that ends at a newline continues as it would
#: inside a file. Elsewhere one space belongs to the word after it.
PATTERN = r"\n+|(?<=\n) +| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<turn|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learn the merges. `encode` puts BOS first; `decode` gives back the bytes of any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    replace_text(directory / "tokenizer.json", tokenizer.to_str(pretty=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": NAMED[PAD], "eos_token": NAMED[EOS], "bos_token": NAMED[BOS], "unk_token": NAMED[UNK],
        "mask_token": NAMED[MASK], "add_bos_token": True, "clean_up_tokenization_spaces": False,
        "model_max_length": context, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    save_json(config, directory / "tokenizer_config.json")
