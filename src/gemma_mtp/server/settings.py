"""What a server is told at its start: its name, its keys and its limits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_mtp.errors import ServerError
from gemma_mtp.text import check_text, read_text

if TYPE_CHECKING:
    from gemma_mtp.decoding.draft_length import DraftTokens

#: where keys may stand, beside a file: separated by commas or white space
KEYS_VARIABLE = "GEMMA_MTP_API_KEYS"


@dataclass(frozen=True)
class ServerSettings:
    """How requests are taken and what they may ask for. Sizes are bytes, times seconds, numbers most that are allowed.

    api_keys             keys that are let in; empty: everybody is
    public_metrics       /metrics needs no key
    loopback_names_only  answer only requests whose Host is this machine's own name for itself
    allow_origins        origins of other sites' pages that browsers may let call this server
    draft_tokens         drafts a round where the request does not say
    max_prompt_tokens    of one prompt; None: what the engine takes
    max_output_tokens    of one choice; None: what the engine takes
    max_choices          n, and so are the prompts of a request times n, in all: `max_choices * max_prompts`
    max_concurrent       requests in work or waiting for the engine at a time
    request_seconds      from a request's headers to the end of its answer
    body_seconds         until a request's body has arrived
    drain_seconds        that running requests may go on after the signal to stop
    max_stored_responses of /v1/responses, in memory, and so many characters of all of them
    id_suffix            at the end of ids of responses and their items: which of several servers has them in memory
    metrics_prefix       before the names of metrics; vLLM's dashboards want `vllm:`
    log_text             write prompts and outputs to the log
    """

    model_name: str = "gemma-mtp-bundled"
    api_keys: tuple[str, ...] = ()
    public_metrics: bool = False
    loopback_names_only: bool = False
    allow_origins: tuple[str, ...] = ()
    draft_tokens: DraftTokens = "auto"
    max_body_bytes: int = 4 << 20
    max_headers: int = 100
    max_header_bytes: int = 32 << 10
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_choices: int = 16
    max_prompts: int = 64
    max_stop: int = 16
    max_stop_characters: int = 1000
    max_logit_bias: int = 1024
    max_tools: int = 128
    max_json_depth: int = 64
    max_concurrent: int = 256
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0
    max_stored_responses: int = 1000
    max_stored_characters: int = 64 << 20
    id_suffix: str = ""
    metrics_prefix: str = "gemma_mtp:"
    log_text: bool = False


def metrics_prefix(text: str, name: str) -> str:
    """The text, if it can be before the names of metrics. Raises ServerError, which names the option by `name`."""
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*[:_]", text):
        raise ServerError(f"{name} is {text!r}, but must be letters, digits and _, and end in : or _.")
    return text


def origin(text: str, name: str) -> str:
    """The text, if a browser may say it of a page's origin. Raises ServerError, which names the option by `name`."""
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", text):
        raise ServerError(
            f"{name} is {text!r}, but must be an origin as browsers write it, such as https://example.com, in lower"
            " case and without a path."
        )
    return text


def read_keys(file: Path | None, variable: str) -> tuple[str, ...]:
    """API keys of a file, one a line, and of the environment. Raises ServerError for a file without any."""
    keys = check_text(variable, f"the variable {KEYS_VARIABLE}", ServerError).replace(",", " ").split()
    if file is not None:
        lines = [line.strip() for line in read_text(file, "API key file", ServerError).splitlines()]
        keys += (found := [line for line in lines if line and not line.startswith("#")])
        if not found:
            raise ServerError(f"the API key file {file} has no keys; write one a line.")
    return tuple(dict.fromkeys(keys))
