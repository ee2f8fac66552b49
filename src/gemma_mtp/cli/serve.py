"""`gemma-mtp serve`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

from gemma_mtp.cli import options
from gemma_mtp.cli.generate import parse_draft_tokens
from gemma_mtp.cli.options import DRAFTING, MODELS, option
from gemma_mtp.cli.progress import progress
from gemma_mtp.decoding.sampling import SamplingParams
from gemma_mtp.engine.pair import load_pair
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import PromptError, ServerError
from gemma_mtp.server.settings import KEYS_VARIABLE, ServerSettings, read_keys
from gemma_mtp.text import check_text

LISTENING, ENGINE, LIMITS, LOGS = "Listening", "Engine", "Limits", "Logs"


def serve(
    target: options.Target = None,
    drafter: options.Drafter = None,
    no_drafter: options.NoDrafter = False,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    strict: options.Strict = False,
    device: options.Device = "auto",
    threads: Annotated[
        int | None, option("--threads", help="CPU threads; default: all cores but one, which HTTP needs.", panel=MODELS)
    ] = None,
    model_name: Annotated[
        str | None,
        option("--model-name", help="What clients call the model; default: the target directory's name.", panel=MODELS),
    ] = None,
    draft_tokens: Annotated[
        str,
        option("--draft-tokens", "-k", help="Drafts a round, where the request does not say.", panel=DRAFTING),
    ] = "auto",
    host: Annotated[str, option("--host", help="Address to listen on.", panel=LISTENING)] = "127.0.0.1",
    port: Annotated[int, option("--port", help="0 takes a free one.", panel=LISTENING)] = 8000,
    api_key_file: Annotated[
        Path | None,
        option("--api-key-file", help=f"Keys that are let in, one a line; or set {KEYS_VARIABLE}.", panel=LISTENING),
    ] = None,
    no_auth: Annotated[
        bool, option("--no-auth", help="Serve everybody who reaches the address, without a key.", panel=LISTENING)
    ] = False,
    public_metrics: Annotated[
        bool, option("--public-metrics", help="Let /metrics be read without a key.", panel=LISTENING)
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        option("--allow-origin", help="Let pages of this origin call the server; may be repeated.", panel=LISTENING),
    ] = None,
    max_running: Annotated[
        int, option("--max-running", help="Sequences that decode together.", panel=ENGINE)
    ] = EngineSettings.max_running,
    max_waiting: Annotated[
        int, option("--max-waiting", help="Sequences that may wait; more are answered 429.", panel=ENGINE)
    ] = EngineSettings.max_waiting,
    max_tokens: Annotated[
        int | None,
        option("--max-tokens", help="Prompt and output; default: the model's context.", panel=ENGINE),
    ] = None,
    kv_memory: Annotated[
        int | None, option("--kv-memory", help="Megabytes of keys and values of all sequences.", panel=ENGINE)
    ] = None,
    no_prefix_reuse: Annotated[
        bool, option("--no-prefix-reuse", help="Keep no keys and values for later prompts.", panel=ENGINE)
    ] = False,
    max_body_bytes: Annotated[int, option("--max-body-bytes", help="Of a request's body.", panel=LIMITS)] = 4 << 20,
    max_prompt_tokens: Annotated[
        int | None, option("--max-prompt-tokens", help="Of one prompt; default: --max-tokens.", panel=LIMITS)
    ] = None,
    max_output_tokens: Annotated[
        int | None, option("--max-output-tokens", help="Of one choice; default: --max-tokens.", panel=LIMITS)
    ] = None,
    max_choices: Annotated[int, option("--max-choices", help="n of a request.", panel=LIMITS)] = 16,
    max_prompts: Annotated[int, option("--max-prompts", help="Prompts of a request.", panel=LIMITS)] = 64,
    max_concurrent: Annotated[
        int, option("--max-concurrent", help="Requests at a time; more are answered 429.", panel=LIMITS)
    ] = 256,
    request_seconds: Annotated[float, option("--request-seconds", help="That a request may take.", panel=LIMITS)] = 600,
    drain_seconds: Annotated[
        float, option("--drain-seconds", help="That running requests may go on after SIGTERM.", panel=LIMITS)
    ] = 30,
    log_text: Annotated[bool, option("--log-text", help="Log prompts and outputs, too.", panel=LOGS)] = False,
) -> None:
    """Serve the pair over HTTP, as OpenAI's API. Without --target, the bundled pair."""
    keys = read_keys(api_key_file, os.environ.get(KEYS_VARIABLE, ""))
    options.use_threads(max(1, (os.cpu_count() or 1) - 1) if threads is None else threads)
    if no_drafter and drafter is not None:
        raise PromptError("--drafter and --no-drafter exclude each other; give one of them.")
    _check_positive(
        max_running=max_running, max_waiting=max_waiting, max_tokens=max_tokens, kv_memory=kv_memory,
        max_body_bytes=max_body_bytes, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens,
        max_choices=max_choices, max_prompts=max_prompts, max_concurrent=max_concurrent,
        request_seconds=request_seconds,
    )  # fmt: skip
    if not 0 <= drain_seconds < math.inf:
        raise ServerError(f"--drain-seconds is {drain_seconds}, but must be 0 or more.")
    try:
        from gemma_mtp.server import logs, run
        from gemma_mtp.server.service import Service
    except ModuleNotFoundError as error:
        raise ServerError(f"serving needs {error.name}; install it with: pip install 'gemma-mtp[serve]'.") from None
    if not keys and not no_auth and not run.is_loopback(host):
        raise ServerError(
            f"without API keys everybody who reaches {host} could use the server; give --api-key-file, or --no-auth to"
            " serve them all."
        )
    settings = ServerSettings(
        model_name=check_text(model_name or _default_name(target), "the model's name", ServerError),
        api_keys=keys, public_metrics=public_metrics, loopback_names_only=not keys and not no_auth,
        allow_origins=tuple(allow_origin or ()), draft_tokens=parse_draft_tokens(draft_tokens),
        max_body_bytes=max_body_bytes, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens,
        max_choices=max_choices, max_prompts=max_prompts, max_concurrent=max_concurrent,
        request_seconds=request_seconds, drain_seconds=drain_seconds, log_text=log_text,
    )  # fmt: skip
    engine_settings = EngineSettings(
        max_running=max_running, max_waiting=max_waiting, max_tokens=max_tokens, kv_memory_mb=kv_memory,
        prefix_reuse=not no_prefix_reuse,
    )  # fmt: skip
    with run.listen(host, port) as listener:
        with progress("loading"):
            pair = load_pair(
                target, drafter, dtype=dtype, device=device, use_drafter=not no_drafter, quantize=quantize,
                strict=strict,
            )  # fmt: skip
        pair.check(SamplingParams(), settings.draft_tokens, "exact")
        engine = EngineThread(pair, engine_settings)
        with progress("measuring what rounds cost"):
            engine.warm_up()
        with engine:
            logs.configure()
            run.run(Service(engine, settings), listener, lambda: print(
                f"serving {settings.model_name} at {run.url(listener)}: {engine.max_tokens} tokens a request,"
                f" {max_running} sequences at a time, {max_waiting} waiting,"
                f" {f'{len(keys)} API keys' if keys else 'no API keys'}",
                flush=True,
            ))  # fmt: skip


def _default_name(target: Path | None) -> str:
    return "gemma-mtp-bundled" if target is None else target.resolve().name


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ServerError(f"--{name.replace('_', '-')} is {value}, but must be above 0.")
