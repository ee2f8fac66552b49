"""The page that the server has at /, played in Chromium: what it shows is what the API says."""

import functools
import itertools
import json
import random
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from live_server import LONG, SECONDS, Live, serving, wait_for

from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair, load_pair

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright; it is not installed")
expect = sync_api.expect
#: what a loaded machine may take; no test waits for it in vain
MILLISECONDS = 1000 * SECONDS
expect.set_options(timeout=MILLISECONDS)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
without_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; apt-get install chromium")


def browser_test(test: Any) -> Any:
    return pytest.mark.browser(without_browser(test))


PAGE = Path(str(resources.files("gemma_mtp") / "server" / "page"))
#: `make build/axe-core` brings it
AXE = Path(__file__).parent.parent / "build" / "axe-core" / "package" / "axe.min.js"
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
KEY = "page-key"


@pytest.fixture(scope="module")
def guarded(pair: Pair) -> Iterator[Live]:
    """A server that wants a key and does one request at a time."""
    with serving(pair, api_keys=(KEY,), max_concurrent=1) as live:
        yield live


@contextmanager
def launched() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@contextmanager
def opened(browser: Any, live: Live, errors: str = "nothing", **context: Any) -> Iterator[Any]:
    """The page with its model known; at the end no error may have been logged but those that `errors` matches."""
    with browser.new_context(**context) as opened_context:
        page = opened_context.new_page()
        page.set_default_timeout(MILLISECONDS)
        logged, requested = list[str](), list[str]()
        page.on(
            "console", lambda message: logged.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(live.url)
        expect(page.locator("#model")).not_to_have_text("…")
        yield page
        assert [text for text in logged if not re.search(errors, text)] == []
        assert requested and all(url.startswith(live.url + "/") for url in requested)


@pytest.fixture
def page(browser: Any, live: Live) -> Iterator[Any]:
    with opened(browser, live) as page:
        yield page


def set_options(
    page: Any, prompt: str = PROMPT, tokens: int = 24, drafts: int | str = 4, temperature: float = 0
) -> None:
    page.fill("#prompt", prompt)
    page.fill("#max-tokens", str(tokens))
    page.fill("#temperature", str(temperature))
    page.fill("#seed", "1")
    page.select_option("#draft-tokens", str(drafts))


def finish(page: Any, button: str = "#run") -> None:
    page.click(button)
    expect(page.locator("#status")).to_have_text(re.compile(r"^(Done|Race finished)"))


def shown(page: Any, lane: int = 0) -> list[tuple[str, str]]:
    """(kind, text) of each token."""
    script = "tokens => tokens.map(token => [token.classList[1], token.textContent])"
    found = page.locator(".lane").nth(lane).locator(".output .token").evaluate_all(script)
    return [(kind, text) for kind, text in found]


@browser_test
@pytest.mark.parametrize("drafts", [0, 4, "auto"])
def test_a_run_shows_the_tokens_that_the_api_gives(page: Any, live: Live, drafts: int | str) -> None:
    set_options(page, tokens=60, drafts=drafts, temperature=1)  # a text with accepted drafts and refused ones
    finish(page)
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 1, "seed": 1, "draft_tokens": drafts}
    whole = live.post("/v1/completions", body).json()
    assert "".join(text for _, text in shown(page)) == whole["choices"][0]["text"]
    assert page.locator(".output").text_content() == PROMPT + whole["choices"][0]["text"]
    if drafts != "auto":  # which may draft otherwise when it has learnt more
        events = live.events("/v1/completions", {**body, "stream_options": {"include_rounds": True}})
        expected = [(t["kind"], t["text"]) for e in events for t in e["gemma_mtp"]["tokens"]]
        assert shown(page) == expected
        assert {kind for kind, _ in expected} >= (
            {"first", "plain"} if drafts == 0 else {"first", "draft", "correction"}
        )


@browser_test
def test_figures_are_the_results_own(page: Any, pair: Pair) -> None:
    result = pair.generate(PROMPT, SamplingParams(max_tokens=40), draft_tokens=4)
    set_options(page, tokens=40)
    finish(page)
    figure = {name: page.text_content(f'[data-figure="{name}"]') for name in ("speed", "round", "first", "tokens")}
    assert figure["tokens"] == "40" and figure["round"] == f"{result.mean_acceptance_length:.2f}"
    assert re.fullmatch(r"[\d,.]+", figure["speed"]) and re.fullmatch(r"[\d.]+ m?s", figure["first"])
    assert page.locator(".bars .share").all_text_contents() == [
        f"{int(100 * share + 0.5)}%" for share in result.accepted_by_position
    ]
    widths = page.locator(".bars .fill").evaluate_all("bars => bars.map(bar => bar.style.getPropertyValue('--share'))")
    assert [f"{width}%" for width in widths] == page.locator(".bars .share").all_text_contents()
    page.click(".rounds summary")
    page.wait_for_selector("tbody tr")
    rows = page.locator("tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert [(row[1], row[2]) for row in rows] == [(str(r.drafted), str(r.accepted)) for r in result.rounds]
    titles = page.locator(".round").evaluate_all("rounds => rounds.map(round => round.title)")
    assert all(
        title.startswith(f"Round {i}: {r.drafted} drafted, {r.accepted} accepted;")
        for i, (title, r) in enumerate(zip(titles, result.rounds, strict=True))
        if i
    )


@browser_test
def test_kinds_differ_by_more_than_colour(page: Any) -> None:
    styles = page.locator(".legend .token").evaluate_all("""tokens => tokens.map(token => {
        const style = getComputedStyle(token);
        return style.textDecorationLine === "none" ? "none" : style.textDecorationStyle;
    })""")
    assert sorted(styles) == ["dotted", "double", "none", "solid", "wavy"]
    letters = "tokens => tokens.map(token => getComputedStyle(token, '::before').content)"
    assert page.locator(".legend .token").evaluate_all(letters) == ["none"] * 5
    page.check("#letters")
    assert page.locator(".legend .token").evaluate_all(letters) == [f'"{letter}"' for letter in "DCBPF"]
    assert page.locator(".legend b").all_text_contents() == list("DCBPF")


@browser_test
def test_chat_is_offered_where_there_is_a_template(page: Any, browser: Any, live: Live, pair: Pair) -> None:
    assert page.is_checked('[value="completion"]')
    page.check('[value="chat"]')
    set_options(page, prompt="Write a stack.", tokens=12)
    finish(page)
    messages = [{"role": "user", "content": "Write a stack."}]
    body = {"messages": messages, "max_completion_tokens": 12, "temperature": 0, "seed": 1, "draft_tokens": 4}
    content = live.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    assert page.locator(".output").text_content() == content
    assert pair.tokenizer is not None
    template, pair.tokenizer.chat_template = pair.tokenizer.chat_template, None
    try:
        with opened(browser, live) as without:
            expect(without.locator("#no-chat")).to_have_text("This model has no chat template: it completes text only.")
            assert without.is_disabled('[value="chat"]') and without.is_disabled('[value="conversation"]')
            without.goto(f"{live.url}/#mode=conversation")
            without.reload()
            expect(without.locator("#no-chat")).to_be_visible()
            assert without.is_checked('[value="completion"]') and without.locator("#race").is_visible()
    finally:
        pair.tokenizer.chat_template = template


@browser_test
def test_it_works_below_a_path_that_a_proxy_takes_off(browser: Any, live: Live) -> None:
    with browser.new_context() as context:
        page, requested = context.new_page(), list[str]()
        page.set_default_timeout(MILLISECONDS)
        page.on("request", lambda request: requested.append(request.url))
        page.route("**/llm/**", lambda route: route.continue_(url=route.request.url.replace("/llm/", "/")))
        page.goto(f"{live.url}/llm/")
        expect(page.locator("#model")).not_to_have_text("…")
        set_options(page, tokens=6)
        finish(page)
        assert len(shown(page)) == 6
        assert {url.rpartition("/")[2] for url in requested} >= {"", "app.js", "style.css", "models", "completions"}
        assert all(url.startswith(f"{live.url}/llm/") for url in requested)


@browser_test
def test_without_a_drafter_nothing_is_raced(browser: Any) -> None:
    with serving(load_pair(use_drafter=False)) as live, opened(browser, live) as page:
        expect(page.locator("#model")).to_have_text("gemma-mtp-bundled (no drafter)")
        expect(page.locator("#race")).to_be_disabled()
        page.fill("#prompt", PROMPT)
        page.fill("#max-tokens", "4")
        finish(page)
        assert [kind for kind, _ in shown(page)] == ["first", "plain", "plain", "plain"]


@browser_test
@pytest.mark.parametrize("order", ["sequential", "together"])
def test_a_race_is_the_same_run_twice(page: Any, order: str) -> None:
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    set_options(page, temperature=0.7)
    page.check(f'[value="{order}"]')
    page.uncheck("#thrice")
    finish(page, "#race")
    assert page.text_content("#identical") == "byte for byte the same"
    assert re.fullmatch(r"(About )?\d+\.\d+× (faster|slower),", page.text_content("#speed"))
    assert ("One race, run one after the other." in page.text_content("#verdict-note")) == (order == "sequential")
    assert [body.pop("draft_tokens") for body in bodies] == [0, 4] and bodies[0] == bodies[1]
    plain, drafted = shown(page, 0), shown(page, 1)
    assert [text for _, text in plain] == [text for _, text in drafted]
    assert {kind for kind, _ in plain} == {"first", "plain"} and "draft" in {kind for kind, _ in drafted}


@browser_test
def test_a_race_sees_one_token_that_differs(page: Any) -> None:
    def falsify(route: Any) -> None:
        text = route.fetch().text()
        if route.request.post_data_json["draft_tokens"]:
            text = re.sub(r'("gemma_mtp":.*?"id":)\d+', r"\g<1>3", text, count=1)
        route.fulfill(body=text, content_type="text/event-stream")

    page.route("**/v1/completions", falsify)
    set_options(page, tokens=6)
    finish(page, "#race")
    assert page.text_content("#identical") == "but not the same"
    assert "too few to say how fast" in page.text_content("#verdict-note")
    assert "part at token 1." in page.text_content("#verdict-note")


@browser_test
def test_the_median_of_three_races_counts_and_all_must_agree(page: Any) -> None:
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    set_options(page, tokens=30, drafts=8)
    finish(page, "#race")
    assert [body["draft_tokens"] for body in bodies] == [0, 8] * 3
    assert "The median of 3 races" in page.text_content("#verdict-note")
    speeds = [float(text.replace(",", "")) for text in page.locator('[data-figure="speed"]').all_text_contents()]
    ratio = float(page.text_content("#speed").removeprefix("About ").partition("×")[0])
    quotient = speeds[1] / speeds[0]
    assert max(quotient, 1 / quotient) == pytest.approx(ratio, rel=0.06)


@browser_test
def test_races_are_judged_by_their_median_and_by_every_one(page: Any) -> None:
    """Of made-up records: a repetition is seconds a token without and with drafts, and its output's first token."""
    script = """async ([repetitions, rounds]) => {
        const { outcome, headline, notes } = await import("/page/race.js");
        const { Record } = await import("/page/record.js");
        const made = (seconds, drafted, id) => {
            const record = new Record();
            for (let i = 0; i <= rounds; i++) {
                const tokens = [{ id: i ? 5 : id, text: "x" }];
                record.add({ choices: [{ text: "x" }], gemma_mtp: { drafted, accepted: 0, seconds, tokens } });
            }
            return record;
        };
        const found = outcome(repetitions.map(([a, b, id]) => [made(a, 0, 1), made(b, 2, id)]));
        const { speed, same } = headline(found);
        return [speed, same, notes(found, "exact", false, (value) => value.toFixed(0))];
    }"""
    speed, same, notes = page.evaluate(script, [[[1, 0.45, 1], [1, 0.5, 1], [1, 0.55, 1]], 20])
    assert (speed, same) == ("2.00× faster,", "byte for byte the same")
    assert "1 tokens a second without, 2 with" in notes and "The median of 3 races (1.82× to 2.22×)" in notes
    assert "Only" not in notes and "differ" not in notes
    speed, same, notes = page.evaluate(script, [[[1, 0.25, 1], [1, 0.5, 1], [1, 2, 1]], 20])
    assert (speed, same) == ("About 2.0× faster,", "byte for byte the same")
    assert "The races differ by more than a third: other work shares the machine." in notes
    speed, same, notes = page.evaluate(script, [[[1, 2, 1], [1, 2, 9], [1, 2, 1]], 20])
    assert (speed, same) == ("2.00× slower,", "but not the same")
    assert "The outputs part at token 1. Exact verification should not let that happen." in notes
    _, _, notes = page.evaluate(script, [[[1, 0.5, 1]], 1])
    assert "Only 2 rounds had drafts: too few to say how fast." in notes


@browser_test
def test_a_race_is_played_again_ten_times_slower(page: Any) -> None:
    """By recorded times: what is not there yet is hidden, and the curve ends where the text does."""
    hidden = ".lane:nth-child({}) .output .later"
    set_options(page, tokens=100)
    finish(page, "#race")
    page.keyboard.press("Escape")
    assert page.locator(".output .later").count() == 0
    expect(page.locator("#replay")).to_have_attribute("aria-disabled", "false")
    label = page.get_attribute("#curve", "aria-label")
    assert re.fullmatch(
        r"Tokens over time: 100 tokens in [\d.]+ m?s without drafter, 100 tokens in [\d.]+ m?s with drafter\.", label
    )
    whole = [
        len(points.split())
        for points in page.locator("#curve polyline").evaluate_all(
            "all => all.map(line => line.getAttribute('points'))"
        )
    ]
    page.evaluate("window.requestAnimationFrame = (step) => { window.step = step; return 1; }")
    page.click("#replay")
    for lane in (1, 2):
        rounds = page.locator(f".lane:nth-child({lane}) .round").count()
        assert rounds - 2 <= page.locator(hidden.format(lane)).count() <= rounds - 1, "the first token is there at once"
    drawn = page.locator("#curve polyline").evaluate_all("all => all.map(line => line.getAttribute('points'))")
    assert all(len(points.split()) < most for points, most in zip(drawn, whole, strict=True))
    page.evaluate("performance.now = () => 1e12")
    page.evaluate("step()")
    assert page.locator(".output .later").count() == 0
    expect(page.locator("#replay")).to_have_attribute("aria-disabled", "false")


@browser_test
def test_nothing_is_played_again_by_itself_where_motion_is_not_wanted(browser: Any, live: Live) -> None:
    with opened(browser, live, reduced_motion="reduce") as page:
        set_options(page, tokens=60)
        finish(page, "#race")
        assert page.locator(".output .later").count() == 0
        expect(page.locator("#replay")).not_to_have_attribute("aria-disabled", "true")


@browser_test
def test_a_first_token_from_a_cached_beginning_says_so(page: Any) -> None:
    set_options(page, prompt="# never asked before\n" + PROMPT * 3, tokens=4)
    finish(page)
    expect(page.locator(".cached")).to_be_hidden()
    finish(page)
    expect(page.locator(".cached")).to_be_visible()


@browser_test
def test_positions_after_the_sixth_are_folded_and_few_drafts_are_pale(page: Any) -> None:
    set_options(page, tokens=100, drafts=12)
    finish(page)
    assert page.locator(".bars").first.locator("li").count() == 6
    folded = page.locator(".more .bars li")
    assert folded.count() >= 2 and not folded.first.is_visible()
    page.click(".more summary")
    assert folded.first.is_visible() and folded.first.locator(".place").text_content() == "7"
    counts = [int(text.split()[-1]) for text in page.locator(".bars .count").all_text_contents()]
    paleness = page.locator(".bars .fill").evaluate_all(
        "bars => bars.map(bar => Number(getComputedStyle(bar).opacity))"
    )
    assert paleness == pytest.approx([max(0.3, count / counts[0]) for count in counts], abs=0.01)
    assert paleness[0] == 1 > paleness[-1]


@browser_test
def test_nothing_of_an_earlier_race_stands_beside_an_error(page: Any) -> None:
    set_options(page, tokens=12)
    finish(page, "#race")
    expect(page.locator("#verdict")).to_be_visible()
    page.select_option("#draft-tokens", "0")
    page.click("#race")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator("#verdict")).to_be_hidden()
    assert page.locator(".lane").count() == 0 and page.text_content("#status") == ""


@browser_test
def test_a_link_holds_the_options(page: Any, browser: Any, live: Live) -> None:
    set_options(page, prompt="a = '&=#ä€'\n", tokens=17, drafts=3, temperature=0.25)
    page.fill("#seed", "42")
    page.select_option("#verification", "block")
    page.check('[value="together"]')
    page.uncheck("#thrice")
    link = page.locator("#link").evaluate("a => a.href")
    finish(page)
    assert page.url == link
    values = (
        "[...document.querySelectorAll('#controls input, #controls select, textarea')].map(e => [e.value, e.checked])"
    )
    expected = page.evaluate(values)
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(link)
        expect(other.locator("#model")).not_to_have_text("…")
        assert other.evaluate(values) == expected
        other.goto(f"{live.url}/#seed=9&draft-tokens=99&verification=none&mode=none")
        assert other.input_value("#seed") == "9" and other.input_value("#verification") == "block"
        assert other.input_value("#draft-tokens") == "3" and other.is_checked('[value="completion"]')


@browser_test
def test_a_race_needs_drafts(page: Any) -> None:
    set_options(page, drafts=0)
    page.click("#race")
    expect(page.get_by_role("alert")).to_have_text("A race needs drafts: choose a draft length other than 0.")
    expect(page.locator("#empty")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "draft-tokens"


@browser_test
@pytest.mark.parametrize("by", ["key", "button"])
def test_stop_cancels_on_the_server(page: Any, live: Live, by: str) -> None:
    def cancelled() -> int:
        return live.service.engine.stats().finished["cancelled"]

    with live.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}):  # which makes ours slow
        wait_for(lambda: live.service.engine.stats().running == LONG["n"])
        before = cancelled()
        set_options(page, tokens=1900, drafts=0)
        page.click("#run")
        page.locator(".output .token").nth(2).wait_for()
        if by == "key":
            page.keyboard.press("Escape")
        else:
            page.click("#stop")
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator(".lane-state")).to_have_text("stopped")
        wait_for(lambda: cancelled() == before + 1)
    wait_for(live.idle)
    assert 0 < int(page.text_content('[data-figure="tokens"]')) < 1900
    set_options(page, tokens=4)
    finish(page)  # and it runs again


@browser_test
def test_a_stopped_race_gives_no_verdict(page: Any, live: Live) -> None:
    with live.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
        set_options(page, tokens=1900)
        page.click("#race")
        page.locator(".output .token").first.wait_for()
        page.keyboard.press("Escape")
        assert page.locator(".lane-state").all_text_contents() == ["stopped", "not run"]
        expect(page.locator("#verdict")).to_be_hidden()
    wait_for(live.idle)


@browser_test
def test_a_key_is_asked_for_and_kept_nowhere(browser: Any, guarded: Live) -> None:
    with opened(browser, guarded, errors="status of 401") as page:
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("This server needs an API key.")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Tab")
        expect(alert).to_have_text("The server does not know this API key.")
        page.fill("#key", "schlüssel€")
        page.press("#key", "Tab")
        expect(alert).to_have_text("The API key has characters that no key can have.")
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("gemma-mtp-bundled")
        expect(alert).to_be_hidden()
        set_options(page, tokens=4)
        finish(page)
        stored = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")
        assert KEY not in stored
        page.reload()
        expect(alert).to_have_text("This server needs an API key.")
        assert page.input_value("#key") == ""


@browser_test
def test_a_busy_server_says_when_to_come_again(browser: Any, guarded: Live) -> None:
    with opened(browser, guarded, errors="status of (401|429)") as page:
        page.fill("#key", KEY)
        page.press("#key", "Tab")
        expect(page.locator("#model")).to_have_text("gemma-mtp-bundled")
        headers = {"Authorization": f"Bearer {KEY}"}
        with guarded.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=headers):
            page.click("#run")
            expected = (
                "The server is busy: 1 requests are in work, as many as may; try again later. Try again in 1 second."
            )
            expect(page.get_by_role("alert")).to_have_text(expected)
            expect(page.locator(".lane-state")).to_have_text("failed")
        wait_for(guarded.idle)


@browser_test
def test_failures_come_as_sentences(browser: Any, live: Live) -> None:
    with opened(browser, live, errors="ERR_INTERNET_DISCONNECTED|status of 400") as page:
        alert = page.get_by_role("alert")
        set_options(page, prompt="x = 1\n" * 600, tokens=4)
        page.click("#run")
        expect(alert).to_have_text(re.compile(r"^This model.s maximum context length is 2048 tokens"))
        set_options(page, tokens=4)
        page.context.set_offline(True)
        page.click("#run")
        expect(alert).to_have_text("The server can not be reached. Is it still running?")
        page.context.set_offline(False)
        failure = {"error": {"message": "the server failed.", "type": "server_error", "param": None, "code": None}}
        cut_short = [("", "The server ended the answer before it was whole."),
                     (f"data: {json.dumps(failure)}\n\n", "The server failed.")]  # fmt: skip
        for body, sentence in cut_short:
            page.route("**/v1/completions", functools.partial(sync_api.Route.fulfill, body=body))
            page.click("#run")
            expect(alert).to_have_text(sentence)
        page.unroute("**/v1/completions")
        finish(page)
        expect(alert).to_be_hidden()


@browser_test
def test_bad_options_are_not_sent(page: Any) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    for selector, value in {"#prompt": "", "#max-tokens": "0", "#temperature": "3", "#seed": "1.5"}.items():
        set_options(page)
        page.fill(selector, value)
        page.click("#run")
        assert page.evaluate("document.activeElement.id") == selector[1:]
    page.fill("#seed", "1")
    page.fill("#max-tokens", "2049")
    page.click("#run")
    assert page.evaluate("document.activeElement.id") == "max-tokens", "the model's context is the most"
    assert sent == []


@browser_test
def test_without_javascript_the_page_says_how_to_ask(browser: Any, live: Live) -> None:
    """And shows nothing that does nothing. What it says to type works."""
    with browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        page.goto(live.url)
        expect(page.get_by_role("heading", name="This page needs JavaScript")).to_be_visible()
        for name in ("#controls", "#results", "#theme"):
            expect(page.locator(name)).to_be_hidden()
        command = page.locator("noscript pre").inner_text().replace("http://127.0.0.1:8000", live.url)
        page.get_by_role("link", name="the API's description").click()
        assert "openapi" in json.loads(page.locator("pre").inner_text())
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["curl", f"{live.url}/v1/completions", "-H"]
    answer = live.client.post(words[1], content=words[5], headers=dict([words[3].split(": ")]))
    assert answer.json()["choices"][0]["text"]


@browser_test
def test_the_keyboard_reaches_and_works_everything(page: Any) -> None:
    script = """() => {
        const at = document.activeElement, style = getComputedStyle(at);
        const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
        return [at.id || at.textContent.trim() || at.name, visible];
    }"""
    focused: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, visible = page.evaluate(script)
        if name in focused or not page.evaluate("document.activeElement !== document.body"):
            break
        assert visible, name
        focused.append(name)
    expected = ["Skip to the output", "theme", "mode", "prompt", "Field", "Error", "Client", "Array",
                "race", "run", "stop", "link", "max-tokens", "temperature", "seed", "draft-tokens", "verification",
                "order", "thrice", "letters", "/v1/models", "Description", "metrics", "health"]  # fmt: skip
    assert focused == expected
    page.focus("#samples button:nth-child(2)")
    page.keyboard.press("Enter")
    assert page.input_value("#prompt").startswith("class ParseError")
    assert (page.input_value("#seed"), page.input_value("#temperature")) == ("11", "0.7")
    page.fill("#max-tokens", "4")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done: 4 tokens"))
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.focus("#race")
    page.keyboard.press("Space")
    expect(page.locator("#status")).to_have_text(re.compile("^Race finished: .*byte for byte the same"))
    assert page.evaluate("document.activeElement.id") == "race", "focus is not lost to what a run disables"
    assert page.locator(".output").first.get_attribute("tabindex") == "0", "what scrolls can be scrolled by keys"


@browser_test
def test_every_control_has_a_name_and_news_come_rarely(page: Any) -> None:
    script = "all => all.map(e => (e.labels?.[0] ?? e).textContent.trim())"
    names = page.locator("input, select, textarea, button").evaluate_all(script)
    assert len(names) > 15 and all(names)
    assert [page.locator(landmark).count() for landmark in ("header.bar", "main", "footer", "h1")] == [1, 1, 1, 1]
    page.evaluate("""() => {
        window.news = [];
        new MutationObserver(() => news.push(document.getElementById("status").textContent))
            .observe(document.getElementById("status"), {childList: true});
    }""")
    set_options(page, tokens=40, drafts=0)
    finish(page)
    assert len(page.evaluate("news.filter(Boolean)")) == 2
    live_ancestors = "e => Boolean(e.closest('[aria-live], [role=status], [role=alert], [role=log]'))"
    assert not page.locator(".lane").evaluate(live_ancestors)


@browser_test
def test_themes(browser: Any, live: Live) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, live, color_scheme="light") as page:
        light = page.evaluate(ground)
        page.select_option("#theme", "dark")
        dark = page.evaluate(ground)
        page.reload()
        assert page.evaluate(ground) == dark != light
        page.select_option("#theme", "")
        assert page.evaluate(ground) == light
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(ground) == dark
        page.select_option("#theme", "light")
        assert page.evaluate(ground) == light


@browser_test
def test_it_is_still_where_that_is_asked_for(page: Any) -> None:
    set_options(page)
    finish(page)
    duration = "bar => getComputedStyle(bar).transitionDuration"
    assert page.locator(".bars .fill").first.evaluate(duration) == "0.15s"
    page.emulate_media(reduced_motion="reduce")
    assert page.locator(".bars .fill").first.evaluate(duration) == "0s"


@browser_test
def test_it_fits_narrow_screens_and_large_print(page: Any) -> None:
    set_options(page, prompt="a_very_long_name_without_any_space_" * 8)
    page.check("#letters")
    finish(page, "#race")
    for summary in page.locator("summary:visible").all():
        summary.click()
    for width in (320, 640, 800, 1280, 1920):  # 640 is what 200% leave of 1280
        page.set_viewport_size({"width": width, "height": 720})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """() => [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth
        && !e.closest(".scroll, .output")).map(e => e.outerHTML)"""
    page.set_viewport_size({"width": 320, "height": 720})
    assert page.evaluate(outside) == []
    page.fill("#max-tokens", "4")
    finish(page)
    expect(page.locator("#status")).to_be_in_viewport()


@browser_test
def test_events_are_read_however_they_are_cut(page: Any) -> None:
    cases = [
        ("data: a\n\ndata: b\n\n", ["a", "b"]),
        ("\ufeffdata:a\r\n\r\ndata: ä€😀\r\n\r\n", ["a", "ä€😀"]),
        (": hello\r\rdata: x\rdata: y\r\r", ["x\ny"]),
        ("event: z\nid: 4\ndata\n\ndata:  two\n\ndatax: no\n\n\n", ["", " two"]),
        ("data: whole\n\ndata: not ended\n", ["whole"]),
    ]  # fmt: skip
    script = """async pieces => {
        const { eventData } = await import("/page/sse.js");
        const body = new ReadableStream({ start(c) { pieces.forEach(p => c.enqueue(new Uint8Array(p))); c.close(); } });
        const events = [];
        for await (const data of eventData(body)) events.push(data);
        return events;
    }"""
    random_ = random.Random(0)
    for text, expected in cases:
        data = text.encode()
        for pieces in (1, len(data), *(random_.randint(2, 9) for _ in range(6))):
            cuts = sorted(random_.sample(range(1, len(data)), pieces - 1))
            ends = itertools.pairwise([0, *cuts, len(data)])
            assert page.evaluate(script, [list(data[a:b]) for a, b in ends]) == expected, (text, cuts)


@browser_test
@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not here; make build/axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, live: Live, scheme: str) -> None:
    with opened(browser, live, color_scheme=scheme) as page:
        page.evaluate(AXE.read_text(encoding="utf-8"))
        run = "async () => (await axe.run()).violations.map(v => [v.id, v.nodes.map(node => node.html)])"
        assert page.evaluate(run) == []
        set_options(page)
        page.check("#letters")
        finish(page, "#race")
        page.click(".rounds summary >> nth=1")
        assert page.evaluate(run) == []
        page.evaluate("document.querySelector('h2').parentElement.append(document.createElement('img'))")
        assert [violation[0] for violation in page.evaluate(run)] == ["image-alt"], "it would find something"


def test_the_api_says_what_the_page_must_know(live: Live, pair: Pair) -> None:
    (card,) = live.client.get("/v1/models").json()["data"]
    assert card["gemma_mtp"] == {"chat": True, "drafter": True, "thinking": False}
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12), draft_tokens=3)
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "draft_tokens": 3}
    events = live.events("/v1/completions", {**body, "stream_options": {"include_rounds": True}})
    assert [token["id"] for e in events for token in e["gemma_mtp"]["tokens"]] == expected.token_ids


def test_files_come_with_their_types_and_from_here_only(live: Live) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "javascript", ".svg": "image/svg+xml"}
    for file in sorted(PAGE.iterdir()):
        answer = live.client.get(f"/page/{file.name}")
        assert answer.status_code == 200 and answer.content == file.read_bytes()
        assert types[file.suffix] in answer.headers["content-type"]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-cache"
        links = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", answer.text))
        named = {"http://www.w3.org/2000/svg", "https://html.spec.whatwg.org/multipage/server-sent-events.html"}
        assert all(link in named or link.startswith("http://127.0.0.1:8000") for link in links)
        assert not re.search(r"\sstyle=|\son\w+=|<style|innerHTML", answer.text), "nothing inline, no text as markup"


#: text on ground at 4.5 : 1, and lines that tell a control or the focus at 3 : 1 (WCAG 2.2, 1.4.3 and 1.4.11)
TEXTS = [
    (ink, ground, 4.5)
    for ink, grounds in {
        "ink": ("page", "surface"), "ink-soft": ("page", "surface"), "accent": ("page", "surface"),
        "accent-strong": ("page", "surface"), "on-accent": ("accent", "accent-strong"),
        "draft-ink": ("draft-ground", "surface"), "correction-ink": ("correction-ground",),
        "bonus-ink": ("bonus-ground",), "first-ink": ("first-ground",), "error-ink": ("error-ground", "surface"),
    }.items()
    for ground in grounds
]  # fmt: skip
LINES = [(line, ground, 3.0) for line in ("control-line", "accent") for ground in ("surface", "page")]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_wcags() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005), "known to just fail"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(theme: int) -> None:
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    tokens = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", style)}
    assert style.count("light-dark(") == len(tokens)
    body = style.split(':root[data-theme="light"]')[1]
    assert not re.search(r"#[0-9a-f]{3,8}\b(?![^{]*\{)|rgb\(|hsl\(", body), "colours are tokens"
    poor = {(ink, ground): ratio for ink, ground, least in (*TEXTS, *LINES)
            if (ratio := contrast(tokens[ink][theme], tokens[ground][theme])) < least}  # fmt: skip
    assert poor == {}
    inks = set(re.findall(r"[{;\s]color: var\(--([\w-]+)\)", body))
    assert inks <= {ink for ink, _, _ in TEXTS}, "every colour of text is in the table"
