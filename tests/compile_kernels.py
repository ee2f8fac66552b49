"""Compiles kernels for cards that are not there, and says what came out. A process of its own: where the kernels are
interpreted, they can not be compiled.

Reads JSON lines from its input, one kernel for one card each, and writes one for each, in any order.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"


def compiled(task: dict[str, Any]) -> dict[str, Any]:
    """What a kernel is on a card: registers, stack, shared memory, instructions; or the error. `flushed`: how many take
    subnormal numbers for zero."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(task["module"]), task["name"])
    divisible = {(i,): [["tt.divisibility", 16]] for i in task["divisible"]}
    source = ASTSource(function, dict(task["types"]), {(function.arg_names.index(n),): v for n, v in task["constants"]},
                       divisible)  # fmt: skip
    options = {"num_warps": task["warps"], "num_stages": task["stages"], "enable_fp_fusion": task["fusion"]}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", task["card"], 32), options=options)
    except Exception as error:
        return {**task, "error": f"{type(error).__name__}: {error}"}
    ptx = made.asm["ptx"]
    return {
        **task, **_resources(made.asm["cubin"]), "shared": made.metadata.shared,
        "products": sorted(set(re.findall(r"\b(mma\.sync|wgmma|tcgen05)\S*\.(?:mma|m\d+|aligned)", ptx))),
        "fused": len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
        "flushed": len(re.findall(r"\b(?:add|sub|mul|fma)(?:\.\w+)*\.ftz\.f32", ptx)),
    }  # fmt: skip


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, as NVIDIA's tool reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


if __name__ == "__main__":
    tasks = [json.loads(line) for line in sys.stdin]
    for module in {task["module"] for task in tasks}:  # once, and not by each worker
        importlib.import_module(module)
    with multiprocessing.get_context("fork").Pool(int(sys.argv[1])) as pool:
        for found in pool.imap_unordered(compiled, tasks):
            print(json.dumps(found), flush=True)
