"""Requests made up from the server's own description: no server error, no answer that it does not describe."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live_server import SECONDS, Live, serving, wait_for
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from table_models import table_pair

from gemma_mtp.engine.pair import load_pair

#: short outputs, so that the time goes into requests
LIMITS: dict[str, Any] = {"max_output_tokens": 6, "max_choices": 2}
#: of each operation; the fuzzing of a release is `GEMMA_MTP_FUZZ=500 pytest tests/test_server_fuzz.py`
CASES, FEW = (int(os.environ.get("GEMMA_MTP_FUZZ", default)) for default in (4, 1))
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
POSTED = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenize", "/detokenize",
)  # fmt: skip


@pytest.fixture(scope="module", params=["bundled", "table"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    """A model that completes text, and one that knows tools and thoughts."""
    with serving(load_pair() if request.param == "bundled" else table_pair(), **LIMITS) as live:
        yield live


@pytest.fixture(scope="module")
def schema(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.mark.parametrize(
    ("live", "mode", "cases"),
    # to make a request up takes longer than to answer it, and those for either model are the same
    [("bundled", GenerationMode.POSITIVE, FEW), ("table", GenerationMode.POSITIVE, CASES),
     ("table", GenerationMode.NEGATIVE, CASES),
     pytest.param("bundled", GenerationMode.NEGATIVE, CASES, marks=pytest.mark.slow)],  # most reach no model
    indirect=["live"], scope="module",
)  # fmt: skip
def test_made_up_requests(live: Live, schema: Any, mode: GenerationMode, cases: int) -> None:
    """Such as the description allows, and such as it does not."""
    played: Counter[str] = Counter()
    for operation in (found.ok() for found in schema.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong: a path takes any text

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
        def play(case: Any) -> None:
            response = case.call(base_url=live.url, timeout=SECONDS)
            played[f"{case.method} {case.path}"] += 1
            streamed = "event-stream" in response.headers.get("content-type", [""])[0]
            case.validate_response(response, checks=CHECKS[:2] if streamed else CHECKS)

        play()
    assert min(played[f"POST {path}"] for path in POSTED) >= cases


def test_afterwards_the_server_is_idle_and_well(live: Live) -> None:
    wait_for(live.idle)
    assert live.service.engine.stats().kv_blocks_used == 0
    assert live.post("/v1/completions", {"prompt": "import", "max_tokens": 3}).status_code == 200
