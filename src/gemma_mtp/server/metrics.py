"""Prometheus metrics, under vLLM's names with our own prefix. The engine's counters are read at each scrape."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gemma_mtp.engine.thread import EngineThread

PREFIX = "gemma_mtp:"
#: seconds
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
EACH_TOKEN = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = tuple(2**power for power in range(18))


class Metrics:
    """All metrics of one server, in a registry of its own. Those that are not the process's have `labels` on every
    sample, and `prefix` in place of ours."""

    def __init__(
        self, engine: EngineThread, labels: Mapping[str, str] | None = None, prefix: str = PREFIX
    ) -> None:  # fmt: skip
        self._labels, self._prefix = dict(labels or {}), prefix
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        ProcessCollector(registry=self.registry)
        self.http_requests = self._counter("http_requests", "Answered HTTP requests.", "route", "status")
        self.requests = self._counter("request_success", "Finished choices, by why they ended.", "finished_reason")
        self.log_failures = self._counter("log_write_failures", "Log lines that could not be written.")
        self.in_flight = Gauge(
            f"{PREFIX}http_requests_in_flight", "Requests in work or waiting for the engine.", registry=self.registry
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a choice's queueing to its first token.", FIRST_TOKEN
        )
        self.each_token = self._histogram(
            "time_per_output_token_seconds", "Between a choice's tokens after the first, its mean.", EACH_TOKEN
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a choice's queueing to its last token.", WHOLE
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "Between a choice's tokens after the first, each round's mean.", EACH_TOKEN
        )
        self.queued = self._histogram("request_queue_time_seconds", "From a choice's queueing to its admission.", WHOLE)
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From a choice's admission to its first token.", WHOLE
        )
        self.decode = self._histogram("request_decode_time_seconds", "From a choice's first token to its last.", WHOLE)
        self.wanted_tokens = self._histogram(
            "request_max_num_generation_tokens", "Output tokens that a choice may have at most.", TOKENS
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request's choice.", TOKENS)
        self.output_tokens = self._histogram("request_generation_tokens", "Output tokens of a choice.", TOKENS)

    def text(self) -> bytes:
        """What /metrics answers."""
        registry = CollectorRegistry()
        registry.register(_Labelled(self.registry, self._labels, self._prefix))
        return generate_latest(registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help, buckets=buckets, registry=self.registry)


class _Labelled(Collector):
    """The metrics of a registry under another prefix, with labels on every sample."""

    def __init__(self, inner: CollectorRegistry, labels: Mapping[str, str], prefix: str) -> None:
        self._inner, self._labels, self._prefix = inner, labels, prefix

    def collect(self) -> Iterator[Metric]:
        for family in self._inner.collect():
            if not family.name.startswith(PREFIX):
                yield family
                continue
            made = Metric(self._renamed(family.name), family.documentation, family.type)
            for sample in family.samples:
                labels = {**self._labels, **sample.labels}
                made.add_sample(self._renamed(sample.name), labels, sample.value, sample.timestamp, sample.exemplar)
            yield made

    def _renamed(self, name: str) -> str:
        return self._prefix + name.removeprefix(PREFIX)


class _EngineCollector(Collector):
    """The engine's counters as metrics."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        drafted, accepted = Counts(stats.drafted_at), Counts(stats.accepted_at)
        yield _gauge("num_requests_running", "Sequences that decode now.", stats.running)
        yield _gauge("num_requests_waiting", "Sequences that wait to decode.", stats.waiting)
        used = stats.kv_blocks_used / stats.kv_blocks if stats.kv_blocks else 0.0
        kept = stats.kv_blocks_kept / stats.kv_blocks if stats.kv_blocks else 0.0
        yield _gauge("kv_cache_usage_perc", "Share of KV blocks that running sequences use, 0 to 1.", used)
        yield _gauge("kv_cache_kept_perc", "Share of KV blocks kept for prompts to come, 0 to 1.", kept)
        yield _counter("num_preemptions", "Sequences put back to wait for want of KV blocks.", stats.preemptions)
        yield _counter("prompt_tokens", "Prompt tokens.", stats.prompt_tokens)
        yield _counter("prefix_cache_queries", "Prompt tokens looked up in kept blocks.", stats.prompt_tokens)
        yield _counter("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hit_tokens)
        yield _counter("generation_tokens", "Output tokens.", stats.output_tokens)
        yield _counter("engine_steps", "Steps: one round of all running sequences.", stats.steps)
        yield _counter("engine_rounds", "Rounds of single sequences, prefills and plain ones included.", stats.rounds)
        yield _counter("spec_decode_num_drafts", "Rounds that drafted.", drafted[0])
        yield _counter("spec_decode_num_draft_tokens", "Draft tokens.", stats.draft_tokens)
        yield _counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.", stats.accepted_tokens)
        yield _by_position("draft", "Draft tokens by position in the round, from 0.", drafted)
        yield _by_position("accepted", "Accepted draft tokens by position in the round, from 0.", accepted)
        yield _draft_lengths(drafted)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help, value=value)


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, help, value=value)


def _by_position(which: str, help: str, counts: Counts[int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}spec_decode_num_{which}_tokens_per_pos", help, labels=["position"])
    for position, count in sorted(counts.items()):
        family.add_metric([str(position)], count)
    return family


def _draft_lengths(drafted: Counts[int]) -> Metric:
    """A histogram of drafts a round, of the rounds that drafted: those of more than k made a draft at position k."""
    rounds, longest = drafted[0], max(drafted, default=0) + 1
    buckets = [(f"{length}.0", float(rounds - drafted[length])) for length in range(1, longest + 1)]
    return HistogramMetricFamily(
        f"{PREFIX}spec_decode_draft_length", "Drafts of a round that drafted.",
        buckets=[*buckets, ("+Inf", float(rounds))], sum_value=float(sum(drafted.values())),
    )  # fmt: skip
