"""`gemma-mtp identity`."""

from __future__ import annotations

import importlib.util

from gemma_mtp.cli.bench_serve_options import check_numbers
from gemma_mtp.cli.identity_options import IdentityOutput, IdentityPrompts, IdentityRequests, Servers
from gemma_mtp.cli.option_groups import grouped
from gemma_mtp.errors import ServerError, missing_extra


@grouped
def identity(servers: Servers, prompts: IdentityPrompts, asked: IdentityRequests, output: IdentityOutput) -> None:
    """Ask one server with drafting on and off, or two servers, and say whether their outputs are identical.

    Where they differ: at which token, how close the two tokens were, and whether each side repeats its own output.
    Exits with 1 where outputs differ or requests failed.
    """
    output.check()
    check_numbers(limit=prompts.limit, repeats=asked.repeats, max_tokens=asked.max_tokens, timeout=asked.timeout)
    servers.fields(), asked.levels(), prompts.lengths()  # which refuse what can not be asked
    if missing := [name for name in ("httpx", "httpx_aiohttp") if importlib.util.find_spec(name) is None]:
        raise ServerError(missing_extra("identity", missing[0], "bench-serve"))

    from gemma_mtp.cli import identity_run

    identity_run.identity(servers, prompts, asked, output)
