"""Where a checkpoint comes from: what the cards of what is made of it name as its base, and under which licence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gemma_mtp.checkpoint.open import open_source

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: a directory of the Hugging Face cache: models--owner--name/snapshots/revision
CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")
CARDS = ("README.md", "MODEL_CARD.md")
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """`base_model` is the Hub's id where it is known, else the directory's name. `license` holds the fields of the
    target's own card, such as {"license": "gemma"}; {"license": "other"} where it has none."""

    base_model: str
    license: dict[str, str]


def origin_of(target: Path) -> Origin:
    """Returns what the files of a target say of it."""
    return Origin(_hub_id(target) or target.resolve().name, _license(target) or {"license": "other"})


def _hub_id(target: Path) -> str | None:
    """By the cache's directory, or by the id that transformers left in config.json, where a path may stand as well."""
    for part in (*target.absolute().parts, *target.resolve().parts):
        if found := CACHED.fullmatch(part):
            return f"{found['owner']}/{found['name']}"
    named = open_source(target).config().get("_name_or_path")
    known = isinstance(named, str) and HUB_ID.fullmatch(named) and not named.startswith(".")
    return named if known and not Path(named).exists() else None


def _license(target: Path) -> dict[str, str]:
    """From the YAML that a card begins with. Only plain values are read: more than a word or an address is none."""
    for name in CARDS:
        try:
            text = (target / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        head = re.match(r"---\n(.*?\n)---\n", text.replace("\r\n", "\n"), re.DOTALL)
        if head is None:
            continue
        fields = dict(re.findall(r"""^(license\w*):\s*["']?([\w./:#?&=%+-]+)["']?\s*$""", head[1], re.MULTILINE))
        if "license" in fields:
            return {field: fields[field] for field in LICENSE_FIELDS if field in fields}
    return {}
