"""How likely a model finds tokens that are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_mtp.backend.base import Backend
from gemma_mtp.decoding.sampling import ranks, top_logprobs
from gemma_mtp.engine.result import PromptLogprob

#: rows whose logits are in memory at a time, each of them a vocabulary wide
ROWS = 32


def score(backend: Backend, hidden_RD: Tensor, token_ids: Sequence[int], top: int) -> list[PromptLogprob]:
    """Returns the log-probability of each row's given token, and the row's `top` likeliest ones.

    `hidden_RD`: states after the final norm of the rows before the tokens.
    """
    found: list[PromptLogprob] = []
    for begin in range(0, len(token_ids), ROWS):
        ids = list(token_ids[begin : begin + ROWS])
        ids_R = torch.tensor(ids, device=backend.device)
        logits_RV = backend.logits(hidden_RD[begin : begin + len(ids)])
        likeliest = top_logprobs(logits_RV, ids_R, top)
        places = ranks(logits_RV, ids_R).tolist()
        chosen, tokens, tops = (t.tolist() for t in (likeliest.chosen_R, likeliest.token_ids_RN, likeliest.top_RN))
        for row, token_id in enumerate(ids):
            pairs = tuple(zip(tokens[row], tops[row], strict=True))
            found.append(PromptLogprob(token_id, chosen[row], pairs, places[row]))
    return found
