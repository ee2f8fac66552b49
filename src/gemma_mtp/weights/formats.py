"""The formats that there are, by name: the one place that knows all of them."""

from __future__ import annotations

from gemma_mtp.weight_types import QUANTISATIONS, Quantisation
from gemma_mtp.weights.base import Weight
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.device_order import Int4Halves, Int8x32Plain
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.int2 import Int2
from gemma_mtp.weights.int4 import Int4
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.int8x32 import Int8x32
from gemma_mtp.weights.panels import Panels

FORMATS: dict[str, type[Weight]] = {
    form.format: form for form in (Dense, Panels, Int8, Int4, Int2, Int8x32, Int4Halves, Int8x32Plain, Fp8)
}
#: those that a part of a model can be quantised to
QUANTISED: dict[Quantisation, type[Weight]] = {kind: FORMATS[kind] for kind in QUANTISATIONS}
