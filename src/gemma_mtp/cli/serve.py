"""`gemma-mtp serve`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import above, group, grouped, option
from gemma_mtp.cli.options import DRAFTING, MODELS
from gemma_mtp.cli.progress import progress
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.errors import ServerError, missing_extra
from gemma_mtp.locate import BUNDLED, is_hub_name
from gemma_mtp.server.settings import KEYS_VARIABLE, ServerSettings, metrics_prefix, origin, read_keys
from gemma_mtp.text import check_text

LISTENING, ENGINE, LIMITS, LOGS = "Listening", "Engine", "Limits", "Logs"


@group(LISTENING)
class ListeningOptions:
    """Where the server listens, and whom it lets in."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    api_key_file: Path | None = option(
        None, f"File of API keys, one a line. {KEYS_VARIABLE} is another way to give them."
    )
    no_auth: bool = option(False, "Serve everybody who reaches the address, without keys.")
    public_metrics: bool = option(False, "Let /metrics be read without a key.")
    metrics_prefix: str = option(
        "gemma_mtp:", "What the names of metrics begin with. vLLM's dashboards want vllm: there."
    )
    allow_origin: list[str] | None = option(None, "Let web pages of this origin call the server. May be repeated.")


@group(ENGINE)
class EngineOptions:
    """The engine's settings."""

    max_running: int = option(EngineSettings.max_running, "Sequences that decode together.", check=above(0))
    max_waiting: int = option(
        EngineSettings.max_waiting, "Sequences that may wait. Requests for more get a 429.", check=above(0)
    )
    max_tokens: int | None = option(
        None, "Most tokens of a prompt and its output. Default: the model's context.", check=above(0)
    )
    kv_memory: int | None = option(
        None,
        "Megabytes for keys and values of all sequences. Default: by --max-running and what is free.",
        check=above(0),
    )
    no_prefix_reuse: bool = option(False, "Keep no keys and values for later prompts.")

    def settings(self) -> EngineSettings:
        return EngineSettings(
            max_running=self.max_running, max_waiting=self.max_waiting, max_tokens=self.max_tokens,
            kv_memory_mb=self.kv_memory, prefix_reuse=not self.no_prefix_reuse,
        )  # fmt: skip


@group(LIMITS)
class LimitOptions:
    """Limits of requests; the fields have ServerSettings' names."""

    max_body_bytes: int = option(ServerSettings.max_body_bytes, "Most bytes of a request's body.", check=above(0))
    max_prompt_tokens: int | None = option(None, "Most tokens of a prompt. Default: --max-tokens.", check=above(0))
    max_output_tokens: int | None = option(None, "Most tokens of an output. Default: --max-tokens.", check=above(0))
    max_choices: int = option(ServerSettings.max_choices, "Most choices (n) of a request.", check=above(0))
    max_prompts: int = option(ServerSettings.max_prompts, "Most prompts of a request.", check=above(0))
    max_concurrent: int = option(
        ServerSettings.max_concurrent, "Most requests at a time. More get a 429.", check=above(0)
    )
    request_seconds: float = option(600, "Most seconds that a request takes.", check=above(0))
    drain_seconds: float = option(30, "Most seconds that running requests go on after SIGTERM.")

    def check(self) -> None:
        if not 0 <= self.drain_seconds < math.inf:
            raise ServerError(f"--drain-seconds is {self.drain_seconds}, but must be 0 or more.")


@group(MODELS)
class ServedPair(options.PairOptions):
    """The pair that is served."""

    threads: int | None = option(None, "CPU threads. Default: all cores but one, which HTTP needs.")
    model_name: str | None = option(None, "What clients call the model. Default: the target's name.")


@group(DRAFTING)
class DraftingOptions:
    """How requests are drafted for."""

    draft_tokens: str = option("auto", "Drafts a round (K), where the request does not say: a number, or auto.", "-k")


@group(LOGS)
class LogOptions:
    """What is logged."""

    log_text: bool = option(False, "Log prompts and outputs too.")


@grouped
def serve(
    models: ServedPair,
    drafting: DraftingOptions,
    listening: ListeningOptions,
    engine_options: EngineOptions,
    limits: LimitOptions,
    logging: LogOptions,
) -> None:
    """Serve a pair over HTTP, by OpenAI's and Anthropic's APIs."""
    from gemma_mtp.sizes.machine import cores

    keys = read_keys(listening.api_key_file, os.environ.get(KEYS_VARIABLE, ""))
    options.use_threads(max(1, cores() - 1) if models.threads is None else models.threads)
    models.check()
    limits.check()
    try:
        from gemma_mtp.server import logs, run
        from gemma_mtp.server.service import Service
    except ModuleNotFoundError as error:
        raise ServerError(missing_extra("serve", error.name, "serve")) from None
    if not keys and not listening.no_auth and not run.is_loopback(listening.host):
        raise ServerError(
            f"without API keys everybody who reaches {listening.host} could use the server; give --api-key-file, or"
            " --no-auth to serve them all."
        )
    settings = _settings(keys, models, drafting, listening, limits, logging)
    from gemma_mtp.decoding.params import SamplingParams
    from gemma_mtp.engine.thread import EngineThread

    with run.listen(listening.host, listening.port) as listener:
        pair = models.load()
        pair.check(SamplingParams(), settings.draft_tokens, "exact")
        engine = EngineThread(pair, engine_options.settings())
        with progress("measuring what rounds cost"):
            engine.warm_up()
        with engine:
            logs.configure()
            said = (
                f"serving {settings.model_name} at {run.url(listener)}: {engine.max_tokens} tokens a request,"
                f" {engine_options.max_running} sequences at a time, {engine_options.max_waiting} waiting,"
                f" {f'{len(keys)} API keys' if keys else 'no API keys'}"
            )
            if sys.stdout.isatty():
                said += f"\nOpen {run.page_url(listener)} , Ctrl-C stops."
            run.run(Service(engine, settings), listener, lambda: print(said, flush=True))


def _settings(
    keys: tuple[str, ...],
    models: ServedPair,
    drafting: DraftingOptions,
    listening: ListeningOptions,
    limits: LimitOptions,
    logging: LogOptions,
) -> ServerSettings:
    return ServerSettings(
        model_name=check_text(models.model_name or _default_name(models.target), "the model's name", ServerError),
        api_keys=keys, public_metrics=listening.public_metrics,
        metrics_prefix=metrics_prefix(listening.metrics_prefix, "--metrics-prefix"),
        loopback_names_only=not keys and not listening.no_auth,
        allow_origins=tuple(origin(text, "--allow-origin") for text in listening.allow_origin or ()),
        log_text=logging.log_text,
        draft_tokens=options.parse_draft_tokens(drafting.draft_tokens), **vars(limits),
    )  # fmt: skip


def _default_name(target: Path | None) -> str:
    if target is None or (str(target) == BUNDLED and not target.exists()):
        return "gemma-mtp-bundled"
    return str(target) if is_hub_name(str(target)) and not target.exists() else target.resolve().name
