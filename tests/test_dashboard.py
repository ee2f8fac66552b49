"""The Grafana dashboard asks for metrics that a server has, with labels that they have."""

import json
import re
from pathlib import Path
from typing import Any

from live_server import serving
from prometheus_client.parser import text_string_to_metric_families

from gemma_mtp.engine.pair import load_pair

FILE = Path(__file__).parents[1] / "docs" / "use" / "grafana.json"
DRAFTING = ("spec_decode_num_accepted_tokens_per_pos", "spec_decode_draft_length", "spec_decode_num_drafts")


def test_its_metrics_are_there() -> None:
    panels: list[dict[str, Any]] = json.loads(FILE.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    with serving(load_pair()) as live:
        live.post("/v1/completions", {"prompt": "import", "max_tokens": 12, "draft_tokens": 2})
        text = live.client.get("/metrics").text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in expressions:
        names = re.findall(r"gemma_mtp:\w+", expression)
        asked = {label for group in re.findall(r"by \((\w+)\)", expression) for label in [group]} | {"model_name"}
        assert names and expression.count("(") == expression.count(")")
        for name in names:
            assert asked <= labels[name], f"{name} has no {asked - labels[name]}"
    assert all(any(name in expression for expression in expressions) for name in DRAFTING)
