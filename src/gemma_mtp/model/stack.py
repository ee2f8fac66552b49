"""What targets and drafters have in common: decoder layers between a token table and a head."""

from __future__ import annotations

from torch import nn

from gemma_mtp.config import TextConfig
from gemma_mtp.model.layers import DecoderLayer, RMSNorm
from gemma_mtp.weight_types import WeightTypes
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.matrix import Embedding, Linear, Matrix


class Stack(nn.Module):
    """A token table, decoder layers, a final norm and a head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.weight_types = WeightTypes()

    @property
    def head(self) -> Matrix:
        """The head's weight [V, D]: the token table unless the checkpoint unties them."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def checkpoint_tensors(self) -> dict[str, Weight]:
        """Official tensor names, with the `model.` prefix, and views of the weights that hold them."""
        tensors: dict[str, Weight] = {
            "model.embed_tokens.weight": self.embed_tokens.stored, "model.norm.weight": self.norm.stored,
        }  # fmt: skip
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            tensors.update((f"model.layers.{i}.{name}", tensor) for name, tensor in layer.checkpoint_tensors())
        if self.lm_head is not None:
            tensors["lm_head.weight"] = self.lm_head.stored
        return tensors
