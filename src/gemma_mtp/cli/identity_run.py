"""What `gemma-mtp identity` does: ask, compare, and report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import typer
from rich.console import Console

from gemma_mtp.cli import options
from gemma_mtp.cli.console import console, plain_table, print_table, say
from gemma_mtp.cli.identity import IdentityOutput, IdentityPrompts, IdentityRequests, Servers
from gemma_mtp.cli.progress import progress
from gemma_mtp.datasets import Example
from gemma_mtp.errors import ServerError
from gemma_mtp.measure.figure import measured_on
from gemma_mtp.measure.identity import Compared, Group, drafts_made, groups
from gemma_mtp.measure.identity_client import Side, compare
from gemma_mtp.measure.identity_plot import plot_identity
from gemma_mtp.measure.load_client import connect, first_model
from gemma_mtp.measure.load_requests import RequestMix

#: exit code where outputs differ or requests failed
DIFFERENT = 1
#: partings shown in the table; JSON has all
MOST_SHOWN = 20


def identity(servers: Servers, prompts: IdentityPrompts, asked: IdentityRequests, output: IdentityOutput) -> None:
    """Ask both sides, and print what was found."""
    examples = _cut(prompts.examples(options.sources_of(prompts.data)), prompts.lengths())
    with progress("asking") as say:
        compared = asyncio.run(_ask(servers, examples, asked, say))
    if all(one.failed for one in compared):
        raise ServerError(f"every prompt failed ({compared[0].failed[0]}); check the servers, --off, --on and --model.")
    notes = _drafting(compared, one_server=servers.second is None)
    if output.plot is not None:
        where = servers.url if servers.second is None else f"{servers.url} and {servers.second}"
        plot_identity(compared, output.plot, measured_on(servers.model or "first model", f"asked at {where}"))
    found = groups(compared)
    if output.as_json:
        print(json.dumps(_content(servers, asked, compared, found, notes)))
    else:
        _print(console(), compared, found, notes)
    if not all(one.identical and not one.failed for one in compared):
        raise typer.Exit(DIFFERENT)


def _cut(examples: Sequence[Example], lengths: Sequence[int] | None) -> list[Example]:
    """Texts at each length; what is shorter is taken once, and prompts and messages as they are."""
    found: dict[tuple[Any, ...], Example] = {}
    for example in examples:
        for length in (None,) if lengths is None else lengths:
            cut = example.kind == "text" and length is not None
            one = replace(example, content=str(example.content)[:length]) if cut else example
            found.setdefault((example.origin, str(one.content)), one)
    return list(found.values())


async def _ask(
    servers: Servers, examples: Sequence[Example], asked: IdentityRequests, say: Callable[[str], object]
) -> list[Compared]:
    off, on = servers.fields()
    settings = {"temperature": asked.temperature}
    async with (
        connect(servers.url, servers.api_key, option="URL") as plain,
        connect(servers.second or servers.url, servers.api_key, option="URL2") as drafted,
    ):
        without, drafting = [
            Side(client, await first_model(client) if servers.model is None else servers.model, fields)
            for client, fields in ((plain, off), (drafted, on))
        ]
        mix = RequestMix(examples, without.model, (asked.max_tokens, asked.max_tokens), settings, fresh=False)
        found = []
        for clients in asked.levels():
            found += await compare(without, drafting, mix, clients, asked.repeats, asked.timeout, say)
        return found


def _drafting(compared: Sequence[Compared], one_server: bool) -> list[str]:
    """What is to be said of drafts. Raises ServerError where one server drafted on both sides, or on none."""
    plain, drafted = (drafts_made(compared, side) for side in ("plain", "drafted"))
    if one_server and plain:
        raise ServerError(f"the plain side made {plain} drafts; give fields by --off that turn drafting off.")
    if one_server and drafted == 0:
        raise ServerError("the drafted side made no drafts, so nothing was compared; give the server a drafter.")
    notes = []
    if plain is None:
        notes.append("the plain side does not report drafts: whether it drafted is not known")
    elif plain:
        notes.append(f"the plain side made {plain} drafts")
    if drafted is None:
        notes.append("the drafted side does not report drafts: whether it drafted is not known")
    else:
        notes.append(f"the drafted side made {drafted} drafts")
    return notes


def _content(
    servers: Servers, asked: IdentityRequests, compared: Sequence[Compared], found: Sequence[Group], notes: list[str]
) -> dict[str, Any]:
    off, on = servers.fields()
    whole = [one for one in compared if not one.failed]
    return {
        "urls": [servers.url, servers.second or servers.url], "off": off, "on": on, "repeats": asked.repeats,
        "max_tokens": asked.max_tokens, "temperature": asked.temperature,
        "identical": sum(one.identical for one in whole) / len(whole),
        "failed": len(compared) - len(whole), "notes": notes,
        "drafts": {side: drafts_made(compared, side) for side in ("plain", "drafted")},
        "groups": [asdict(group) for group in found], "prompts": [one.to_dict() for one in compared],
    }  # fmt: skip


def _print(out: Console, compared: Sequence[Compared], found: Sequence[Group], notes: Sequence[str]) -> None:
    whole = [one for one in compared if not one.failed]
    same = sum(one.identical for one in whole)
    say(out, f"identical outputs: {same} of {len(whole)} ({same / len(whole):.1%})", "bold")
    columns = ("at a time", "prompt tokens", "prompts", "identical", "plain repeats", "drafted repeats", "failed")
    table = plain_table(*columns, words=0)
    for group in found:
        counts = (group.identical, group.plain_repeatable, group.drafted_repeatable)
        shares = (f"{count / group.prompts:.1%}" if group.prompts else "-" for count in counts)
        table.add_row(
            str(group.clients), f"{group.shortest}-{group.longest}", str(group.prompts), *shares, str(group.failed)
        )
    print_table(out, table)
    parted = [one for one in whole if not one.identical]
    for one in parted[:MOST_SHOWN]:
        say(out, _parting(one))
    if len(parted) > MOST_SHOWN:
        say(out, f"and {len(parted) - MOST_SHOWN} more, which --json has")
    for error in sorted({error for one in compared for error in one.failed}):
        say(out, f"failed: {error}")
    for note in notes:
        say(out, note)


def _parting(one: Compared) -> str:
    assert one.parting is not None
    found, text = (
        one.parting,
        f"prompt {one.prompt}, {one.clients} at a time: parts at character {one.parting.character}",
    )
    if found.token is None:
        why = "no log-probabilities" if found.reproduced is None else "not said again when asked for log-probabilities"
        return f"{text} ({why})"
    text += f", token {found.token}: {found.plain_token!r}"
    if found.margin is None:
        return f"{text}, the other token not among its likeliest"
    return f"{text}, drafted {found.drafted_token!r}, margin {found.margin:.3f} nats"
