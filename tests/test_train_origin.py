"""What a card names as a drafter's base, and its licence: from the target's own files, or not at all."""

import json
from pathlib import Path

import pytest

from gemma_mtp.checkpoint.origin import origin_of


def target(directory: Path, **config: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma4_text", **config}))
    return directory


@pytest.mark.parametrize(
    ("where", "config", "expected"),
    [
        ("tuned", {}, "tuned"),
        ("tuned", {"_name_or_path": "google/gemma-4-E2B-it"}, "google/gemma-4-E2B-it"),
        ("tuned", {"_name_or_path": "/home/somebody/models"}, "tuned"),
        ("tuned", {"_name_or_path": "../models"}, "tuned"),
        ("tuned", {"_name_or_path": "runs/a/b"}, "tuned"),
        ("tuned", {"_name_or_path": 7}, "tuned"),
        ("hub/models--google--gemma-4-E2B-it/snapshots/0123abcd", {}, "google/gemma-4-E2B-it"),
        ("hub/models--a--b--c/snapshots/0123abcd", {"_name_or_path": "x/y"}, "a/b--c"),
    ],
)
def test_the_base_is_the_hubs_id_where_it_is_known(
    where: str, config: dict[str, object], expected: str, tmp_path: Path
) -> None:
    assert origin_of(target(tmp_path / where, **config)).base_model == expected


def test_a_directory_that_is_there_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert origin_of(target(tmp_path / "tuned", _name_or_path="models/mine")).base_model == "tuned"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlicense: gemma\ntags:\n- a\n---\n# A model\n", {"license": "gemma"}),
        ("MODEL_CARD.md", "---\r\nlicense: 'apache-2.0'\r\n---\r\n", {"license": "apache-2.0"}),
        (
            "README.md",
            "---\nlicense_link: https://ai.google.dev/gemma/terms\nlicense: other\nlicense_name: gemma\n---\n",
            {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"},
        ),
        ("README.md", "# A model\n\nlicense: mit\n", {"license": "other"}),
        ("README.md", "---\nlicense:\n- mit\n- gemma\n---\n", {"license": "other"}),
        ("README.md", "---\nlicense: mit\n", {"license": "other"}),
        ("NOTES.md", "---\nlicense: mit\n---\n", {"license": "other"}),
    ],
)
def test_the_licence_is_that_of_the_targets_card(
    name: str, text: str, expected: dict[str, str], tmp_path: Path
) -> None:
    (target(tmp_path) / name).write_bytes(text.encode())
    assert origin_of(tmp_path).license == expected


def test_a_card_that_is_no_text_is_none(tmp_path: Path) -> None:
    (target(tmp_path) / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert origin_of(tmp_path).license == {"license": "other"}
