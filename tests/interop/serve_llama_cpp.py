"""llama.cpp's server, of the wheel xllamacpp, with llama-server's own arguments as the recipe gives them.

Prints its address and serves until its input is closed. `--float32` keeps keys and values, and sums, as float32.
"""

import argparse
import sys

import xllamacpp as llama

parser = argparse.ArgumentParser()
parser.add_argument("-m", required=True)
parser.add_argument("-md")
parser.add_argument("--spec-type", choices=["draft-mtp"])
parser.add_argument("--spec-draft-n-max", type=int, default=3)
parser.add_argument("-c", type=int, default=512)
parser.add_argument("-np", type=int, default=1)
parser.add_argument("-t", type=int, default=2)
parser.add_argument("--jinja", action="store_true")
parser.add_argument("--float32", action="store_true")
asked = parser.parse_args()

params = llama.CommonParams()
params.model.path = asked.m
params.n_ctx, params.n_parallel, params.use_jinja, params.warmup = asked.c, asked.np, asked.jinja, False
params.cpuparams.n_threads = asked.t
if asked.spec_type is not None:
    params.speculative.types = [llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    params.speculative.draft.mparams.path = asked.md
    params.speculative.draft.n_max = asked.spec_draft_n_max
if asked.float32:
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
server = llama.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
