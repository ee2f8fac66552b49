"""Every kernel that the five sizes launch is compiled for every card, none of which is here: no stack, shared memory in
bounds, the expected instruction, and no fused multiply-add but those that are written.

By default one card of each kind of tensor core compiles a share of the kernels; `-m slow` compiles all for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from recorded_launches import SIZES, TYPES, Kernel, in_fp8, recorded

from gemma_mtp.backend.cuda.dots import DENSE

#: bytes of shared memory that a program may have, by compute capability
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
#: instructions that large tiles may take in place of mma.sync
LARGE = {90: "wgmma", 100: "tcgen05"}
PRODUCTS = {"linear_kernel", "gate_up_kernel", "head_kernel", "expert_kernel", "cluster_logits_kernel", "attend_kernel"}
#: one of each idea, which the default tests compile
REPRESENTATIVE = {"31B": "none", "E2B": "int4"}
#: all kinds of weights that load
WEIGHTS = tuple(TYPES)


def kernels(sizes: Iterable[tuple[str, str]]) -> list[Kernel]:
    """What is launched, and for dense weights the same in fp8."""
    found = {kernel for size, weights in sizes for kernel in recorded(size, weights)}
    found |= {in_fp8(one) for one in found if one.name in PRODUCTS and dict(one.constants).get("KIND") == DENSE}
    return sorted(found, key=str)


def compiled(tasks: Iterable[tuple[Kernel, int, bool]], workers: int) -> list[dict[str, Any]]:
    """What came out for each kernel and card, without fusing or with. The compiler's own cache keeps it for the next
    run."""
    lines = "".join(
        json.dumps({**kernel._asdict(), "card": card, "fusion": fusion}) + "\n" for kernel, card, fusion in tasks
    )
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run([sys.executable, str(program), str(workers)], input=lines, capture_output=True, text=True,
                         env=environment, check=True)  # fmt: skip
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(found: dict[str, Any]) -> None:
    what = f"{found['name']} {found['constants']} for sm_{found['card']}"
    assert "error" not in found, f"{what}: {found.get('error')}"
    assert found["stack"] == found["local"] == 0, f"{what}: {found['stack']} bytes of stack"
    assert found["shared"] <= SHARED[found["card"]], f"{what}: {found['shared']} bytes of shared memory"
    constants = dict(found["constants"])
    if found["name"] in PRODUCTS:
        allowed = {"mma.sync", LARGE.get(found["card"], "mma.sync")}
        assert found["products"], f"{what}: no tensor core"
        assert set(found["products"]) <= allowed, f"{what}: {found['products']}"
        if constants.get("BLOCK_M", 16) <= 16:
            assert found["products"] == ["mma.sync"], what
    assert not found["flushed"], f"{what}: subnormal numbers, as small values of E4M3 begin, become zero"
    scaled = constants.get("KIND", DENSE) != DENSE and found["name"] in PRODUCTS
    assert (found["fused"] > 0) == scaled, f"{what}: {found['fused']} fused multiply-adds"


def one_of_each(found: list[Kernel]) -> list[Kernel]:
    """Of each kernel with each tile, and with each kind of weights that is not dense, the one with the largest tile and
    most switches on."""
    chosen: dict[Any, Kernel] = {}
    for kernel in found:
        constants = dict(kernel.constants)
        kind, rows = constants.get("KIND", DENSE), constants.get("BLOCK_M", 0)
        key = kernel.name, kind, rows if kind == DENSE else None
        if key not in chosen or weight_of(kernel) > weight_of(chosen[key]):
            chosen[key] = kernel
    return list(chosen.values())


def weight_of(kernel: Kernel) -> tuple[int, int]:
    """How large its tile is, and how many switches are on."""
    return dict(kernel.constants).get("BLOCK_M", 0), sum(value is True for _, value in kernel.constants)


def test_a_share_compiles() -> None:
    """A kernel of each kind and switch, for one card each in turn, so that every card has some. The control: with the
    compiler's default setting a kernel has fused multiply-adds that it has not without."""
    found = one_of_each(kernels(REPRESENTATIVE.items()))
    assert {kernel.name for kernel in found} >= PRODUCTS - {"expert_kernel"}
    tasks = [(kernel, list(SHARED)[i % len(SHARED)], False) for i, kernel in enumerate(found)]
    control = next((kernel, card, True) for kernel, card, _ in tasks if kernel.name == "ple_kernel")
    results = compiled([*tasks, control], 2)
    assert len(results) == len(tasks) + 1
    for result in results:
        if result["fusion"]:
            assert result["name"] == "ple_kernel" and result["fused"] > 0
        else:
            check(result)


@pytest.mark.slow
@pytest.mark.parametrize("card", SHARED)
def test_everything_compiles(card: int) -> None:
    found = kernels((size, weights) for size in SIZES for weights in WEIGHTS)
    results = compiled([(kernel, card, False) for kernel in found], os.cpu_count() or 1)
    assert len(results) == len(found)
    for result in results:
        check(result)
