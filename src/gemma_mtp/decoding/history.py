"""What penalties see: how often each token is in the output, and which are in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCounts:
    """What each row's penalties see: `output_RV` int32 counts in the output, `seen_RV` bool in prompt or output."""

    output_RV: Tensor
    seen_RV: Tensor

    def at(self, token_ids_RC: Tensor) -> TokenCounts:
        ids = token_ids_RC.expand(self.output_RV.shape[0], -1)
        return TokenCounts(self.output_RV.gather(-1, ids), self.seen_RV.gather(-1, ids))


class TokenHistory:
    """Token counts of one sequence, on the device. Keep one only where `SamplingParams.uses_history`."""

    def __init__(self, prompt_ids: Tensor | Sequence[int], vocab_size: int, device: torch.device | str) -> None:
        prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)
        self.prompt_V = torch.zeros(vocab_size, dtype=torch.bool, device=device).index_fill_(0, prompt, True)
        self.output_V = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    def commit(self, token_ids_N: Tensor, count: Tensor | int | None = None) -> None:
        """Add the first `count` (default: all) of `token_ids_N` to the output; a device tensor needs no host sync."""
        if count is None:
            weights = torch.ones_like(token_ids_N, dtype=torch.int32)
        else:
            weights = (torch.arange(token_ids_N.shape[0], device=token_ids_N.device) < count).to(torch.int32)
        self.output_V.index_add_(0, token_ids_N, weights)

    def rows(self, drafts_K: Tensor, first: int = 0) -> TokenCounts:
        """Counts of rows `first` .. K: row r sees what was committed and the drafts before r.

        Verification takes all K+1 rows; draft step j takes `rows(drafts[:j], first=j)`, which is one row.
        """
        n_drafts = drafts_K.shape[0]
        row_R1 = torch.arange(first, n_drafts + 1, device=drafts_K.device).unsqueeze(-1)
        visible_RK = (torch.arange(n_drafts, device=drafts_K.device) < row_R1).to(torch.int32)
        output_RV = self.output_V.repeat(row_R1.shape[0], 1)
        output_RV.scatter_add_(-1, drafts_K.expand(row_R1.shape[0], -1), visible_RK)
        return TokenCounts(output_RV, self.prompt_V | (output_RV > 0))
