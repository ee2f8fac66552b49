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
from gemma_mtp.server.conversation import JsonObjectFormat, JsonSchemaFormat
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
        return [_of_object("response_format", wanted.schema_)]
    return []


def _of_object(param: str, schema: dict[str, Any] | None) -> Wanted:
    return (param, "json_object", "") if schema is None else (param, "json_schema", json.dumps(schema))


def _of_other_fields(body: GenerationRequest) -> list[Wanted]:
    found: list[Wanted] = []
    outputs, param = body.structured_outputs, "structured_outputs"
    if body.regex is not None:
        found.append(("regex", "regex", body.regex))
    if body.guided_json is not None:
        found.append(("guided_json", "json_schema", _schema_text(body.guided_json)))
    if body.guided_regex is not None:
        found.append(("guided_regex", "regex", body.guided_regex))
    if body.guided_choice is not None:
        found.append(("guided_choice", "regex", _one_of(body.guided_choice)))
    if outputs is not None and outputs.json_ is not None:
        found.append((param, "json_schema", _schema_text(outputs.json_)))
    if outputs is not None and outputs.regex is not None:
        found.append((param, "regex", outputs.regex))
    if outputs is not None and outputs.choice is not None:
        found.append((param, "regex", _one_of(outputs.choice)))
    if outputs is not None and outputs.json_object:
        found.append((param, "json_object", ""))
    return found


def _schema_text(schema: dict[str, Any] | str) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def _one_of(texts: list[str]) -> str:
    return "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text) for text in texts)
