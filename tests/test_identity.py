"""`gemma-mtp identity`: our server says the same with drafting on and off, and a fault in it is found."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_server import served, transport
from live_server import Live
from test_cli import refused

from gemma_mtp.cli import main
from gemma_mtp.datasets import Example
from gemma_mtp.decoding import verify
from gemma_mtp.engine import round as engine_round
from gemma_mtp.measure.identity import Compared, Output, ScoredToken, groups, parting
from gemma_mtp.measure.identity_client import Side, compare, output_of, scored_of
from gemma_mtp.measure.load_requests import RequestMix

BRIEF = ["--limit", "2", "-n", "20"]


def found(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["identity", *BRIEF, "--json", *arguments]) == code
    read: dict[str, Any] = json.loads(capsys.readouterr().out)
    return read


def test_our_server_says_the_same(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "identity.svg"
    on = ["--on", '{"draft_tokens": 3}']
    read = found(capsys, live.url, *on, "--cut", "60,200", "--clients", "1,3", "--plot", str(picture))
    assert (read["identical"], read["failed"], len(read["prompts"])) == (1.0, 0, 8)
    assert read["drafts"]["plain"] == 0 and read["drafts"]["drafted"] > 50
    assert all(group["identical"] == group["prompts"] == group["plain_repeatable"] for group in read["groups"])
    assert {group["clients"] for group in read["groups"]} == {1, 3}
    assert len({group["shortest"] for group in read["groups"]}) > 1, "two lengths of prompts"
    drawn = picture.read_text(encoding="utf-8")
    assert "no outputs part" in drawn and "drafted to plain" in drawn


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds keep one draft more than the target agrees with."""

    def agreeing(choices: Sequence[int], drafts: Sequence[int]) -> int:
        return min(verify.agreeing(choices, drafts) + 1, len(drafts))

    def verify_exact(choices: Any, drafts: Any) -> verify.Verified:
        kept = verify.verify_exact(choices, drafts)
        return verify.Verified((kept.n_accepted + 1).clamp(max=drafts.shape[-1]), kept.tokens)

    monkeypatch.setattr(engine_round, "agreeing", agreeing)
    monkeypatch.setattr(engine_round, "verify_exact", verify_exact)


@pytest.mark.usefixtures("fault")
def test_a_fault_is_found(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--on", '{"draft_tokens": 3}', "--clients", "1"]
    read = found(capsys, live.url, *on, "--plot", str(tmp_path / "identity.png"), code=1)
    assert read["identical"] < 1 and read["groups"][0]["plain_repeatable"] == read["groups"][0]["prompts"]
    parted = [one for one in read["prompts"] if not one["identical"]]
    assert parted
    for one in parted:
        plain, drafted, where = one["plain"][0]["text"], one["drafted"][0]["text"], one["parting"]
        character = where["character"]
        assert plain[:character] == drafted[:character] and plain[: character + 1] != drafted[: character + 1]
        assert where["reproduced"] and where["token"] is not None
        assert where["margin"] is None or where["margin"] >= 0, "greedy: the plain side took the likeliest"
    assert main(["identity", live.url, *BRIEF, *on]) == 1
    assert "parts at character" in capsys.readouterr().out


def test_a_server_that_drafts_nothing_or_always_is_refused(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    on = ["--on", '{"draft_tokens": 0}', "--off", '{"draft_tokens": 0, "seed": 1}']
    assert "made no drafts" in refused(capsys, ["identity", live.url, *BRIEF, *on])
    always = ["--off", '{"draft_tokens": 2}', "--on", '{"draft_tokens": 3}']
    assert "turn drafting off" in refused(capsys, ["identity", live.url, *BRIEF, *always])


def test_two_servers_are_compared(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    read = found(capsys, live.url, live.url, "--off", '{"draft_tokens": 0}', "--clients", "2", "--repeats", "1")
    assert (read["identical"], read["urls"]) == (1.0, [live.url, live.url])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["127.0.0.1"], "URL is '127.0.0.1'"),
        (["http://127.0.0.1:1"], "can not be reached"),
        (["http://x", "--off", "3"], "--off is '3'"),
        (["http://x", "--on", "{"], "--on is '{'"),
        (["http://x", "--on", '{"draft_tokens": 0}'], "are equal"),
        (["http://x", "--clients", "0"], "--clients"),
        (["http://x", "--cut", "a"], "--cut"),
        (["http://x", "--repeats", "0"], "--repeats"),
        (["http://x", "--plot", "a.bmp"], "--plot"),
        (["http://x", "--data", "absent"], "absent"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, ["identity", *arguments])


def test_a_server_whose_answers_are_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as (url, _):  # it streams, whatever was asked for
        assert "every prompt failed (protocol)" in refused(capsys, ["identity", url, *BRIEF])


def run(answer: Callable[[dict[str, Any]], httpx.Response], repeats: int = 2, clients: int = 2) -> list[Compared]:
    """What is compared of a server in process, for two texts."""

    async def handler(request: httpx.Request) -> httpx.Response:
        return answer(json.loads(request.content))

    async def both() -> list[Compared]:
        examples = [Example("text", text, text, "") for text in ("ab", "cdef")]
        async with httpx.AsyncClient(transport=transport(handler), base_url="http://test") as client:
            plain, drafted = (Side(client, "tiny", {"drafts": drafts}) for drafts in (0, 3))
            mix = RequestMix(examples, "tiny", (8, 8), {"temperature": 0.0}, fresh=False)
            return await compare(plain, drafted, mix, clients, repeats, 60.0)

    return asyncio.run(both())


def completion(text: str, logprobs: Any = None) -> httpx.Response:
    choice = {"text": text, "finish_reason": "length", "logprobs": logprobs}
    return httpx.Response(200, json={"choices": [choice], "usage": {"prompt_tokens": 5}})


def test_the_margin_is_between_the_two_tokens_where_they_part() -> None:
    logprobs = {
        "tokens": ["one ", "two", " six"], "token_logprobs": [-0.1, -0.5, -0.1],
        "top_logprobs": [{"one ": -0.1}, {"two": -0.5, "three": -1.25, "th": -2.0}, {" six": -0.1}],
    }  # fmt: skip

    def answer(body: dict[str, Any]) -> httpx.Response:
        differs = body["drafts"] and "cdef" in body["prompt"]
        return completion("one three six" if differs else "one two six", logprobs if "logprobs" in body else None)

    same, other = sorted(run(answer), key=lambda one: not one.identical)
    assert same.parting is None and other.parting is not None
    assert (other.parting.character, other.parting.token) == (5, 1)
    assert (other.parting.plain_token, other.parting.drafted_token) == ("two", "three")
    assert other.parting.margin == pytest.approx(0.75) and other.parting.reproduced
    (group,) = groups([same, other])
    assert (group.shortest, group.longest, group.prompts, group.identical, group.plain_repeatable) == (4, 7, 2, 1, 2)


def test_a_side_that_does_not_repeat_itself_is_told_from_one_that_differs() -> None:
    asked: list[int] = []

    def answer(body: dict[str, Any]) -> httpx.Response:
        asked.append(body["drafts"])
        return completion(f"text {len(asked)}" if body["drafts"] else "text")

    (group,) = groups(run(answer))
    assert (group.identical, group.plain_repeatable, group.drafted_repeatable) == (0, 2, 0)


def test_failures_are_counted_by_kind_and_left_out_of_shares() -> None:
    def answer(body: dict[str, Any]) -> httpx.Response:
        return httpx.Response(503) if "cdef" in body["prompt"] else completion("x")

    compared = run(answer)
    assert sorted({error for one in compared for error in one.failed}) == ["http 503"]
    assert sorted((group.prompts, group.failed) for group in groups(compared)) == [(0, 1), (1, 0)]


def test_another_reason_to_end_is_another_output() -> None:
    assert not Output("x", "stop").same(Output("x", "length"))


@pytest.mark.parametrize(
    ("plain", "drafted", "tokens", "expected"),
    [
        ("abc", "abd", None, (2, None, None)),
        ("abc", "abd", ["x", "bc"], (2, None, False)),
        ("abc", "ab", ["ab", "c"], (2, 1, True)),
        ("ab", "abc", ["ab"], (2, None, False)),
    ],
)
def test_partings_without_a_margin(plain: str, drafted: str, tokens: Any, expected: Any) -> None:
    scored = None if tokens is None else [ScoredToken(text, -1.0, ((text, -1.0),)) for text in tokens]
    found = parting(plain, drafted, scored)
    assert (found.character, found.token, found.reproduced) == expected and found.margin is None


def test_answers_of_chats_and_of_llama_cpp_are_read() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"content": "b", "reasoning_content": "a", "tool_calls": [call]}
    content = {"choices": [{"message": message, "finish_reason": "stop"}], "timings": {"draft_n": 7}}
    read = output_of(content)
    assert read.text == 'ab[{"name": "f", "arguments": "{}"}]' and (read.drafts, read.finish_reason) == (7, "stop")
    top = [{"token": "b", "logprob": -0.1}, {"token": "c", "logprob": -3.0}]
    scored = scored_of({"choices": [{"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]})
    assert scored == [ScoredToken("b", -0.1, (("b", -0.1), ("c", -3.0)))]
    assert scored_of({"choices": [{"logprobs": None}]}) is None
