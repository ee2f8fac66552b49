"""Where the project lives, for a package index: the address in what is built, and links of the README that lead there.

The address stands nowhere in the tree. A release names it, `make dist URL=https://HOST/OWNER/NAME`, and the source
distribution carries it on to what is built of that. Without it everything builds too, without addresses and with the
README as it is; as a program this refuses such a distribution by name.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any

VARIABLE = "GEMMA_MTP_URL"
SOURCE = "Source"
#: pages of the project by their names in an index; those of the tree are seen as of the released version
PAGES = {"Documentation": "docs/README.md", "Changelog": "CHANGELOG.md"}
PICTURES = (".png", ".svg", ".jpg", ".gif")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
ABSOLUTE = ("https://", "http://", "mailto:")


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of pyproject.toml's [project] that depend on the address, for scikit-build-core."""
    url, readme = address(Path()), Path("README.md").read_text(encoding="utf-8")
    fields: dict[str, Any] = {"readme": {"content-type": "text/markdown", "text": readme}, "urls": {}}
    if url is None:
        return fields
    tree = f"blob/v{project['version']}"
    fields["readme"]["text"] = with_absolute_links(readme, url, tree)
    fields["urls"] = {SOURCE: url, **{name: f"{url}/{tree}/{page}" for name, page in PAGES.items()}}
    return fields


def address(root: Path) -> str | None:
    """Returns the address that a build is told, or that the source distribution which is built was told. Raises
    ValueError for what is none."""
    told = os.environ.get(VARIABLE, "").rstrip("/")
    if told and not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", told):
        raise ValueError(f"{VARIABLE} is {told!r}, but must be the address of a repository, https://HOST/OWNER/NAME")
    described = root / "PKG-INFO"
    if told or not described.is_file():
        return told or None
    return urls(email.message_from_bytes(described.read_bytes())).get(SOURCE)


def with_absolute_links(text: str, url: str, tree: str) -> str:
    """Returns Markdown whose links into the tree lead to it at `url`, as GitHub shows it: pages where they are
    read, pictures as they are."""

    def absolute(match: re.Match[str]) -> str:
        link = match[0]
        if link.startswith(ABSOLUTE):
            return link
        page = f"README.md{link}" if link.startswith("#") else link
        return f"{url}/{tree.replace('blob', 'raw', 1) if page.endswith(PICTURES) else tree}/{page}"

    return LINK.sub(absolute, text)


def urls(metadata: Message) -> dict[str, str]:
    """Returns what a distribution says where the project is, by name."""
    entries = (entry.partition(", ") for entry in metadata.get_all("Project-URL", []))
    return {name: link for name, _, link in entries}


def described(path: Path) -> Message:
    """Returns the metadata of a wheel or a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(wheel.read(name))
    with tarfile.open(path) as archive:
        (member,) = (member for member in archive if re.fullmatch(r"[^/]+/PKG-INFO", member.name))
        file = archive.extractfile(member)
        assert file is not None
        return email.message_from_bytes(file.read())


def faults(path: Path) -> list[str]:
    """Returns why a distribution is not to be given to a package index; nothing where it is."""
    metadata = described(path)
    found = [] if SOURCE in urls(metadata) else ["it does not say where the project is"]
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    relative = [link for link in LINK.findall(text.decode()) if not link.startswith(ABSOLUTE)]
    return [*found, *(f"its README links to {link}, which an index does not have" for link in relative[:1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distributions", nargs="+", type=Path)
    refused = [f"{path.name}: {fault}" for path in parser.parse_args().distributions for fault in faults(path)]
    if refused:
        sys.exit("\n".join([*refused, "build again by `make dist URL=https://HOST/OWNER/NAME`"]))


if __name__ == "__main__":
    main()
