"""Chat templates as transformers renders them: the same files, environment, variables and defaults.

The counterpart is `transformers/utils/chat_template_utils.py` of 5.22.2, `render_jinja_template` above all.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.parser
import numpy as np
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gemma_mtp.errors import TokenizerError

#: a checkpoint's template, or several by name
Templates = str | Mapping[str, str]
DEFAULT, WITH_TOOLS = "default", "tool_use"
TEMPLATE_FILE, LEGACY_FILE = "chat_template.jinja", "chat_template.json"
TEMPLATE_DIRECTORY = "additional_chat_templates"
#: names that a message's reasoning is given under; templates read the first, or the second
REASONING = ("reasoning_content", "thinking", "reasoning")


def read_templates(directory: Path, settings: Mapping[str, Any]) -> Templates | None:
    """The chat templates of a checkpoint directory, or None where it has none.

    Template files come before those in tokenizer_config.json (`settings`), as in transformers; chat_template.json,
    which only transformers' processors read, is the last. Raises TokenizerError where one is malformed.
    """
    files = {path.name.removesuffix(".jinja"): path for path in (directory / TEMPLATE_DIRECTORY).glob("*.jinja")}
    if (directory / TEMPLATE_FILE).is_file():
        files = {DEFAULT: directory / TEMPLATE_FILE, **files}
    if files:
        return _only_default({name: _read(path) for name, path in files.items()})
    if settings.get("chat_template") is not None:
        return _named(settings["chat_template"], directory / "tokenizer_config.json")
    legacy = directory / LEGACY_FILE
    if not legacy.is_file():
        return None
    try:
        content = json.loads(_read(legacy))
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{legacy} is not valid JSON ({error}); copy it again.") from None
    return _named(content.get("chat_template") if isinstance(content, dict) else None, legacy)


def template_of(templates: Templates, with_tools: bool = False) -> str:
    """The template for a conversation, with tools or without. Raises TokenizerError where none is the default."""
    if isinstance(templates, str):
        return templates
    if with_tools and WITH_TOOLS in templates:
        return templates[WITH_TOOLS]
    if DEFAULT not in templates:
        raise TokenizerError(
            f"the checkpoint has the chat templates {', '.join(sorted(templates))}, and none is named {DEFAULT!r};"
            f" add {TEMPLATE_FILE}."
        )
    return templates[DEFAULT]


@functools.lru_cache(maxsize=16)  # every chat request asks twice
def asked_for(template: str) -> frozenset[str]:
    """Names that a template asks its caller for. Raises TokenizerError where it is not valid Jinja."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise _not_valid(error) from None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """A conversation's text. Raises TokenizerError where the template is not valid, or refuses the messages."""
    if not messages:
        raise TokenizerError("a conversation without messages can not be rendered; give one message at least.")
    plain = [_plain(message) for message in messages]
    if not all(isinstance(message, dict) for message in plain):
        raise TokenizerError("a conversation's messages must be objects such as {'role': 'user', 'content': 'Hi'}.")
    given = {
        **_plain(variables),
        "messages": [_with_reasoning(message) for message in plain],
        "tools": _plain(tools),
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
    }
    return _rendered(_compiled(template), given)


def _rendered(compiled: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The only place where a template of the checkpoint runs."""
    try:
        return compiled.render(variables)
    except MemoryError:
        raise
    except Exception as error:  # whatever an expression of the template raises
        said = " ".join(f"{error}".split()).rstrip(".") or type(error).__name__
        raise TokenizerError(f"the checkpoint's chat template can not render these messages: {said}.") from None


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise _not_valid(error) from None


def _not_valid(error: Exception) -> TokenizerError:
    return TokenizerError(f"the checkpoint's chat template is not valid Jinja: {error}.")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception, "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`, which mark what the model wrote: their body stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that Jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        body: str = caller()
        return body


class _Dict:
    """`dict` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` for templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in Jinja's own
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name!r} can not be an attribute of a namespace")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose reasoning, if it has any, stands under the names that templates read."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A value rebuilt of plain JSON types, so that a template meets no methods but theirs; another type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # Pydantic's models
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 ({error}); copy it again.") from None


def _named(entry: object, path: Path) -> Templates:
    """A JSON file's template: one, several as a list of names and templates, or by name."""
    if isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        entry = {item.get("name"): item.get("template") for item in entry}
    if isinstance(entry, dict) and all(isinstance(text, str) for item in entry.items() for text in item):
        return entry
    if isinstance(entry, str):
        return entry
    raise TokenizerError(
        f"chat_template in {path} must be a template, templates by name, or a list of {{name, template}}; copy the file"
        " again."
    )


def _only_default(templates: dict[str, str]) -> Templates:
    return templates[DEFAULT] if list(templates) == [DEFAULT] else templates
