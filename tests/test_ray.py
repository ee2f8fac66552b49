"""The server on Ray Serve: its parts by themselves, and (slow) a cluster that loses a replica and is redeployed."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import live_server
import pytest
import ray
import virtual_time
import yaml
from live_server import SECONDS
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from gemma_mtp.backend.native import set_threads
from gemma_mtp.cli.serve import (
    DraftingOptions,
    EngineOptions,
    LimitOptions,
    ListeningOptions,
    LogOptions,
    ServedPair,
)
from gemma_mtp.decoding.noise import MAX_DRAFT_TOKENS
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.pair import Pair
from gemma_mtp.engine.settings import EngineSettings
from gemma_mtp.engine.thread import EngineThread
from gemma_mtp.errors import ServerError
from gemma_mtp.server.metrics import PREFIX
from gemma_mtp.server.ray_app import Pulse, build
from gemma_mtp.server.ray_ingress import Door, Forwarded, is_opening, merge_metrics
from gemma_mtp.server.ray_routing import BEGINNING, ConversationRouter, conversation_of, home_of
from gemma_mtp.server.ray_settings import RaySettings
from gemma_mtp.server.response_store import PATH as STORED
from gemma_mtp.server.response_store import new_id, server_of
from gemma_mtp.server.settings import ServerSettings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


# arguments


def test_arguments_are_read_from_text() -> None:
    settings = RaySettings.parse(
        {"target": "models/e2b", "max_running": "8", "max_replicas": "4", "no_auth": "true", "draft_tokens": "3"}
    )
    server, options = settings.server(()), settings.replica_options()
    assert (server.model_name, server.draft_tokens, server.loopback_names_only) == ("e2b", 3, False)
    assert settings.engine() == EngineSettings(max_running=8)
    assert options["max_ongoing_requests"] == 16 and "num_replicas" not in options
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["autoscaling_config"]["target_ongoing_requests"] == 8


def test_as_many_replicas_as_told_do_not_scale() -> None:
    options = RaySettings.parse({"min_replicas": 3}).replica_options()
    assert options["num_replicas"] == 3 and "autoscaling_config" not in options


#: options of `gemma-mtp serve` that Serve has itself, and one whose argument says the opposite
SERVES_OWN, OPPOSITE = {"host", "port"}, {"no_prefix_reuse": "prefix_reuse"}


def test_there_is_an_argument_for_every_option_of_serve() -> None:
    groups = (ListeningOptions, EngineOptions, LimitOptions, ServedPair, DraftingOptions, LogOptions)
    names = {field.name for group in groups for field in dataclasses.fields(group)}
    wanted = {OPPOSITE.get(name, name) for name in names - SERVES_OWN}
    assert wanted <= set(RaySettings.model_fields)
    for name in SERVES_OWN:
        with pytest.raises(ServerError, match=f"there is no argument {name};"):
            build({name: "1"})


def test_metrics_and_pages_are_those_of_the_arguments() -> None:
    settings = RaySettings.parse({"metrics_prefix": "vllm:", "allow_origin": "https://a.example, https://b.example"})
    server = settings.server(())
    assert server.metrics_prefix == "vllm:" and server.allow_origins == ("https://a.example", "https://b.example")
    text = ask(Replicas(), path="/metrics", metrics_prefix="vllm:").text
    assert 'vllm:ingress_retries_total{replica="ingress-1"} 0.0' in text


def test_without_keys_only_localhost_is_answered() -> None:
    settings = RaySettings.parse({})
    assert settings.server(()).loopback_names_only and not settings.server(("key",)).loopback_names_only


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_runing": "8"}, "there is no argument max_runing; there are target, drafter"),
        ({"max_running": "many"}, "max_running=many: "),
        ({"max_running": "0"}, "max_running=0: "),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must not be below min_replicas"),
        ({"draft_tokens": str(MAX_DRAFT_TOKENS + 1)}, "draft_tokens must be auto or 0 to "),
        ({"draft_tokens": "some"}, "draft_tokens=some: "),
        ({"drafter": "a", "no_drafter": "true"}, "drafter and no_drafter exclude each other"),
        ({"max_queued_requests": "0"}, "max_queued_requests=0: "),
        ({"max_surge_percent": "101"}, "max_surge_percent=101: "),
        ({"request_seconds": "nan"}, "request_seconds=nan: "),
        ({"allow_origin": "https://a.example,b.example"}, "allow_origin is 'b.example', but must be an origin"),
        ({"metrics_prefix": "a b"}, "metrics_prefix is 'a b', but must be letters, digits and _"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ServerError) as raised:
        build(arguments)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("name", ["ray", "kuberay", "vllm"])
def test_example_configs_are_what_serve_and_we_take(name: str) -> None:
    config = yaml.safe_load((Path(__file__).parents[1] / f"examples/serve/{name}.yaml").read_text(encoding="utf-8"))
    if name == "kuberay":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    if name == "vllm":
        (model,) = application.args["llm_configs"]
        assert model["engine_kwargs"]["speculative_config"]["method"] == "mtp"
    else:
        assert application.import_path == f"{build.__module__}:{build.__name__}"
        assert RaySettings.parse(application.args).max_replicas == 8


# routing


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ["system"] + ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **fields}


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (chat("Be brief.", "Hello"), chat("Be brief.", "Hello", "Hi", "And now?")),
    (chat("Be brief.", "Hello", user="ann"), chat("Be long.", "Bye", user="ann")),
    (chat("", "a", prompt_cache_key="k", user="ann"), chat("", "b", prompt_cache_key="k", user="bob")),
    ({"prompt": "x" * BEGINNING}, {"prompt": "x" * BEGINNING + "y"}),
    ({"prompt": list(range(BEGINNING))}, {"prompt": [*range(BEGINNING), 7]}),
    ({"prompt": "one"}, {"prompt": ["one", "two"]}),
    ({"prompt": [1, 2]}, {"prompt": [[1, 2], [3]]}),
    ({"input": "x" * BEGINNING}, {"input": "x" * BEGINNING + "y"}),
    ({"input": chat("", "a")["messages"]}, {"input": [*chat("", "a", "b")["messages"], {"type": "function_call"}]}),
]
DIFFERENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (chat("Be brief.", "Hello"), chat("Be brief.", "Good day")),
    (chat("Be brief.", "Hello"), chat("Be long.", "Hello")),
    (chat("", "a", user="ann"), chat("", "a", user="bob")),
    ({"prompt": "x" * BEGINNING}, {"prompt": "y" + "x" * BEGINNING}),
    ({"prompt": [1, 2]}, {"prompt": [2, 1]}),
    ({"prompt": "ann"}, chat("", "a", user="ann")),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_requests_of_a_conversation_have_one_key(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert conversation_of([], a) == conversation_of([], b) != ""


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_conversations_have_different_keys(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert conversation_of([], a) != conversation_of([], b)


def test_a_session_header_goes_before_all_else() -> None:
    header = [(b"x-session-id", b"s1")]
    assert conversation_of(header, chat("", "a")) == conversation_of(header, chat("", "b", user="ann"))
    assert conversation_of(header, {}) != conversation_of([(b"x-session-id", b"s2")], {})


@pytest.mark.parametrize("body", [None, [], {}, {"prompt": ""}, {"prompt": []}, {"prompt": 3}, {"messages": []}])
def test_what_has_no_beginning_has_no_key(body: Any) -> None:
    assert conversation_of([], body) == ""


def test_a_lost_replica_moves_its_own_conversations_only() -> None:
    replicas, conversations = ["r1", "r2", "r3", "r4"], [f"c{i}" for i in range(400)]
    homes = {c: home_of(c, replicas) for c in conversations}
    assert min(Counter(homes.values()).values()) > 50  # of 100 expected: less has a chance below 1e-8
    after = {c: home_of(c, replicas[1:]) for c in conversations}
    assert {c for c in conversations if homes[c] != after[c]} == {c for c in conversations if homes[c] == "r1"}
    assert homes == {c: home_of(c, replicas[::-1]) for c in conversations}


def choose(loads: dict[str, int], conversation: str, room: int = 4, replica: str = "") -> list[list[str]]:
    """The ids of the ranks that a router makes of replicas with so many requests each."""

    async def ranks() -> list[list[str]]:
        router = ConversationRouter(
            DeploymentID("Replica"), DeploymentHandleSource.UNKNOWN, use_replica_queue_len_cache=True
        )
        router.initialize_state(room=room)
        replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in loads]
        router._load = lambda replica_id: loads[replica_id.unique_id]  # type: ignore[method-assign]
        request = SimpleNamespace(
            args=[SimpleNamespace(conversation=conversation, replica=replica)],
            routing_context=SimpleNamespace(should_backoff=False),
        )
        made = await router.choose_replicas(replicas, request)  # type: ignore[arg-type]
        assert request.routing_context.should_backoff
        return [[replica.replica_id.unique_id for replica in rank] for rank in made]

    return asyncio.run(ranks())


def test_a_request_goes_home_then_to_two_others() -> None:
    home = home_of("c", ["a", "b", "c", "d"])
    first, second = choose(dict.fromkeys("abcd", 3), "c")
    assert first == [home] and len(second) == 2 and home not in second


def test_a_busy_home_is_passed_over_while_another_has_room() -> None:
    home = home_of("c", ["a", "b", "c"])
    other, free = sorted({"a", "b", "c"} - {home})
    ranks = choose({home: 4, other: 4, free: 1}, "c")
    assert ranks[:2] == [[free], [home]]
    assert choose({home: 9, other: 4, free: 5}, "c")[0] == [home]  # nowhere is room


def test_without_a_conversation_two_are_drawn() -> None:
    (rank,) = choose(dict.fromkeys("abcd", 0), "")
    assert len(set(rank)) == 2
    assert choose({"a": 0}, "") == [["a"]]
    assert choose({"a": 0}, "c") == [["a"], []]


def test_a_stored_response_is_asked_for_where_it_is() -> None:
    assert choose({"a": 9, "b": 0, "c": 0}, "c", replica="a") == [["a"]]
    assert len(choose({"a": 0, "b": 0}, "c", replica="gone")) == 2  # which says that it is not kept


#: what names replica r2
OF_R2: list[tuple[str, Any]] = [
    (f"{STORED}/{new_id('resp', '_r2')}", None),
    (f"{STORED}/{new_id('resp', '_r2')}/cancel", {}),
    (STORED, {"input": "a", "previous_response_id": new_id("resp", "_r2")}),
    (STORED, {"input": [{"role": "user", "content": "a"}, {"type": "item_reference", "id": new_id("rs", "_r2")}]}),
]


@pytest.mark.parametrize(("path", "body"), OF_R2, ids=range(len(OF_R2)))  # names of their own would be random
def test_ids_say_which_replica_has_a_response(path: str, body: Any) -> None:
    replicas = Replicas(WHOLE)
    assert ask(replicas, body, path=path).status_code == 200
    assert replicas.asked[0].replica == "r2"


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, OF_R2[2][1]), (STORED, {"input": "a"}), (STORED, {"input": [3, {"id": new_id("rs", "_r2")}]}),
     (STORED, [1]), (f"{STORED}/{new_id('resp', '')}", None), (f"{STORED}/x_r2", None),
     (STORED, {"previous_response_id": 3})],
    ids=range(7),
)  # fmt: skip
def test_what_is_about_nothing_stored_names_no_replica(path: str, body: Any) -> None:
    assert server_of(path, body) == ""


# the ingress, with replicas that do as the test says

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
JSON_START = {
    "type": "http.response.start", "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"x-request-id", b"r")],
}  # fmt: skip
OPENING = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}\n\n'
SAYS = b'data: {"choices": [{"delta": {"role": null, "content": "x"}, "finish_reason": null}]}\n\n'


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


WHOLE = [JSON_START, part(b'{"whole": 1}', more=False)]
STREAM = [START, part(OPENING), part(SAYS), part(b"data: [DONE]\n\n", more=False)]


class Replicas:
    """A deployment handle. Each request is answered by the next of `scripts`: messages, errors, or None for silence."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.asked, self.cancelled = list(scripts), list[Forwarded](), 0
        self.failure: Exception | None = None

    def options(self, **options: Any) -> Replicas:
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, request: Forwarded) -> Replicas:
        self.asked.append(request)
        self.failure = None
        self.steps = iter(self.scripts.pop(0))
        return self

    def cancel(self) -> None:
        if self.failure is not None:  # as Serve's own does
            raise self.failure
        self.cancelled += 1

    async def __anext__(self) -> Any:
        try:
            step = next(self.steps)
        except StopIteration:
            raise StopAsyncIteration from None
        if step is None:
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            self.failure = step
            raise step
        return dict(step)

    def broadcast(self, method: str) -> Any:
        assert method == "metrics"

        async def results_async(**options: Any) -> list[Any]:
            return [
                ("r1", b"# TYPE a counter\na_total 1.0\n"),
                ActorDiedError(),
                ("r2", b"# TYPE a counter\na_total 2\n"),
            ]

        return SimpleNamespace(results_async=results_async)


def ask(
    replicas: Replicas,
    body: Any = None,
    path: str = COMPLETIONS,
    headers: dict[str, str] | None = None,
    **settings: Any,
) -> httpx.Response:
    """What the ingress answers: a POST where there is a body."""

    async def asked() -> httpx.Response:
        door = Door(ServerSettings(**settings), replicas, "ingress-1")  # type: ignore[arg-type]
        transport = httpx.ASGITransport(door.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            if body is None:
                return await client.get(path, headers=headers)
            return await client.post(path, json=body, headers=headers)

    return virtual_time.run(asked())


def test_an_answer_comes_through_with_one_request_id_at_most() -> None:
    replicas = Replicas(WHOLE)
    answer = ask(replicas, {"prompt": "a"}, headers={"X-Other": "1"})
    assert (answer.status_code, answer.json()) == (200, {"whole": 1})
    assert "x-request-id" not in answer.headers  # Serve's proxy says it
    (request,) = replicas.asked
    assert (request.method, request.path, json.loads(request.body)) == ("POST", COMPLETIONS, {"prompt": "a"})
    assert (b"x-other", b"1") in request.headers and request.conversation == conversation_of([], {"prompt": "a"})
    assert replicas.cancelled == 0


@pytest.mark.parametrize(
    "first",
    [
        [ActorDiedError()],
        [JSON_START, ActorDiedError()],
        [START, ActorDiedError()],
        [START, part(OPENING), part(OPENING), ActorDiedError()],
        [START, part(OPENING)],
        [{**JSON_START, "status": 503}, part(b"{}", more=False)],
    ],
)
def test_a_request_is_sent_again_where_nothing_was_said(first: list[Any]) -> None:
    replicas = Replicas(first, STREAM)
    answer = ask(replicas, {"prompt": "a"})
    assert answer.content == OPENING + SAYS + b"data: [DONE]\n\n"
    assert len(replicas.asked) == 2 and replicas.asked[0] == replicas.asked[1]


def test_a_stream_that_spoke_ends_with_an_error() -> None:
    replicas = Replicas([START, part(OPENING), part(SAYS), ActorDiedError()], STREAM)
    answer = ask(replicas, {"prompt": "a"})
    assert answer.content.startswith(OPENING + SAYS + b"data: ")
    error = json.loads(answer.content[len(OPENING + SAYS) :].removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("replica_lost", "server_error") and set(error) == {
        "message", "type", "param", "code",
    }  # fmt: skip
    assert b"[DONE]" not in answer.content and len(replicas.asked) == 1


def test_a_request_that_loses_every_replica_fails_in_words() -> None:
    answer = ask(Replicas([ActorDiedError()], [ActorDiedError()]), {"prompt": "a"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost"
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (BackPressureError(8, 8), 429, "rate_limit_exceeded"),
        (DeploymentUnavailableError(DeploymentID("Replica")), 503, "service_unavailable"),
        (RayTaskError("answer", "traceback: secret", ValueError("secret")), 500, "internal_error"),
    ],
)
def test_failures_have_openais_shape(failure: Exception, status: int, code: str) -> None:
    answer = ask(Replicas([failure]), {"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("retry-after" in answer.headers) == (status != 500) and "secret" not in answer.text


def test_a_request_ends_with_its_time() -> None:
    silent = Replicas([None])
    assert ask(silent, {"prompt": "a"}, request_seconds=0.05).status_code == 408
    assert silent.cancelled == 1
    stalls = Replicas([START, part(SAYS), None])
    assert b'"code": "request_timeout"' in ask(stalls, {"prompt": "a"}, request_seconds=0.2).content


def test_the_ingress_refuses_before_it_asks() -> None:
    replicas = Replicas()
    assert ask(replicas, {"prompt": "a"}, api_keys=("k",)).status_code == 401
    assert ask(replicas, {"prompt": "a" * 200}, max_body_bytes=100).status_code == 413
    assert ask(replicas, {"prompt": "a"}, max_concurrent=0).status_code == 429
    assert replicas.asked == []


def test_errors_have_the_form_of_the_routes_clients() -> None:
    body = ask(Replicas(), {"messages": []}, "/v1/messages", api_keys=("k",)).json()
    assert body["type"] == "error" and body["error"]["type"] == "authentication_error"
    stalls = Replicas([START, part(SAYS), None])
    broken = ask(stalls, {"messages": []}, "/v1/messages", request_seconds=0.2).content
    assert b'event: error\ndata: {"type": "error"' in broken


def test_pages_of_allowed_origins_read_what_the_ingress_says() -> None:
    headers = {"Origin": "https://a.example"}
    answer = ask(Replicas(), {"prompt": "a"}, headers=headers, api_keys=("k",), allow_origins=("https://a.example",))
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://a.example"
    refused = ask(Replicas(), {"prompt": "a"}, headers=headers, api_keys=("k",))
    assert "access-control-allow-origin" not in refused.headers


def test_metrics_are_those_of_all_processes() -> None:
    text = ask(Replicas(), path="/metrics").text
    assert 'a_total{replica="r1"} 1.0' in text and 'a_total{replica="r2"} 2.0' in text
    assert 'gemma_mtp:ingress_retries_total{replica="ingress-1"} 0.0' in text


def test_merged_metrics_keep_their_labels_and_buckets() -> None:
    text = (
        b'# HELP h Help.\n# TYPE h histogram\nh_bucket{le="1.0"} 2.0\nh_bucket{le="+Inf"} 3.0\nh_count 3.0\nh_sum 4.0\n'
    )
    merged = merge_metrics([("a", text), ("b", text)]).decode()
    assert merged.count("# TYPE h histogram") == 1
    assert 'h_bucket{le="1.0",replica="b"} 2.0' in merged and 'h_sum{replica="a"} 4.0' in merged


@pytest.mark.parametrize("event", [SAYS, b"data: [DONE]\n\n", b"data: {}\n\n", b"data: 1\n\n", b"", b"data: \xff\n\n"])
def test_what_says_something_is_no_opening(event: bytes) -> None:
    assert is_opening(OPENING) and not is_opening(event)


# health


def test_an_idle_engine_is_healthy_and_a_stopped_one_is_not(pair: Pair) -> None:
    with EngineThread(pair) as engine:
        asyncio.run(Pulse(engine, SECONDS).check())
        assert engine.stats().output_tokens == 1
    dead = EngineThread(pair)  # its thread never runs
    with pytest.raises(RuntimeError, match="not decoded a token"):
        asyncio.run(Pulse(dead, 0.05).check())


def test_a_busy_engine_must_get_on() -> None:
    stats, now = SimpleNamespace(running=1, waiting=0, steps=5), [0.0]
    engine = SimpleNamespace(stats=lambda: stats)
    pulse = Pulse(engine, 60.0, clock=lambda: now[0])  # type: ignore[arg-type]
    asyncio.run(pulse.check())
    now[0] = 59.0
    asyncio.run(pulse.check())
    stats.steps, now[0] = 6, 61.0
    asyncio.run(pulse.check())
    now[0] = 121.0
    with pytest.raises(RuntimeError, match="no step for 60 seconds"):
        asyncio.run(pulse.check())


# a cluster

PROMPTS = ("def fibonacci(n):\n", "class Stack:\n", "import os\n", "def quicksort(items):\n")
ARGUMENTS: dict[str, Any] = {
    "min_replicas": 2, "num_cpus": 0, "threads": 1, "max_running": 8, "max_tokens": 1024, "draft_tokens": 2,
    "max_ongoing_requests": 12, "max_queued_requests": 8, "drain_seconds": 60, "health_seconds": 2,
}  # fmt: skip


@dataclass
class Cluster:
    url: str
    expected: dict[tuple[str, int], str]

    def body(self, prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
        return {
            "prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": 7, "ignore_eos": True, **fields,
        }  # fmt: skip

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS)


@dataclass
class Heard:
    """A stream as it was read: the replica that spoke, what it said, and how it ended."""

    replica: str = ""
    text: str = ""
    done: bool = False
    error: dict[str, Any] | None = None
    begun: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(scope="module")
def cluster(pair: Pair) -> Iterator[Cluster]:
    assert pair.tokenizer is not None
    set_threads(1)  # as the replicas; several at once leave no core for a second one
    expected = dict[tuple[str, int], str]()
    for prompt in PROMPTS:
        params = SamplingParams(max_tokens=300, temperature=0.8, seed=7, ignore_eos=True)
        token_ids = pair.generate(prompt, params, draft_tokens=2).token_ids
        expected |= {(prompt, n): pair.tokenizer.decode(token_ids[:n]) for n in (24, 300)}
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, configure_logging=False)
    try:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(ARGUMENTS), name="gemma", route_prefix="/")
        yield Cluster(f"http://127.0.0.1:{port}", expected)
    finally:
        serve.shutdown()
        ray.shutdown()


wait_for = functools.partial(live_server.wait_for, pause=0.2)  # conditions ask the cluster


def replica_actors() -> dict[str, str]:
    """The engine replicas' actors, by replica id."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return {name.rpartition("#")[2]: name for name in names if "#Replica#" in name}


def listen(cluster: Cluster, body: dict[str, Any], heard: Heard, session: str = "") -> Heard:
    with (
        cluster.client() as client,
        client.stream("POST", COMPLETIONS, json={**body, "stream": True}, headers={"X-Session-Id": session}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        heard.replica = answer.headers["x-gemma-mtp-replica"]
        for line in filter(None, answer.iter_lines()):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                heard.done = True
            elif "error" in (event := json.loads(data)):
                heard.error = event["error"]
            else:
                heard.text += event["choices"][0]["text"]
                heard.begun.set()
    return heard


def sessions_of(replica: str, count: int) -> list[str]:
    """Names of sessions that have their home there."""
    names = (f"s{i}" for i in itertools.count())
    homes = sorted(replica_actors())
    at_home = (s for s in names if home_of(conversation_of([(b"x-session-id", s.encode())], {}), homes) == replica)
    return list(itertools.islice(at_home, count))


@pytest.mark.slow
def test_a_cluster_answers_as_the_pair_does_and_keeps_conversations_together(cluster: Cluster) -> None:
    replicas: dict[str, set[str]] = {}
    with cluster.client() as client:
        assert client.get("/health/ready").status_code == 200
        for prompt in PROMPTS:
            whole = client.post(COMPLETIONS, json=cluster.body(prompt, 24))
            assert whole.json()["choices"][0]["text"] == cluster.expected[prompt, 24]
            heard = listen(cluster, cluster.body(prompt, 24), Heard())
            assert (heard.text, heard.done, heard.error) == (cluster.expected[prompt, 24], True, None)
        for session in range(8):
            for prompt in PROMPTS[:3]:
                body = cluster.body(prompt, 2)
                answer = client.post(COMPLETIONS, json=body, headers={"X-Session-Id": f"s{session}"})
                replicas.setdefault(f"s{session}", set()).add(answer.headers["x-gemma-mtp-replica"])
                assert len(answer.headers.get_list("x-request-id")) == 1
        assert all(len(homes) == 1 for homes in replicas.values())
        assert len(set.union(*replicas.values())) == 2  # by one hash in 128 they would all share a home
        bad = client.post(COMPLETIONS, json={"prompt": 3})
        assert bad.status_code == 400 and set(bad.json()["error"]) == {"message", "type", "param", "code"}
        assert all(f'replica="{name}"' in client.get("/metrics").text for name in replica_actors())


@pytest.mark.slow
def test_a_stored_response_is_found_whichever_replica_has_it(cluster: Cluster) -> None:
    with cluster.client() as client:
        seen = set()
        for i in range(12):
            limits = {"max_output_tokens": 4, "temperature": 0, "instructions": f"{i}"}
            first = client.post(STORED, json={"input": [{"role": "user", "content": f"{i}"}], **limits})
            assert first.status_code == 200, first.text
            replica, name = first.headers["x-gemma-mtp-replica"], first.json()["id"]
            seen.add(replica)
            got = client.get(f"{STORED}/{name}")
            assert got.json() == first.json() and got.headers["x-gemma-mtp-replica"] == replica
            for item in ("input", first.json()["output"][0]["id"]):
                more = {"previous_response_id": name, "input": "and"} if item == "input" else {
                    "input": [{"type": "item_reference", "id": item}, {"role": "user", "content": "and"}]
                }  # fmt: skip
                next_one = client.post(STORED, json={**more, **limits})
                assert next_one.status_code == 200 and next_one.headers["x-gemma-mtp-replica"] == replica
            assert client.delete(f"{STORED}/{name}").json()["deleted"]
            assert client.get(f"{STORED}/{name}").status_code == 404
        assert len(seen) == 2  # by one hash in 2048 they would all share a home


@pytest.mark.slow
def test_a_client_that_leaves_frees_its_replica(cluster: Cluster) -> None:
    with cluster.client() as client:
        body = cluster.body(PROMPTS[0], 1000, draft_tokens=0, n=4, stream=True)
        with client.stream("POST", COMPLETIONS, json=body) as answer:
            lines = answer.iter_lines()  # kept: httpx hangs up when they are forgotten
            next(lines)
            wait_for(lambda: _samples(client, "num_requests_running") == 4)
        wait_for(lambda: _samples(client, "num_requests_running") == 0)
        assert _samples(client, "request_success_total", finished_reason="cancelled") == 4


def _samples(client: httpx.Client, name: str, **labels: str) -> float:
    """Sum over all processes."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
    )


@pytest.mark.slow
def test_more_requests_than_may_wait_are_told_to_come_again(cluster: Cluster) -> None:
    def ask(i: int) -> httpx.Response:
        with cluster.client() as client:
            return client.post(COMPLETIONS, json=cluster.body(PROMPTS[i % 4], 24))

    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(ask, range(48)))
    taken = [(i, answer) for i, answer in enumerate(answers) if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) + len(refused) == 48 and len(taken) >= 8 and refused
    assert all(answer.json()["choices"][0]["text"] == cluster.expected[PROMPTS[i % 4], 24] for i, answer in taken)
    assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


@pytest.mark.slow
def test_a_killed_replica_takes_no_other_request_with_it(cluster: Cluster) -> None:
    """Each replica has three streams and three whole answers under way when one of the two dies."""
    replicas = sorted(replica_actors())
    victim = replicas[0]
    sessions = [session for replica in replicas for session in sessions_of(replica, 6)]
    heard = [Heard() for _ in range(6)]

    def whole(i: int, session: str) -> str:
        with cluster.client() as client:
            body = cluster.body(PROMPTS[i % 4], 300)
            answer = client.post(COMPLETIONS, json=body, headers={"X-Session-Id": session})
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(12) as threads:
        streams = [
            threads.submit(listen, cluster, cluster.body(PROMPTS[i % 4], 300), heard[i], session)
            for i, session in enumerate(sessions[::2])
        ]
        assert all(one.begun.wait(SECONDS) for one in heard)
        # after the streams: twelve at one instant are more than may wait
        wholes = [threads.submit(whole, i, session) for i, session in enumerate(sessions[1::2])]
        with cluster.client() as client:
            wait_for(lambda: _samples(client, "num_requests_running") >= 9)
        under_way = sum(not future.done() for future in wholes[:3])
        ray.kill(ray.get_actor(replica_actors()[victim], namespace="serve"))
        results = [future.result(SECONDS) for future in streams]
        texts = [future.result(SECONDS) for future in wholes]
    assert [one.replica for one in heard] == [victim] * 3 + [replicas[1]] * 3
    assert texts == [cluster.expected[PROMPTS[i % 4], 300] for i in range(6)]
    rights = [cluster.expected[PROMPTS[i % 4], 300] for i in range(6)]
    assert [one.text for one in results[3:]] == rights[3:] and all(one.done for one in results[3:])
    broken = [one for one in results if one.error is not None]
    assert broken and {one.error["code"] for one in broken if one.error} == {"replica_lost"}
    for one, right in zip(results[:3], rights, strict=False):
        assert one.done == (one.error is None)
        assert one.text == right if one.done else right.startswith(one.text)
    with cluster.client() as client:
        assert _samples(client, "ingress_broken_answers_total") == len(broken)
        assert 1 <= _samples(client, "ingress_retries_total") <= under_way


@pytest.mark.slow
def test_a_new_version_takes_over_and_nothing_is_lost(cluster: Cluster) -> None:
    wait_for(lambda: len(replica_actors()) == 2)
    before, stop = set(replica_actors()), threading.Event()

    def keep_asking(i: int) -> tuple[int, set[str]]:
        asked, replicas = 0, set[str]()
        with cluster.client() as client:
            while not stop.is_set():
                prompt = PROMPTS[(asked + i) % 4]
                answer = client.post(COMPLETIONS, json=cluster.body(prompt, 24))
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == cluster.expected[prompt, 24]
                replicas.add(answer.headers["x-gemma-mtp-replica"])
                asked += 1
        return asked, replicas

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(keep_asking, i) for i in range(2)]
        long = threads.submit(listen, cluster, cluster.body(PROMPTS[0], 300), Heard())
        try:
            serve.run(build({**ARGUMENTS, "max_waiting": 32}), name="gemma", route_prefix="/")
        finally:
            stop.set()
        answered = [future.result(SECONDS) for future in asking]
        heard = long.result(SECONDS)
    assert (heard.text, heard.done, heard.error) == (cluster.expected[PROMPTS[0], 300], True, None)
    assert all(asked > 0 for asked, _ in answered)
    assert heard.replica in before
    wait_for(lambda: len(replica_actors()) == 2)
    assert not before & set(replica_actors())
