"""Conversations on the server's page, played in Chromium."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from live_server import Live, serving, wait_for
from table_models import SCRIPTS, table_pair
from test_page import AXE, browser_test, expect, launched, opened

#: beside the others, one that does not end
SONG = {"SONG": ["left ", "right ", "left ", "right "]}
THOUGHT, ANSWER = "Two and two STOP is four", "The answer STOP is 4"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(table_pair("half", {**SCRIPTS, **SONG})) as live:
        yield live


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def talk(chromium: Any, live: Live) -> Iterator[Any]:
    with opened(chromium, live) as page:
        begin(page)
        yield page


def begin(page: Any) -> None:
    page.check('[value="conversation"]')
    page.select_option("#draft-tokens", "3")
    page.fill("#temperature", "0")


def send(page: Any, message: str) -> None:
    page.fill("#prompt", message)
    page.click("#run")
    answered(page)


def answered(page: Any) -> None:
    expect(page.locator("#stop")).to_have_attribute("aria-disabled", "true")
    expect(page.locator("#status")).to_have_text(re.compile("^Answered: "))


def bodies(page: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    page.on("request", lambda request: found.append(request.post_data_json) if request.method == "POST" else None)
    return found


def outputs(page: Any) -> list[str]:
    return list(page.locator(".turn .output").all_text_contents())


@browser_test
def test_each_turn_goes_on_from_those_before(talk: Any, live: Live) -> None:
    sent = bodies(talk)
    talk.fill("#system", "A message of the system's, of some length.")
    send(talk, "TEXT")
    assert talk.input_value("#prompt") == ""
    send(talk, "TEXT")
    assert outputs(talk) == ["Hello, world."] * 2
    assert [m["role"] for m in sent[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert sent[1]["messages"][2]["content"] == "Hello, world."
    plain = {**sent[1], "stream": False, "draft_tokens": 0}
    del plain["stream_options"]
    answer = live.post("/v1/chat/completions", plain).json()["choices"][0]["message"]["content"]
    assert outputs(talk)[1] == answer, "drafted and plain are the same"
    kinds = talk.locator(".turn .output .token").evaluate_all("all => all.map(e => e.classList[1])")
    assert "draft" in kinds and "first" in kinds
    figures = talk.locator(".turn-figures").all_text_contents()
    assert re.fullmatch(
        r"5 tokens, [\d,.]+ tokens/s, \d of \d+ drafts accepted, [\d.]+ tokens/round, 0 of \d+ prompt tokens cached",
        figures[0],
    )
    cached = re.search(r"(\d+) of (\d+) prompt tokens cached", figures[1])
    assert cached and 0 < int(cached[1]) < int(cached[2])


@browser_test
def test_thoughts_are_folded_and_no_part_of_what_goes_on(talk: Any) -> None:
    sent = bodies(talk)
    talk.check("#thinking")
    send(talk, "THINK")
    assert outputs(talk) == [ANSWER] and sent[0]["reasoning_effort"] == "high"
    thought = talk.locator(".turn .thinking")
    expect(thought).to_be_hidden()
    talk.click(".thought summary")
    expect(thought).to_have_text(THOUGHT)
    inks = talk.locator(".thinking, .thinking .token").evaluate_all("all => all.map(e => getComputedStyle(e).color)")
    assert len(inks) > 3 and len(set(inks)) == 1, "thoughts are dimmed, however their tokens came about"
    talk.uncheck("#thinking")
    send(talk, "THINK")
    assert "reasoning_effort" not in sent[1] and sent[1]["messages"][1]["content"] == ANSWER
    talk.check("#thinking")
    talk.fill("#max-tokens", "3")
    talk.click("#new")
    send(talk, "THINK")
    assert outputs(talk) == [""] and "ended at the token limit" in talk.text_content(".lane-state")
    send(talk, "THINK")  # goes on after an answer without text
    assert sent[-1]["messages"][1] == {"role": "assistant", "content": ""}


@browser_test
def test_retry_edit_and_new(talk: Any) -> None:
    sent = bodies(talk)
    send(talk, "THINK")
    seed = sent[0]["seed"]
    talk.fill("#prompt", "being written")
    talk.click("#retry")
    answered(talk)
    assert talk.input_value("#prompt") == "being written" and len(outputs(talk)) == 1
    assert sent[1]["messages"] == sent[0]["messages"] and sent[1]["seed"] == seed + 1
    talk.click("#edit")
    assert talk.input_value("#prompt") == "THINK" and talk.evaluate("document.activeElement.id") == "prompt"
    talk.keyboard.press("Escape")
    expect(talk.locator("#status")).to_have_text("")
    talk.click("#edit")
    send(talk, "TEXT")
    assert outputs(talk) == ["Hello, world."] and talk.locator(".said").all_text_contents() == ["TEXT"]
    assert [m["content"] for m in sent[2]["messages"]] == ["TEXT"]
    talk.click("#new")
    assert outputs(talk) == [] and talk.locator("#silent").is_visible() and not talk.locator("#retry").is_visible()


@browser_test
def test_a_stopped_answer_stays_and_the_server_stops(talk: Any, live: Live) -> None:
    talk.fill("#max-tokens", "4000")
    talk.select_option("#draft-tokens", "0")
    talk.fill("#prompt", "SONG")
    talk.click("#run")
    talk.locator(".turn .token").nth(3).wait_for()
    talk.keyboard.press("Escape")
    expect(talk.locator("#status")).to_have_text("Stopped.")
    wait_for(live.idle)
    state = talk.text_content(".turn .lane-state")
    assert state == "stopped" and outputs(talk)[0].startswith("left right left ")
    talk.fill("#max-tokens", "8")
    send(talk, "TEXT")
    assert len(outputs(talk)) == 2


@browser_test
def test_a_message_that_fails_is_given_back(chromium: Any, live: Live) -> None:
    with opened(chromium, live, errors="status of 400|DISCONNECTED") as page:
        begin(page)
        send(page, "TEXT")
        page.fill("#prompt", "x" * 5000)
        page.click("#run")
        alert = page.get_by_role("alert")
        expect(alert).to_have_text(re.compile("maximum context length.*If the conversation has become too long, begin"))
        assert outputs(page) == ["Hello, world."] and page.input_value("#prompt") == "x" * 5000
        assert page.text_content("#status") == ""
        page.context.set_offline(True)
        page.click("#retry")
        expect(alert).to_have_text("The server can not be reached. Is it still running?")
        assert outputs(page) == ["Hello, world."], "what was to be replaced is back"
        page.context.set_offline(False)
        page.click("#retry")
        answered(page)
        expect(alert).to_be_hidden()
        assert outputs(page) == ["Hello, world."]


@browser_test
def test_a_link_holds_the_settings_and_completions_stay_beside(talk: Any, chromium: Any) -> None:
    talk.fill("#system", "Be brief & kind.")
    talk.check("#thinking")
    send(talk, "TEXT")
    link = talk.locator(".link:visible").evaluate("a => a.href")
    with chromium.new_context() as context:
        other = context.new_page()
        other.goto(link)
        expect(other.locator("#model")).not_to_have_text("…")
        assert other.is_checked('[value="conversation"]') and other.is_checked("#thinking")
        assert other.input_value("#system") == "Be brief & kind." and other.text_content("#run") == "Send"
        assert other.locator("#race").is_hidden() and other.locator("#silent").is_visible()
    talk.check('[value="completion"]')
    assert talk.locator("#race").is_visible() and talk.locator(".turn").is_hidden()
    talk.fill("#prompt", "TEXT")
    talk.click("#run")
    expect(talk.locator("#status")).to_have_text(re.compile("^Done"))
    assert talk.locator(".lane").count() == 1
    talk.check('[value="conversation"]')
    assert talk.locator(".turn").is_visible() and talk.locator(".lane").is_hidden()


@browser_test
def test_the_keyboard_does_it_all_and_nothing_is_clipped(talk: Any) -> None:
    talk.focus("#prompt")
    talk.keyboard.type("THINK")
    talk.check("#thinking")
    talk.keyboard.press("Control+Enter")
    answered(talk)
    talk.fill("#prompt", "a_very_long_name_without_any_space_" * 8)
    talk.focus("#prompt")
    talk.keyboard.press("Control+Enter")
    expect(talk.locator(".turn-figures").nth(1)).not_to_have_text("")
    reached = []
    for _ in range(40):
        talk.keyboard.press("Tab")
        reached.append(talk.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"system", "thinking", "prompt", "run", "stop", "retry", "edit", "new", "SUMMARY", "PRE"} <= set(reached)
    for summary in talk.locator("summary:visible").all():
        summary.click()
    outside = """() => [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth
        ).map(e => e.outerHTML)"""
    for width in (320, 800, 1920):
        talk.set_viewport_size({"width": width, "height": 720})
        assert talk.evaluate("document.documentElement.scrollWidth") <= width
        assert talk.evaluate(outside) == []
    assert talk.locator(".turn").first.bounding_box()["width"] > 1400, "the width is used"


@browser_test
@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not here; make build/axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(chromium: Any, live: Live, scheme: str) -> None:
    with opened(chromium, live, color_scheme=scheme) as page:
        page.evaluate(AXE.read_text(encoding="utf-8"))
        begin(page)
        page.check("#thinking")
        page.check("#letters")
        run = "async () => (await axe.run()).violations.map(v => [v.id, v.nodes.map(node => node.html)])"
        assert page.evaluate(run) == []
        send(page, "THINK")
        page.click(".thought summary")
        assert page.evaluate(run) == []
