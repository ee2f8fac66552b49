"""Whom the server lets in: keys, hosts, and other sites' pages."""

from pathlib import Path

import pytest
from live_server import COMPLETIONS, SHORT, error_of, serving

from gemma_mtp.engine.pair import Pair
from gemma_mtp.errors import ServerError
from gemma_mtp.server import run
from gemma_mtp.server.settings import read_keys

KEYS = ("first-key", "second-key-é")


def test_only_requests_with_a_key_are_let_in(pair: Pair) -> None:
    with serving(pair, api_keys=KEYS) as live:
        refused = ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2",
                   "Bearer first-ke", "bearer second-key", "Bearer first-key,second-key-é"]  # fmt: skip
        for value in refused:
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/openapi.json"),
                                 ("GET", "/metrics"), ("GET", "/nothing"), ("POST", "/tokenize")):  # fmt: skip
                answer = live.client.request(method, path, headers=[(b"Authorization", value.encode())])
                error = error_of(answer, 401)
                assert error["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
                assert not any(key in answer.text for key in KEYS)
        assert live.client.get("/v1/models").status_code == 401
        twice = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer wrong")]
        assert live.client.get("/v1/models", headers=twice).status_code == 401
        for key in KEYS:
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert live.post(COMPLETIONS, SHORT, headers=headers).status_code == 200
        for path in ("/", "/health", "/health/live", "/health/ready", "/page/index.html"):
            assert live.client.get(path).status_code == 200
        described = live.client.get("/openapi.json", headers={"Authorization": "bearer first-key"}).json()
        assert described["paths"][COMPLETIONS]["post"]["security"] == [{"key": []}]
        assert "401" in described["paths"]["/metrics"]["get"]["responses"]
        assert "security" not in described["paths"]["/health"]["get"]
    with serving(pair, api_keys=KEYS, public_metrics=True) as live:
        assert live.client.get("/metrics").status_code == 200


def test_without_keys_only_this_machines_own_names_are_answered(pair: Pair) -> None:
    with serving(pair, loopback_names_only=True) as live:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            error_of(live.client.get("/v1/models", headers={"Host": host}), 403)
        for host in ("localhost", f"localhost:{live.port}", "127.0.0.1", "LOCALHOST:1", "[::1]:8000", "[::1]"):
            assert live.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_sites_pages_are_let_in_only_where_asked_for(pair: Pair) -> None:
    ask = {"Origin": "https://ours.example", "Access-Control-Request-Method": "POST"}
    with serving(pair) as live:
        answer = live.client.options(COMPLETIONS, headers=ask)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
    with serving(pair, allow_origins=("https://ours.example",), api_keys=KEYS) as live:
        answer = live.client.options(COMPLETIONS, headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        other = live.client.options(COMPLETIONS, headers={**ask, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_keys_are_read_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n  beta  \nalpha\n", encoding="utf-8")
    assert read_keys(file, "gamma,delta epsilon\n") == ("gamma", "delta", "epsilon", "alpha", "beta")
    assert read_keys(None, "") == ()
    file.write_text("# none yet\n\n", encoding="utf-8")
    with pytest.raises(ServerError, match="has no keys"):
        read_keys(file, "gamma")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_which_hosts_are_loopback(host: str, loopback: bool) -> None:
    assert run.is_loopback(host) == loopback
