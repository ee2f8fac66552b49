"""What the output must be, from the several fields that say so."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from gemma_mtp.decoding.grammar import Grammar, GrammarKind
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.server.conversation import JsonObjectFormat, JsonSchemaFormat, StructuredOutputs
from gemma_mtp.server.errors import ApiError, wrong_field
from gemma_mtp.server.protocol import GenerationRequest
from gemma_mtp.server.service import Service

#: a field, the kind of grammar that it asks for, and its source
Wanted = tuple[str, GrammarKind, str]


async def text_grammar(body: GenerationRequest, service: Service) -> Grammar | None:
    """What the text must be, compiled in a thread. Raises ApiError."""
    wanted = [*_of_format(body), *_of_other_fields(body)]
    if not wanted:
        return None
    if len(wanted) > 1:
        param, other = wanted[1][0], wanted[0][0]
        raise wrong_field(param, f"{other} says already what the output must be; give one of them")
    return await compiled(*wanted[0], service)


async def compiled(param: str, kind: GrammarKind, source: str, service: Service) -> Grammar:
    """A grammar that this pair can decode by. Raises ApiError."""

    def compile_it() -> Grammar:
        grammar = Grammar(kind, source)
        rules = TurnRules(calls=grammar) if kind == "calls" else grammar
        service.engine.pair.check(SamplingParams(grammar=rules), 0, "exact")
        return grammar

    try:
        return await asyncio.to_thread(compile_it)
    except GemmaMtpError as error:
        raise ApiError(400, str(error), param=param) from None


def _of_format(body: GenerationRequest) -> list[Wanted]:
    wanted = body.response_format
    if isinstance(wanted, JsonSchemaFormat):
        return [("response_format", "json_schema", json.dumps(wanted.json_schema.schema_))]
    if isinstance(wanted, JsonObjectFormat):
        schema = wanted.schema_
        return [("response_format", "json_object", "") if schema is None
                else ("response_format", "json_schema", json.dumps(schema))]  # fmt: skip
    return []


def _of_other_fields(body: GenerationRequest) -> list[Wanted]:
    outputs, param = body.structured_outputs or StructuredOutputs(json=None), "structured_outputs"
    fields: list[tuple[str, GrammarKind, str | None]] = [
        ("regex", "regex", body.regex),
        ("guided_json", "json_schema", _schema_text(body.guided_json)),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "regex", _one_of(body.guided_choice)),
        (param, "json_schema", _schema_text(outputs.json_)),
        (param, "regex", outputs.regex),
        (param, "regex", _one_of(outputs.choice)),
        (param, "json_object", "" if outputs.json_object else None),
    ]
    return [(name, kind, source) for name, kind, source in fields if source is not None]


def _schema_text(schema: dict[str, Any] | str | None) -> str | None:
    return json.dumps(schema) if isinstance(schema, dict) else schema


def _one_of(texts: list[str] | None) -> str | None:
    if texts is None:
        return None
    return "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text) for text in texts)
