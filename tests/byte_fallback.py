"""A small tokenizer of Gemma's kind: BPE with byte fallback, spaces as ▁, and few characters of its own."""

from __future__ import annotations

import string

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

PAD, EOS, BOS, UNK, MASK, OPEN, CLOSE = range(7)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
FIRST_BYTE = len(SPECIAL)
CHARACTERS = ["▁", *string.ascii_letters, *string.digits, *".,!?<>|'\n{}[]\":_/ é日"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "t"), ("▁t", "h"), ("o", "k"), ("▁", "ok")]


def gemma_like() -> RawTokenizer:
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *("".join(pair) for pair in MERGES)]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(SPECIAL)
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return raw
