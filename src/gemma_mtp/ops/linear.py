"""Linear layers whose weight is packed once for decoding.

PyTorch's own `F.linear` makes several fp32 rows cost several times one row on a CPU (3.6x for four), which would make
verification as dear as decoding. oneDNN's prepacked weights do not, and give a row the same bits among 2..64 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a fast packed form for this weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """oneDNN's own layout of a [out, in] weight, for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x [..., in] times the packed weight's transpose."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


class Linear(nn.Module):
    """A bias-free linear layer. After `pack_` it holds oneDNN's layout instead of the weight, for inference only."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.packed: Tensor | None = None

    def pack_(self) -> None:
        """Replace the weight by its packed form where that pays; the dense weight is freed."""
        if can_pack(self.weight):
            self.packed = pack(self.weight)
            self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.packed is None else packed_linear(x, self.packed)
