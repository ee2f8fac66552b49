"""llama.cpp decoding greedily by its C API, plain or drafted, as a process that answers requests (requests_loop.py).

    python benchmarks/llama_cpp_decoder.py --model T.gguf --drafter D.gguf --threads 2

The round is that of llama.cpp's own `draft-mtp` (common/speculative.cpp): one constant position, the target's keys and
values. LLAMA_CPP_LIB_PATH names another build of the library than the installed one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import sys
from typing import Any

import llama_cpp as llama
import numpy as np
from llama_cpp import llama_cpp_ext as extension
from requests_loop import answer_requests

GGML_LOG_ERROR = 4


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    if level == GGML_LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Context:
    """A model and its context, which keeps one sequence."""

    def __init__(self, path: str, threads: int, length: int, target: Context | None = None) -> None:
        params = llama.llama_model_default_params()
        self.context: Any = None
        self.model = llama.llama_model_load_from_file(path.encode(), params)
        if self.model is None:
            raise SystemExit(f"llama.cpp can not load {path}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = length, threads, threads
        options.no_perf = True
        if target is not None:
            options.ctx_type, options.ctx_other = llama.LLAMA_CONTEXT_TYPE_MTP, target.context
        self.context = llama.llama_init_from_model(self.model, options)
        if self.context is None:
            raise SystemExit(f"llama.cpp can not make a context for {path}")
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.hidden_size = llama.llama_model_n_embd_out(self.model)

    def best(self, row: int) -> int:
        """The arg max of the last call's logits in a row of its batch."""
        logits = llama.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def hidden(self, row: int) -> Any:
        """The state after the final norm that drafting goes on from; overwritten by the next call."""
        return extension.llama_get_embeddings_nextn_ith(self.context, row)


class Target(Context):
    def __init__(self, path: str, threads: int, length: int) -> None:
        super().__init__(path, threads, length)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(length, 0, 1)

    def decode(self, tokens: list[int], position: int, all_rows: bool = True) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
            batch.logits[i] = all_rows or i == len(tokens) - 1
        if code := llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode returned {code}")

    def keep(self, length: int) -> None:
        llama.llama_memory_seq_rm(self.memory, 0, length, -1)


class Drafter(Context):
    def __init__(self, path: str, threads: int, length: int, target: Target) -> None:
        super().__init__(path, threads, length, target)
        extension.llama_set_embeddings_nextn(self.context, True, True)
        self.batch = llama.llama_batch_ext_init(self.context)

    def draft(self, token: int, hidden: Any, position: int, count: int) -> list[int]:
        drafts: list[int] = []
        place = llama.llama_pos(position)
        for _ in range(count):
            llama.llama_batch_ext_clear(self.batch)
            row = llama.llama_batch_ext_add_token(self.batch, 0, drafts[-1] if drafts else token)
            state = llama.llama_embd(hidden, 1, self.hidden_size)
            llama.llama_batch_ext_set_embd_token(self.batch, row, state)
            llama.llama_batch_ext_set_pos(self.batch, row, ctypes.byref(place))
            llama.llama_batch_ext_set_output_logits(self.batch, row, True)
            if code := llama.llama_process(self.context, llama.LLAMA_PROCESS_TYPE_DECODE, self.batch):
                raise SystemExit(f"llama_process of the drafter returned {code}")
            drafts.append(self.best(row))
            hidden = self.hidden(row)
        return drafts


def generate(
    target: Target, drafter: Drafter | None, prompt: list[int], max_tokens: int, draft_tokens: int
) -> dict[str, Any]:
    # plain decoding does not pay for the states that drafting needs
    extension.llama_set_embeddings_nextn(target.context, draft_tokens > 0, False)
    target.keep(0)
    target.decode(prompt, 0, all_rows=False)
    row, length = len(prompt) - 1, len(prompt)
    tokens, rounds = [target.best(row)], []
    while len(tokens) < max_tokens:
        drafts: list[int] = []
        if (count := min(draft_tokens, max_tokens - len(tokens) - 1)) and drafter is not None:
            drafts = drafter.draft(tokens[-1], target.hidden(row), length, count)
        target.decode([tokens[-1], *drafts], length)
        committed = verified(target, drafts)
        row = len(committed) - 1
        length += len(committed)
        if drafts:
            target.keep(length)
        tokens += committed
        rounds.append([len(drafts), len(committed)])
    return {"tokens": tokens, "rounds": rounds}


def verified(target: Target, drafts: list[int]) -> list[int]:
    """The target's own tokens, up to the first that is not the draft."""
    committed: list[int] = []
    for row in range(len(drafts) + 1):
        committed.append(target.best(row))
        if row == len(drafts) or committed[-1] != drafts[row]:
            break
    return committed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", help="none decodes plainly")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    llama.llama_log_set(_log, None)
    llama.llama_backend_init()
    target = Target(args.model, args.threads, args.context)
    drafter = None if args.drafter is None else Drafter(args.drafter, args.threads, args.context, target)
    about = {"version": llama.__version__, "system": llama.llama_print_system_info().decode()}
    answer_requests(about, functools.partial(generate, target, drafter))


if __name__ == "__main__":
    main()
