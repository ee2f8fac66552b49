"""`gemma-mtp identity`: its options, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemma_mtp.cli import options
from gemma_mtp.cli.bench_serve import SERVER, check_client, numbers
from gemma_mtp.cli.option_groups import REQUIRED, above, argument, at_least, group, grouped, option, then
from gemma_mtp.cli.options import DATA, OUTPUT, SAMPLING
from gemma_mtp.errors import DataError, OptionError


@group(SERVER)
class Servers:
    """The servers, and how drafting is turned off and on."""

    url: str = argument(REQUIRED, "A server with OpenAI's API, such as http://127.0.0.1:8000. Of two, the plain one.")
    second: str | None = argument(None, "Another server, which drafts. Default: the same one, with other requests.")
    off: str | None = option(
        None,
        "Fields of the plain side's requests, as JSON. Default: '{\"draft_tokens\": 0}'; none for two servers.",
        metavar="JSON",
    )
    on: str = option("{}", "Fields of the drafted side's requests, as JSON.", metavar="JSON")
    api_key: str | None = option(None, "Sent as a bearer token.", envvar="GEMMA_MTP_API_KEY")
    model: str | None = option(None, "The model to ask for. Default: each server's first.")

    def fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What requests of the plain and of the drafted side say beside each other's. Raises OptionError."""
        default = "{}" if self.second is not None else '{"draft_tokens": 0}'
        off, on = _object("--off", self.off or default), _object("--on", self.on)
        if self.second is None and off == on:
            raise OptionError(
                "--off and --on are equal, and so would both sides be; give fields that turn drafting off."
            )
        return off, on


@group(DATA)
class IdentityPrompts(options.ExampleOptions):
    """Which prompts are asked."""

    data: list[Path] | None = option(
        None,
        "JSON lines with text, prompt or messages, plain text, source files, or directories of them. May be repeated."
        " Default: the bundled pair's held-out Python.",
    )
    limit: int = option(20, options.LIMIT, check=at_least(1))
    cut: str | None = option(None, "Cut texts to so many characters. 40,200,800 asks with three lengths.")

    def lengths(self) -> list[int] | None:
        return None if self.cut is None else numbers("--cut", self.cut, int, "40,200,800")


@group(SAMPLING)
class IdentityRequests:
    """How prompts are asked."""

    clients: str = option("1,4", "Requests at a time. 1,4 asks with one, then with four.")
    repeats: int = option(2, "Times that each side is asked each prompt.", check=above(0))
    max_tokens: int = option(64, "Tokens to ask for.", "-n", check=above(0))
    temperature: float = option(0.0, "0 is greedy. Above it, prompt i is sampled with seed i.", "-t")
    timeout: float = option(600.0, "Seconds after which a request has failed.", check=above(0))

    def levels(self) -> list[int]:
        return numbers("--clients", self.clients, int, "1,4,16")


@group(OUTPUT)
class IdentityOutput:
    """How it is shown."""

    plot: Path | None = options.plot("what was found")
    as_json: bool = option(False, options.JSON, "--json")


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise DataError(f"{name} is {text!r}, but must be a JSON object, such as '{{\"draft_tokens\": 0}}'.")
    return read


@grouped
@then("identity_run")
def identity(servers: Servers, prompts: IdentityPrompts, asked: IdentityRequests, output: IdentityOutput) -> None:
    """Ask one server with drafting on and off, or two servers, and say whether their outputs are identical.

    Where they differ: at which token, how close the two tokens were, and whether each side repeats its own output.
    Exits with 1 where outputs differ or requests failed.
    """
    servers.fields(), asked.levels(), prompts.lengths()  # which refuse what can not be asked
    check_client("identity")
