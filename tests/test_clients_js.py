"""Clients of others in JavaScript, unchanged, talk to the server: `make clients` installs them into build/npm and runs
these. What each does is in tests/clients."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import SECONDS, Live
from recorded_clients import ANSWER, BUILD, CALLED, MODEL, SUNNY, THOUGHT, recorded, table_server

pytestmark = pytest.mark.clients
SCRIPTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    assert (BUILD / "npm").is_dir(), "run `make clients`"
    with table_server() as live:
        yield live


def play(name: str, live: Live) -> dict[str, Any]:
    """What a script prints; its imports are found from the folder that it runs in."""
    with recorded(live, f"{name} (npm)"):
        ended = subprocess.run(
            ["node", "--input-type=module"], cwd=BUILD / "npm", input=(SCRIPTS / f"{name}.mjs").read_text("utf-8"),
            env={**os.environ, "SERVER": live.url, "MODEL": MODEL}, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def test_openai(live: Live) -> None:
    said = play("openai", live)
    events = said.pop("events")
    assert said == {
        "chat": "Hello, world.", "streamed": [THOUGHT, ANSWER], "runTools": SUNNY, "streamedTools": SUNNY,
        "calls": [CALLED, CALLED], "parsedCall": CALLED, "parsed": {"city": "Oslo"}, "responseCall": CALLED,
        "response": SUNNY, "streamedResponse": ANSWER, "error": [400, "context_length_exceeded"],
    }  # fmt: skip
    assert events[0] == "response.created" and events[-1] == "response.completed"
    assert {"response.reasoning_text.delta", "response.output_text.delta"} <= set(events)


@pytest.mark.parametrize("way", ["responses", "chat", "compatible"])
def test_ai_sdk(said_by_ai_sdk: dict[str, Any], way: str) -> None:
    said = dict(said_by_ai_sdk[way])
    parts = said.pop("parts")
    assert said == {
        "generated": [SUNNY, 2, "stop"], "streamed": SUNNY, "calls": [CALLED] * 3, "forced": ["get_weather"],
        # OpenAI's own models by the chat route have no thoughts for it
        "thought": ["" if way == "chat" else THOUGHT, ANSWER], "object": {"city": "Oslo"}, "plain": "Hello, world.",
    }  # fmt: skip
    assert parts.count("tool-input-delta") >= 3 and parts.count("tool-result") == 1 and "error" not in parts


@pytest.fixture(scope="module")
def said_by_ai_sdk(live: Live) -> dict[str, Any]:
    return play("ai_sdk", live)


def test_anthropic(live: Live) -> None:
    assert play("anthropic", live) == {
        "call": ["tool_use", CALLED], "text": SUNNY, "thought": [THOUGHT, ANSWER], "counted": True,
    }  # fmt: skip
