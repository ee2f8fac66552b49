"""What the routes answer: OpenAI's shapes, the engine's tokens, true usage; whole and streamed alike."""

import json
import re
from typing import Any

import pytest
from live_server import Live, serving, wait_for

from gemma_mtp.cli.render import shown_kinds as rendered_kinds
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.server.protocol import ChatCompletionRequest, CompletionRequest

PROMPT = "def fibonacci(n):\n"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
#: request fields and the engine's parameters that mean the same
CASES: list[tuple[dict[str, Any], SamplingParams]] = [
    ({"temperature": 0, "max_tokens": 24}, SamplingParams(max_tokens=24)),
    ({"temperature": 0.8, "top_p": 0.9, "seed": 5, "max_tokens": 20},
     SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=20)),
    ({"seed": 3, "top_k": 8, "min_p": 0.05, "max_tokens": 12, "stop": ["\n\n", "return"]},
     SamplingParams(temperature=1.0, seed=3, top_k=8, min_p=0.05, max_tokens=12, stop=("\n\n", "return"))),
    ({"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1,
      "logit_bias": {"7": -3.5, "300": 1}, "max_tokens": 16},
     SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.1, logit_bias={7: -3.5, 300: 1},
                    max_tokens=16)),
    ({"temperature": 0, "stop_token_ids": [198, 13], "ignore_eos": True, "max_tokens": 12},
     SamplingParams(stop_token_ids=(198, 13), ignore_eos=True, max_tokens=12)),
    ({"temperature": 0, "stop": "(", "max_tokens": 30}, SamplingParams(stop="(", max_tokens=30)),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "params"), CASES)
@pytest.mark.parametrize("draft_tokens", [0, 3, "auto"])
def test_completions_are_the_pairs_own_whole_and_streamed(
    live: Live, pair: Pair, fields: dict[str, Any], params: SamplingParams, draft_tokens: Any
) -> None:
    expected = pair.generate(PROMPT, params, draft_tokens=draft_tokens)
    body = {"prompt": PROMPT, "draft_tokens": draft_tokens, **fields}
    whole = live.post(COMPLETIONS, body).json()
    events = live.events(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    assert whole["object"] == "text_completion" and whole["model"] == "gemma-mtp-bundled"
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == expected.text
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == (
        [None] * (len(events) - 2) + [expected.finish_reason]
    )
    usage = events[-1]["usage"]
    assert events[-1]["choices"] == [] and all(event["usage"] is None for event in events[:-1])
    for counted in (whole["usage"], usage):
        assert counted["prompt_tokens"] == len(expected.prompt_token_ids)
        assert counted["completion_tokens"] == len(expected.token_ids)
        assert counted["total_tokens"] == len(expected.prompt_token_ids) + len(expected.token_ids)
    if draft_tokens == 3:  # how many drafts `auto` makes depends on the clock
        details = whole["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == expected.accepted
        assert details["rejected_prediction_tokens"] == expected.drafted - expected.accepted
        assert usage == whole["usage"] and expected.accepted > 0


@pytest.mark.parametrize("seed", [0, 11])
def test_chat_goes_through_the_template_whole_and_streamed(live: Live, pair: Pair, seed: int) -> None:
    assert pair.tokenizer is not None
    text = pair.tokenizer.apply_chat_template(MESSAGES)
    expected = pair.generate(text, SamplingParams(temperature=1.0, seed=seed, max_tokens=16))
    body = {"messages": MESSAGES, "max_completion_tokens": 16, "seed": seed}
    whole = live.post(CHAT, body).json()
    (choice,) = whole["choices"]
    assert whole["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert whole["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    first, *rest = live.events(CHAT, body)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"]["content"] for event in rest) == expected.text
    assert rest[-1]["choices"][0]["finish_reason"] == expected.finish_reason
    assert "usage" not in rest[-1] and "gemma_mtp" not in rest[-1]


def test_text_parts_developer_and_empty_messages_are_rendered(live: Live) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
             {"role": "user", "content": "def add(a, b):"}]  # fmt: skip
    both = [live.post(CHAT, {"messages": m, "max_tokens": 8, "seed": 1}).json() for m in (MESSAGES, parts)]
    assert both[0]["choices"] == both[1]["choices"]
    silent = [*MESSAGES, {"role": "assistant", "content": None}, {"role": "user", "content": "again"}]
    assert live.post(CHAT, {"messages": silent, "max_tokens": 2}).status_code == 200


def test_chat_goes_on_to_the_end_of_the_context_by_default(live: Live) -> None:
    tokens = [5] * (live.service.longest_prompt - 20)
    body = {"prompt": tokens, "max_tokens": 10**9, "ignore_eos": True, "temperature": 0}
    answer = live.post(COMPLETIONS, body).json()
    assert answer["usage"]["total_tokens"] == live.service.engine.max_tokens == 2048
    assert answer["choices"][0]["finish_reason"] == "length"
    messages = [{"role": "user", "content": "x " * 1980}]
    chat = live.post(CHAT, {"messages": messages, "ignore_eos": True, "temperature": 0}).json()
    assert chat["usage"]["total_tokens"] == 2048


def test_prompts_of_all_forms_and_n_choices(live: Live, pair: Pair) -> None:
    assert pair.tokenizer is not None
    ids = [pair.tokenizer.encode(text) for text in (PROMPT, "import os")]
    fields = {"n": 2, "seed": 9, "max_tokens": 8, "temperature": 0.9}
    answers = [
        live.post(COMPLETIONS, {"prompt": prompt, **fields}).json()
        for prompt in ([PROMPT, "import os"], ids)
    ]  # fmt: skip
    assert answers[0]["choices"] == answers[1]["choices"]
    assert [choice["index"] for choice in answers[0]["choices"]] == [0, 1, 2, 3]
    expected = [
        pair.generate(prompt, SamplingParams(seed=seed, max_tokens=8, temperature=0.9))
        for prompt in ids
        for seed in (9, 10)
    ]
    assert [choice["text"] for choice in answers[0]["choices"]] == [result.text for result in expected]
    assert answers[0]["usage"]["prompt_tokens"] == sum(map(len, ids)), "a prompt counts once"
    assert answers[0]["usage"]["completion_tokens"] == sum(len(result.token_ids) for result in expected)
    streamed = ["", "", "", ""]
    for event in live.events(COMPLETIONS, {"prompt": ids, **fields}):
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == [result.text for result in expected]
    single = live.post(COMPLETIONS, {"prompt": ids[0], **fields, "n": 1}).json()
    assert single["choices"][0]["text"] == expected[0].text


def test_the_largest_seed_has_a_next_one_and_negative_ones_are_taken(live: Live) -> None:
    for seed in (2**63 - 1, -1, -(2**63)):
        body = {"prompt": PROMPT, "seed": seed, "n": 2, "max_tokens": 3}
        first, second = (live.post(COMPLETIONS, body).json()["choices"] for _ in range(2))
        assert first == second


def test_without_a_seed_requests_differ(live: Live) -> None:
    body = {"prompt": "import ", "max_tokens": 16, "temperature": 1}
    assert len({live.post(COMPLETIONS, body).json()["choices"][0]["text"] for _ in range(4)}) > 1


def test_echo_begins_with_the_prompt(live: Live, pair: Pair) -> None:
    text = pair.generate(PROMPT, SamplingParams(max_tokens=4)).text
    body = {"prompt": [PROMPT, "import"], "echo": True, "max_tokens": 4, "temperature": 0}
    assert live.post(COMPLETIONS, body).json()["choices"][0]["text"] == PROMPT + str(text)
    streamed = [event["choices"][0] for event in live.events(COMPLETIONS, body)]
    assert "".join(choice["text"] for choice in streamed if choice["index"] == 0) == PROMPT + str(text)
    assert pair.tokenizer is not None
    by_ids = live.post(COMPLETIONS, {**body, "prompt": pair.tokenizer.encode(PROMPT)}).json()
    assert by_ids["choices"][0]["text"] == "<bos>" + PROMPT + str(text)


def test_completion_logprobs(live: Live, pair: Pair) -> None:
    expected = pair.generate(PROMPT, SamplingParams(max_tokens=12, logprobs=2), draft_tokens=3)
    assert expected.logprobs is not None and pair.tokenizer is not None and expected.text is not None
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 2, "draft_tokens": 3}
    logprobs = live.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    texts = [pair.tokenizer.decode([entry.token_id], skip_special_tokens=False) for entry in expected.logprobs]
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [entry.logprob for entry in expected.logprobs]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 12
    assert all(top[token] == pytest.approx(value) for top, token, value in
               zip(logprobs["top_logprobs"], texts, logprobs["token_logprobs"], strict=True))  # fmt: skip
    offsets = logprobs["text_offset"]
    assert all(expected.text[at:].startswith(text) for at, text in zip(offsets, texts, strict=True))
    parts = [event["choices"][0]["logprobs"] for event in live.events(COMPLETIONS, body)]
    assert {name: [x for part in parts for x in part[name]] for name in logprobs} == logprobs
    only_chosen = live.post(COMPLETIONS, {**body, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert [list(top) for top in only_chosen["top_logprobs"]] == [[text] for text in texts]


def test_chat_logprobs(live: Live) -> None:
    body = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = live.post(CHAT, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] and len(entry["top_logprobs"]) == 3
    events = live.events(CHAT, body)[1:]
    assert [e for event in events for e in event["choices"][0]["logprobs"]["content"]] == content
    plain = live.post(CHAT, {**body, "logprobs": False}).json()["choices"][0]
    assert plain["logprobs"] is None and plain["message"] == choice["message"]


def test_a_part_of_a_character_has_its_bytes(live: Live) -> None:
    half = live.post("/tokenize", {"prompt": "€", "add_special_tokens": False}).json()["tokens"][0]
    body = {"messages": MESSAGES, "max_tokens": 1, "logit_bias": {str(half): 100}, "temperature": 0, "logprobs": True}
    (entry,) = live.post(CHAT, body).json()["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "�" and entry["bytes"] == [0xE2]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_rounds_say_how_each_token_came_about(live: Live, pair: Pair, path: str) -> None:
    assert pair.tokenizer is not None
    prompt = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": MESSAGES}
    text = PROMPT if path == COMPLETIONS else pair.tokenizer.apply_chat_template(MESSAGES)
    sampling: dict[str, Any] = {"max_tokens": 60, "temperature": 1.0, "seed": 1}  # a text with all kinds of tokens
    body = {**prompt, **sampling, "draft_tokens": 4, "stream_options": {"include_rounds": True}}
    reports = [event["gemma_mtp"] for event in live.events(path, body) if event["gemma_mtp"] is not None]
    expected = pair.generate(text, SamplingParams(**sampling), draft_tokens=4)
    assert [(r["drafted"], r["accepted"], len(r["tokens"])) for r in reports] == [
        (r.drafted, r.accepted, r.committed) for r in expected.rounds
    ]
    assert "".join(token["text"] for report in reports for token in report["tokens"]) == expected.text
    names = {"first": "first", "accepted": "draft", "bonus": "bonus", "corrected": "correction"}
    kinds = [token["kind"] for report in reports for token in report["tokens"]]
    drafted = [r.drafted > 0 for r in expected.rounds for _ in range(r.committed)]
    for kind, rendered, with_drafts in zip(kinds, rendered_kinds(expected), drafted, strict=True):
        assert kind == names[rendered] or (kind == "plain" and not with_drafts)
    assert {"first", "draft", "bonus", "correction"} <= set(kinds)
    assert all(report["seconds"] > 0 for report in reports)


def test_plain_rounds_are_plain(live: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "draft_tokens": 0, "stream_options": {"include_rounds": True}}
    reports = [event["gemma_mtp"] for event in live.events(COMPLETIONS, body)]
    assert [token["kind"] for r in reports for token in r["tokens"]] == ["first", "plain", "plain", "plain"]


def test_ignored_and_null_fields_change_nothing(live: Live) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    extra = {"user": "somebody", "frobnicate": [1, {"a": None}], "best_of": 1, "suffix": None, "verification": "exact",
             "prediction": {"type": "content", "content": "return n"}, "response_format": {"type": "text"},
             "priority": -4, "stream_options": {"include_usage": True}, "stop": None, "n": None, "seed": None,
             "model": "gemma-mtp-bundled", "logprobs": None, "stream": None}  # fmt: skip
    texts = [live.post(COMPLETIONS, {**body, **fields}).json()["choices"] for fields in ({}, extra)]
    assert texts[0] == texts[1]
    assert set(CompletionRequest.model_fields) >= set(body)


@pytest.mark.parametrize("verification", ["rejection", "block"])
def test_other_verifications_are_offered(live: Live, pair: Pair, verification: Any) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=12)
    expected = pair.generate(PROMPT, params, draft_tokens=3, verification=verification)
    body = {"prompt": PROMPT, "seed": 2, "max_tokens": 12, "draft_tokens": 3, "verification": verification}
    assert live.post(COMPLETIONS, body).json()["choices"][0]["text"] == expected.text


SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}},
    "required": ["name", "count"], "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_expression_that_turns_out_too_complex_is_a_bad_request(
    live: Live, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles, as our bounds may let one, and no state of it can be made: that shows as it is admitted."""
    monkeypatch.setattr("gemma_mtp.decoding.expression_cost.MAX_REQUIRED", 1 << 60)
    body = {"prompt": PROMPT, "regex": "((a{1000}){1000}){1000}", "max_tokens": 5, "stream": stream}
    answer = live.post(COMPLETIONS, body)
    assert answer.status_code == (200 if stream else 400)
    assert "the regular expression can not be used" in answer.text and "invalid_value" in answer.text
    assert live.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("drafts", [0, 4])
def test_output_keeps_to_its_grammar(live: Live, drafts: int) -> None:
    body = {"prompt": PROMPT, "max_tokens": 60, "seed": 1, "draft_tokens": drafts}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    answer = live.post(COMPLETIONS, {**body, "response_format": schema}).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and set(json.loads(answer["text"])) == {"name", "count"}
    answer = live.post(COMPLETIONS, {**body, "regex": "[a-f]{3}-[0-9]{4}"}).json()["choices"][0]
    assert re.fullmatch("[a-f]{3}-[0-9]{4}", answer["text"])
    answer = live.post(COMPLETIONS, {**body, "max_tokens": 3, "response_format": {"type": "json_object"}}).json()
    assert answer["choices"][0]["text"].startswith("{")


def test_grammars_that_can_not_be_used(live: Live) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
    for extra, param in (({"response_format": schema}, "response_format"), ({"regex": "(("}, "regex"),
                         ({"regex": "a", "response_format": {"type": "json_object"}}, "regex")):  # fmt: skip
        answer = live.post(CHAT, {"messages": MESSAGES, **extra})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_whole_numbers_may_be_written_with_a_point(live: Live) -> None:
    body = b'{"prompt": [420.0, 7.27e2], "max_tokens": 3.0, "temperature": 0.0, "seed": 1e2}'
    answer = live.client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


def test_a_tiny_temperature_is_greedy(live: Live) -> None:
    texts = [
        live.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 8, "temperature": t}).json()["choices"][0]["text"]
        for t in (0, 1e-300)
    ]
    assert texts[0] == texts[1]


def test_models(live: Live) -> None:
    listed = live.client.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["gemma-mtp-bundled"]
    assert live.client.get("/v1/models/gemma-mtp-bundled").json() == listed["data"][0]
    assert live.client.get("/v1/models/another").status_code == 404


def test_tokenize_and_detokenize(live: Live, pair: Pair) -> None:
    assert pair.tokenizer is not None
    tokens = pair.tokenizer.encode(PROMPT)
    answer = live.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (tokens, len(tokens), 2048)
    assert answer["token_strs"][0] == "<bos>"
    assert live.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json()["tokens"] == tokens[1:]
    chat = live.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert chat == pair.tokenizer.encode(pair.tokenizer.apply_chat_template(MESSAGES))
    bare = live.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()["tokens"]
    assert bare == chat[: len(bare)] and len(bare) < len(chat)
    assert live.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "<bos>" + PROMPT}
    assert live.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_long_prompts_are_encoded_beside_the_event_loop(live: Live, pair: Pair) -> None:
    assert pair.tokenizer is not None
    text = "x = 1\n" * 1000
    assert live.post("/tokenize", {"prompt": text}).json()["tokens"] == pair.tokenizer.encode(text)


def test_health_and_page(live: Live) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        assert live.client.get(path).json() == {"status": "ok"}
    page = live.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "<title>gemma-mtp</title>" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    asset = live.client.get("/page/index.html")
    assert asset.text == page.text and asset.headers["content-security-policy"]
    assert live.client.get("/docs").status_code == 404, "FastAPI's own page loads scripts from elsewhere"


def test_the_description_is_true_of_this_server(live: Live) -> None:
    described = live.client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        COMPLETIONS, CHAT, "/v1/models", "/v1/models/{model_id}", "/tokenize", "/detokenize", "/tokenizer_info",
        "/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/messages",
        "/v1/messages/count_tokens",
        "/health", "/health/live",
        "/health/ready", "/metrics",
    }  # fmt: skip
    text = json.dumps(described)
    assert "HTTPValidationError" not in text and '"422"' not in text
    schemas = described["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert set(fields) == set(CompletionRequest.model_fields)
    assert set(schemas["ChatCompletionRequest"]["properties"]) == set(ChatCompletionRequest.model_fields)
    assert fields["n"]["anyOf"][0]["maximum"] == 16
    assert fields["model"]["anyOf"][0]["enum"] == ["gemma-mtp-bundled"]
    assert fields["logit_bias"]["anyOf"][0]["additionalProperties"] is False
    assert fields["prompt"]["anyOf"][2]["items"]["maximum"] == 4095
    for operation in (op for path in described["paths"].values() for op in path.values()):
        for status, answer in operation["responses"].items():
            if status != "200":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
    assert "securitySchemes" not in described["components"]


def test_metrics_count_what_happened(pair: Pair) -> None:
    with serving(pair) as live:
        body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "draft_tokens": 3}
        usage = live.post(COMPLETIONS, body).json()["usage"]
        live.post(COMPLETIONS, {"prompt": ""[:0], "temperature": -1})
        wait_for(lambda: 'status="400"' in live.client.get("/metrics").text)  # it is counted once it is sent
        answer = live.client.get("/metrics")
        lines = [line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")]
        values = {name: float(value) for name, value in lines}
        expected = pair.generate(PROMPT, SamplingParams(max_tokens=30), draft_tokens=3)
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    details = usage["completion_tokens_details"]
    labels = ',?(engine="0"|model_name="gemma-mtp-bundled")'
    assert all("model_name=" in name and "engine=" in name for name in values if name.startswith("gemma_mtp:"))
    values = {re.sub(r"\{,?", "{", re.sub(labels, "", name)).replace("{}", ""): value for name, value in values.items()}
    name = "gemma_mtp:"
    accepted = details["accepted_prediction_tokens"]
    assert values[name + "spec_decode_num_accepted_tokens_total"] == accepted
    assert values[name + "spec_decode_num_draft_tokens_total"] == expected.drafted
    assert values[name + "spec_decode_num_drafts_total"] == sum(r.drafted > 0 for r in expected.decode_rounds)
    for position in range(3):
        label = f'_per_pos_total{{position="{position}"}}'
        drafts = sum(r.drafted > position for r in expected.decode_rounds)
        assert values[f"{name}spec_decode_num_draft_tokens{label}"] == drafts
        assert values[f"{name}spec_decode_num_accepted_tokens{label}"] == sum(
            r.accepted > position for r in expected.decode_rounds
        )
    assert values[f'{name}spec_decode_draft_length_bucket{{le="2.0"}}'] == sum(
        0 < r.drafted <= 2 for r in expected.decode_rounds
    )
    assert values[name + "prompt_tokens_total"] == usage["prompt_tokens"]
    assert values[name + "generation_tokens_total"] == usage["completion_tokens"] == 30
    assert values[name + 'request_success_total{finished_reason="length"}'] == 1
    assert values[name + "time_to_first_token_seconds_count"] == 1
    assert values[name + "time_per_output_token_seconds_count"] == 1
    for each in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert values[f"{name}{each}_seconds_count"] == 1
    parts = sum(values[f"{name}request_{part}_time_seconds_sum"] for part in ("queue", "prefill"))
    assert parts == pytest.approx(values[name + "time_to_first_token_seconds_sum"])
    assert values[name + "inter_token_latency_seconds_count"] == len(expected.decode_rounds)
    assert values[name + "request_max_num_generation_tokens_sum"] == 30
    assert values[name + 'http_requests_total{route="/v1/completions",status="200"}'] == 1
    assert values[name + 'http_requests_total{route="/v1/completions",status="400"}'] == 1
    assert values[name + "num_requests_running"] == values[name + "http_requests_in_flight"] == 0


def test_metrics_under_another_prefix(pair: Pair) -> None:
    with serving(pair, metrics_prefix="vllm:") as live:
        text = live.client.get("/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="gemma-mtp-bundled"} 0.0' in text
    assert "gemma_mtp:" not in text and "process_cpu_seconds_total " in text
