"""GEMMA_MTP_ISA: what is asked for and not there is refused by name."""

import pytest

from gemma_mtp.backend.native import check_instruction_set
from gemma_mtp.errors import EngineError


def test_an_unknown_instruction_set_is_refused() -> None:
    for wanted in (None, "avx2", "portable"):
        check_instruction_set(wanted, ["avx2", "portable"])
    for wanted in ("avx3", ""):
        with pytest.raises(EngineError, match=rf"GEMMA_MTP_ISA is '{wanted}', but must be one of avx2, portable here"):
            check_instruction_set(wanted, ["avx2", "portable"])
