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


def compiled(
    tasks: Iterable[tuple[Kernel, int]], workers: int, fusions: tuple[bool, ...] = (False,)
) -> list[dict[str, Any]]:
    """What came out for each kernel and card, without fusing or with. The compiler's own cache keeps it for the next
    run."""
    lines = "".join(
        json.dumps({**kernel._asdict(), "card": card, "fusion": fusion}) + "\n"
        for kernel, card in tasks for fusion in fusions
    )  # fmt: skip
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
    scaled = constants.get("KIND", DENSE) != DENSE and found["name"] in PRODUCTS
    assert (found["fused"] > 0) == scaled, f"{what}: {found['fused']} fused multiply-adds"


def one_of_each(found: list[Kernel]) -> list[Kernel]:
    """Of each kernel with each kind of weights and of tile the one with most switches on."""
    chosen: dict[Any, Kernel] = {}
    for kernel in found:
        constants = dict(kernel.constants)
        key = kernel.name, constants.get("KIND"), constants.get("BLOCK_M")
        if key not in chosen or switches(kernel) > switches(chosen[key]):
            chosen[key] = kernel
    return list(chosen.values())


def switches(kernel: Kernel) -> int:
    return sum(value is True for _, value in kernel.constants)


def test_a_share_compiles() -> None:
    """A kernel of each kind and switch, for one card each in turn, so that every card has some."""
    found = one_of_each(kernels(REPRESENTATIVE.items()))
    assert {kernel.name for kernel in found} >= PRODUCTS - {"expert_kernel"}
    tasks = [(kernel, list(SHARED)[i % len(SHARED)]) for i, kernel in enumerate(found)]
    results = compiled(tasks, 2)
    assert len(results) == len(tasks)
    for result in results:
        check(result)


def test_a_compiler_that_fuses_is_seen() -> None:
    """The control: with the default setting the same kernel has fused multiply-adds."""
    kernel = next(one for one in kernels(REPRESENTATIVE.items()) if one.name == "ple_kernel")
    plain, fused = sorted(compiled([(kernel, 90)], 1, (False, True)), key=lambda found: found["fusion"])
    assert plain["fused"] == 0 < fused["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("card", SHARED)
def test_everything_compiles(card: int) -> None:
    found = kernels((size, weights) for size in SIZES for weights in WEIGHTS)
    results = compiled([(kernel, card) for kernel in found], os.cpu_count() or 1)
    assert len(results) == len(found)
    for result in results:
        check(result)
