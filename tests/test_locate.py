"""Checkpoints by name: the Hugging Face cache, `bundled`, drafters that are found, and `gemma-mtp pull`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from models import agreeing_pair, save_pair
from test_cli import refused

from gemma_mtp.checkpoint import open_source, read_drafter_config, read_target_config
from gemma_mtp.cli import main
from gemma_mtp.engine.pair import bundled_directory, load_pair
from gemma_mtp.engine.start import check_weights_fit
from gemma_mtp.errors import CheckpointError
from gemma_mtp.locate import drafter_places, find_drafter, is_hub_name, locate

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "acme/tiny-it"
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's two directories."""
    root = tmp_path_factory.mktemp("pair")
    save_pair(root, *agreeing_pair())
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    directory = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    return directory


def put(cache: Path, name: str, directory: Path, without: str = "") -> Path:
    """A model in the hub's own layout: blobs, a snapshot of links to them, and a reference of the branch."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT, encoding="ascii")
    for file in directory.iterdir():
        if file.name != without:
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_name_is_found_in_the_cache_and_so_is_its_drafter(
    cache: Path, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = put(cache, NAME, files / "target")
    assert locate(NAME) == snapshot
    assert find_drafter(NAME) is None
    with caplog.at_level(logging.WARNING, "gemma_mtp"):
        assert load_pair(NAME).drafter is None
    assert f"no drafter of {NAME} was found ({NAME}-assistant), so decoding is plain" in caplog.text
    put(cache, NAME + "-assistant", files / "drafter")
    assert find_drafter(NAME) == find_drafter(snapshot) == NAME + "-assistant"
    pair = load_pair(NAME)
    assert pair.drafter is not None
    assert pair.found_drafter == NAME + "-assistant"
    assert load_pair(NAME, use_drafter=False).drafter is None
    given = load_pair(NAME, NAME + "-assistant")
    assert given.found_drafter is None and given.drafter is not None
    assert pair.generate([5, 6, 7]).token_ids == given.generate([5, 6, 7]).token_ids


def test_qat_finds_qat_alone(cache: Path, files: Path) -> None:
    qat = NAME + "-qat-q4_0-unquantized"
    for name, kind in ((NAME, "target"), (NAME + "-assistant", "drafter"), (qat, "target")):
        put(cache, name, files / kind)
    assert find_drafter(qat) is None, "the other drafter was trained for other weights"
    put(cache, qat + "-assistant", files / "drafter")
    assert find_drafter(qat) == qat + "-assistant"


def test_a_directory_finds_the_one_beside_it(tmp_path: Path, files: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, drafter = tmp_path / "mine", tmp_path / "mine-assistant"
    save_pair(tmp_path, *agreeing_pair())
    (tmp_path / "target").rename(target)
    assert drafter_places(target) == [drafter]
    assert find_drafter(target) is None
    (tmp_path / "drafter").rename(drafter)
    assert find_drafter(target) == find_drafter(target / "config.json") == drafter
    assert load_pair(target).found_drafter == str(drafter)
    content = json.loads((drafter / "config.json").read_text(encoding="utf-8"))
    (drafter / "config.json").write_text(json.dumps({**content, "backbone_hidden_size": 48}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "gemma_mtp"):
        assert load_pair(target).drafter is None
    assert f"{drafter} is not used, so decoding is plain: the drafter does not fit" in caplog.text


@pytest.mark.parametrize(
    ("command", "name"), [(["generate", "x", "--compare"], "--compare"), (["acceptance"], "acceptance")]
)
def test_what_needs_a_drafter_is_refused_without_one(
    command: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded where none lies there, and afterwards where the one that does is of another target."""
    save_pair(tmp_path, *agreeing_pair())
    message = f"error: {name} needs a drafter; give --drafter, or no --target for the bundled pair.\n"
    arguments = [*command, "--target", str(tmp_path / "target")]
    with monkeypatch.context() as patched:
        patched.setattr("gemma_mtp.engine.pair.load_pair", None)
        assert refused(capsys, arguments) == message
    (tmp_path / "drafter").rename(tmp_path / "target-assistant")
    config = tmp_path / "target-assistant" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**content, "backbone_hidden_size": 48}), encoding="utf-8")
    assert refused(capsys, arguments).endswith(message)


def test_bundled_is_a_name_everywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert locate("bundled") == bundled_directory() / "target"
    assert locate("bundled", "drafter") == bundled_directory() / "drafter"
    assert read_target_config("bundled").text.hidden_size == 320
    assert read_drafter_config(Path("bundled")).backbone_hidden_size == 320
    assert find_drafter("bundled") == find_drafter(bundled_directory() / "target") == "bundled"
    assert main(["inspect", "bundled", "bundled", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pair"]["fits"] is True
    assert main(["generate", "--target", "bundled", "x = 1", "-n", "4"]) == 0
    assert "drafter: bundled, found by the target's name\n" in capsys.readouterr().err
    assert main(["generate", "--target", "bundled", "--no-drafter", "x = 1", "-n", "4", "-k", "2"]) == 0
    assert "no drafts" in capsys.readouterr().err
    assert main(["quantize", "bundled", "--out", str(tmp_path / "copy")]) == 0


def test_what_is_not_there_is_one_sentence_with_the_command(
    cache: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "--target", NAME, "x"], ["inspect", NAME], ["plan", NAME]):
        message = refused_line(capsys, command)
        assert f"no model of that name in the Hugging Face cache ({cache})" in message
        assert message.endswith(f"gemma-mtp pull {NAME}\n")
    put(cache, NAME, files / "target", without="model.safetensors")
    assert "without its model.safetensors; download the rest with" in refused_line(capsys, ["inspect", NAME])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source("/no/such/directory")


def refused_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("error: ")) == ("", 1, True)
    return err


def test_without_the_hubs_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for command in (["inspect", NAME], ["pull", NAME]):
        assert "pip install 'gemma-mtp[hub]'" in refused_line(capsys, command)


@pytest.mark.parametrize(("name", "is_name"), [(NAME, True), ("a/b/c", False), ("/a/b", False), ("./a", False)])
def test_names_of_the_hub(name: str, is_name: bool) -> None:
    assert is_hub_name(name) is is_name


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gemma_mtp.config import PRESETS, TargetConfig
    from gemma_mtp.engine import start
    from gemma_mtp.weight_types import UNIFORM

    config = PRESETS["gemma-4-31B-it"]
    assert isinstance(config, TargetConfig)
    monkeypatch.setattr(start, "device_free_bytes", lambda device: 24 * 10**9)
    cpu = torch.device("cpu")
    with pytest.raises(CheckpointError, match=r"take 61\.4 GB, but 24\.0 GB .* free; --quantize int4 takes 19\.8 GB\."):
        check_weights_fit(Path("x"), config, UNIFORM["none"], torch.bfloat16, cpu)
    with pytest.raises(CheckpointError, match="use a smaller model or more memory"):
        check_weights_fit(Path("x"), config, UNIFORM["int8"], torch.bfloat16, cpu)
    check_weights_fit(Path("x"), config, UNIFORM["int4"], torch.bfloat16, cpu)
    with pytest.raises(CheckpointError, match=r"take 32\.4 GB"):
        check_weights_fit(Path("x"), config, UNIFORM["none"], torch.bfloat16, cpu, held=324 * 10**8)
    monkeypatch.setattr(start, "device_free_bytes", lambda device: 33 * 10**9)
    check_weights_fit(Path("x"), config, UNIFORM["none"], torch.bfloat16, cpu, held=324 * 10**8)


# downloading


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a snapshot is downloaded by."""

    models: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(True)

    def do_HEAD(self) -> None:
        self._answer(False)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        name = "/".join(path.split("/")[:2])
        directory = self.models.get(name)
        if directory is None:
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404, body)
        elif "/resolve/" in path:
            data = (directory / path.split("/")[-1]).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            self._send(data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, 200, body)
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in directory.iterdir()
            ]
            self._send(json.dumps(entries).encode(), {}, 200, body)
        else:
            siblings = [{"rfilename": file.name} for file in directory.iterdir()]
            self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}, 200, body)

    def _send(self, data: bytes, headers: dict[str, str], status: int, body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Hub.models, Hub.asked = {}, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def pulled(server: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the hub's package reads its settings once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": server, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "gemma_mtp", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_pull_brings_a_model_and_its_drafter(server: str, files: Path, tmp_path: Path) -> None:
    Hub.models = {NAME: files / "target", NAME + "-assistant": files / "drafter"}
    (files / "target" / "pytorch_model.bin").write_bytes(b"never asked for")
    home = tmp_path / "home"
    ran = pulled(server, home, "pull", NAME)
    assert ran.returncode == 0, ran.stderr
    first, second = ran.stdout.splitlines()
    assert first.startswith(f"{NAME}: ") and second.startswith(f"{NAME}-assistant: ")
    assert not [path for path in Hub.asked if "pytorch_model.bin" in path and "resolve" in path]
    (weights,) = (home / "hub").glob("models--acme--tiny-it/snapshots/*/model.safetensors")
    assert weights.read_bytes() == (files / "target" / "model.safetensors").read_bytes()
    again = pulled("http://127.0.0.1:1", home, "generate", "--target", NAME, "--token-ids", "5 6", "-n", "4")
    assert again.returncode == 0, again.stderr
    assert f"drafter: {NAME}-assistant, found by the target's name" in again.stderr


def test_pull_without_a_drafter_a_name_or_a_network(server: str, files: Path, tmp_path: Path) -> None:
    Hub.models = {NAME: files / "target"}
    ran = pulled(server, tmp_path, "pull", NAME)
    assert ran.returncode == 0, ran.stderr
    assert f"{NAME}-assistant: there is no such model, so {NAME} decodes without a drafter" in ran.stdout
    missing = pulled(server, tmp_path, "pull", "acme/other")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert f"{server} has no model acme/other" in missing.stderr
    offline = pulled("http://127.0.0.1:1", tmp_path / "empty", "pull", NAME)
    assert (offline.returncode, offline.stderr.count("\n")) == (2, 1), offline.stderr
    assert f"{NAME} could not be downloaded from http://127.0.0.1:1" in offline.stderr


def test_pull_takes_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'gemma' is no name on the Hugging Face hub" in refused(capsys, ["pull", "gemma"])
    both = ["pull", NAME, "--drafter", NAME, "--no-drafter"]
    assert "--drafter and --no-drafter exclude each other" in refused(capsys, both)


def test_a_wrong_path_names_every_kind_of_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "notes.txt"):
        assert main(["inspect", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and "Hugging Face layout, or a GGUF file" in error and error.count("\n") == 1
