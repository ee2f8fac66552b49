"""`gemma-mtp bench-serve`: its options, and what can be wrong with them."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_mtp.cli import options
from gemma_mtp.cli.option_groups import above, argument, at_least, group, grouped, option, then
from gemma_mtp.cli.options import DATA, DRAFTING, OUTPUT, SAMPLING
from gemma_mtp.errors import DataError, SamplingError, ServerError, missing_extra

if TYPE_CHECKING:
    from gemma_mtp.measure.load import Extent, Shape

Number = TypeVar("Number", int, float)

SERVER, LOAD = "Server", "Load"
REQUESTS = 100


@group(SERVER)
class ServerOptions:
    """The server that is loaded."""

    url: str | None = option(
        None,
        "A running server with OpenAI's API, such as http://127.0.0.1:8000. Default: a `gemma-mtp serve` that is"
        " started on a free port, and stopped at the end.",
    )
    api_key: str | None = option(None, "Sent as a bearer token.", envvar="GEMMA_MTP_API_KEY")
    model: str | None = option(None, "The model to ask for. Default: the server's first.")
    serve_options: str = option(
        "", "Without --url: options of the server that is started, such as '--target DIR --max-running 32'."
    )

    def check(self) -> None:
        if self.url is not None and self.serve_options:
            raise ServerError("--serve-options are for a server that is started here; leave them out with --url.")
        self.words()

    def words(self) -> list[str]:
        """--serve-options, split as a shell does. Raises ServerError."""
        try:
            return shlex.split(self.serve_options)
        except ValueError as error:
            raise ServerError(
                f"--serve-options is {self.serve_options!r}, which can not be split into words ({error})."
            ) from None


@group(LOAD)
class LoadOptions:
    """When requests are sent, and how many."""

    rate: str | None = option(None, "Open loop: requests a second. 1,2,4,8 plays four loads.")
    clients: str | None = option(
        None,
        "Closed loop: clients, each with one request under way. 1,4,16 plays three loads. Default without --rate: 1.",
    )
    fixed_intervals: bool = option(False, "Equal gaps instead of Poisson arrivals.", needs="--rate")
    requests: int | None = option(
        None, f"Requests of each load. Default: {REQUESTS}, or what --duration allows.", check=above(0)
    )
    duration: float | None = option(None, "Seconds in which each load sends requests.", check=above(0))
    warmup: int = option(4, "First requests of each load, which are not counted.", check=at_least(0))
    repeats: int = option(1, "Runs of each load. The sides of --compare-drafting take turns.", check=above(0))
    max_in_flight: int | None = option(
        None, "Most requests under way. Others wait, and their wait counts.", needs="--rate", check=above(0)
    )
    timeout: float = option(600.0, "Seconds after which a request has failed.", check=above(0))
    seed: int = option(0, "For arrivals, order of prompts, lengths and sampling.", check=at_least(0))

    def shapes(self) -> list[Shape]:
        """The loads to play. Raises SamplingError."""
        from gemma_mtp.measure.load import ClosedLoop, OpenLoop

        if self.rate is not None and self.clients is not None:
            raise SamplingError("--rate and --clients are loads of two kinds; give one of them.")
        if self.rate is not None:
            return [OpenLoop(v, self.fixed_intervals) for v in numbers("--rate", self.rate, float, "0.5,1,2")]
        clients = "1" if self.clients is None else self.clients
        return [ClosedLoop(value) for value in numbers("--clients", clients, int, "1,4,16")]

    def extent(self) -> Extent:
        from gemma_mtp.measure.load import Extent

        requests = REQUESTS if self.requests is None and self.duration is None else self.requests
        return Extent(requests, self.duration, self.warmup)


@group(DATA)
class PromptOptions(options.ExampleOptions):
    """Which prompts are sent, and what they begin with."""

    data: list[Path] | None = argument(
        None,
        "JSON lines with text, prompt or messages, plain text, source files, or directories of them. Texts are"
        " completed; prompts and messages are sent as chats. Default: the bundled pair's held-out Python.",
    )
    limit: int = option(1000, options.LIMIT, check=at_least(1))
    shared_prefix_tokens: int = option(
        0,
        "Begin all prompts with the same text of about so many tokens. Needs the server's /tokenize.",
        check=at_least(0),
    )
    fresh: bool = option(
        True,
        "Whether each prompt begins with a line of its own, after a shared prefix, so that the server has kept nothing"
        " of it.",
        "--fresh-prompts/--same-prompts",
    )


@group(SAMPLING)
class RequestOptions:
    """What requests ask for."""

    output_tokens: str = option("128", "Tokens to ask for: a number, or a range such as 32-128.", "-n")
    temperature: float = option(0.0, "0 is greedy.", "-t")
    top_p: float | None = option(None, "Sent where given.")
    top_k: int | None = option(None, "Sent where given; an extension of OpenAI's API.")
    ignore_eos: bool = option(
        True,
        "Whether outputs have just the length asked for. Sends ignore_eos, which not every server knows.",
        "--ignore-eos/--stop-at-eos",
    )

    def settings(self) -> dict[str, Any]:
        """Fields of every request's body; what is out of its range is the server's to refuse."""
        optional = {"top_p": self.top_p, "top_k": self.top_k, "ignore_eos": self.ignore_eos or None}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"temperature": self.temperature, **given}

    def lengths(self) -> tuple[int, int]:
        """The least and the most tokens to ask for. Raises SamplingError."""
        parts = self.output_tokens.split("-")
        if not all(part.isdecimal() for part in parts) or len(parts) > 2 or not 0 < int(parts[0]) <= int(parts[-1]):
            raise SamplingError(
                f"--output-tokens is {self.output_tokens!r}, but must be a number or a range, such as 64 or 32-128."
            )
        return int(parts[0]), int(parts[-1])


@group(DRAFTING)
class DraftingOptions:
    """How requests ask for drafts."""

    draft_tokens: str | None = option(
        None, "Drafts a round (K): a number, or auto. Sent as draft_tokens, which gemma-mtp knows.", "-k"
    )
    compare_drafting: bool = option(False, "Play each load without drafts and with them, in turn.")

    def sides(self) -> dict[str, dict[str, Any]]:
        """Label of each side, and what its requests say beside the others'."""
        given = None if self.draft_tokens is None else options.parse_draft_tokens(self.draft_tokens)
        if not self.compare_drafting:
            return {"": {} if given is None else {"draft_tokens": given}}
        if given == 0:
            raise SamplingError(
                "--draft-tokens is 0, which --compare-drafting compares with; give auto or another number."
            )
        drafts = "auto" if given is None else given
        return {"no drafts": {"draft_tokens": 0}, f"drafts {drafts}": {"draft_tokens": drafts}}


@group(OUTPUT)
class OutputOptions:
    """What is written, and what counts as a failure."""

    as_json: Path | None = option(None, "Write all figures to this file.", "--json")
    records: bool = option(False, "Every request's times and counts too.", needs="--json")
    plot: Path | None = options.plot("latencies and throughput")
    max_failed: float = option(
        0.01,
        "Exit with 1 where more than this share of requests failed, or none was completed. Refusals with Retry-After"
        " are no failures.",
    )

    def check(self) -> None:
        if self.as_json is not None and self.as_json.is_dir():
            raise DataError(f"--json is {self.as_json}, which is a directory; name a file.")
        if not 0 <= self.max_failed <= 1:
            raise SamplingError(f"--max-failed is {self.max_failed:g}, but must be a share from 0 to 1.")


def numbers(name: str, text: str, kind: Callable[[str], Number], example: str) -> list[Number]:
    """What an option with numbers, divided by commas, says. Raises SamplingError."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise SamplingError(f"{name} is {text!r}, but must be numbers above 0, such as {example}.")
    return list(dict.fromkeys(values))


def check_client(needed_by: str) -> None:
    """Raises ServerError where what asks servers is not installed."""
    if missing := [name for name in ("httpx", "httpx_aiohttp") if importlib.util.find_spec(name) is None]:
        raise ServerError(missing_extra(needed_by, missing[0], "bench-serve"))


@grouped
@then("bench_serve_run")
def bench_serve(
    server: ServerOptions,
    load: LoadOptions,
    prompts: PromptOptions,
    asked: RequestOptions,
    drafting: DraftingOptions,
    output: OutputOptions,
) -> None:
    """Load a server with requests, and measure latencies, throughput, failures and acceptance."""
    output.check()
    server.check()
    load.shapes(), drafting.sides()  # which refuse what can not be played
    asked.lengths()
    check_client("bench-serve")
