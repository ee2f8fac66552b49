"""Text to token ids and back, by a checkpoint's own files."""

from gemma_mtp.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
