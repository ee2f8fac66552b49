"""From a chat request to a prompt and the rules of the model's turn: tools, thinking, and how the turn begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from gemma_mtp.chat.marks import Region, TurnMarks
from gemma_mtp.chat.prompt import Conversation, chat_text, thinking_variable
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.decoding.turn_rules import TurnRules
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.server.constraints import compiled
from gemma_mtp.server.conversation import AssistantMessage, Message, NamedTool, Tool, ToolMessage
from gemma_mtp.server.errors import ApiError, wrong_field
from gemma_mtp.server.protocol import ChatCompletionRequest
from gemma_mtp.server.service import Service

#: efforts without thinking, and how many tokens of it the others allow; None: as many as the model takes
THOUGHTLESS = ("none", "minimal")
EFFORT_TOKENS: dict[str, int | None] = {"low": 1024, "medium": 8192, "high": None, "xhigh": None}
#: variables of a template that have fields of their own, or come from the tokenizer
OWN_FIELDS = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True)
class Thinking:
    """Whether the model is asked to think, how long it may, and the template's variables that say so."""

    variables: dict[str, Any]
    on: bool = False
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class ToolSet:
    """Tools as the template shows them, and which may be called how. `must`: text is no answer."""

    shown: list[dict[str, Any]] | None = None
    names: frozenset[str] = frozenset()
    grammar: Grammar | None = None
    must: bool = False
    many: bool = True


def thinking_of(body: ChatCompletionRequest, service: Service) -> Thinking:
    """What a request says of thinking. Raises ApiError where it asks for what the template has no switch for."""
    given = dict(body.chat_template_kwargs or {})
    switch, effort = thinking_variable(service.tokenizer), body.reasoning_effort
    for name in given:
        if name in OWN_FIELDS:
            raise wrong_field("chat_template_kwargs", f"{name} can not be given there")
        if name not in service.tokenizer.template_variables:
            if name in ("enable_thinking", "thinking") and not given[name]:
                continue  # it does not think
            raise wrong_field("chat_template_kwargs", f"the checkpoint's chat template has no variable {name!r}")
    if effort is not None and effort not in THOUGHTLESS and switch is None:
        message = f"this model has no switch for thinking, so {effort} can not be had; leave it out"
        raise wrong_field("reasoning_effort", message)
    if switch is not None and effort is not None:
        given.setdefault(switch, effort not in THOUGHTLESS)
    limit = body.max_thinking_tokens
    if limit is None and effort in EFFORT_TOKENS:
        limit = EFFORT_TOKENS[effort]
    if body.max_thinking_tokens is not None and service.tokenizer.marks.thought is None:
        message = "this model's thoughts have no marks, so they can not be limited; leave it out"
        raise wrong_field("max_thinking_tokens", message)
    return Thinking(given, switch is not None and bool(given.get(switch)), limit)


async def callable_tools(body: ChatCompletionRequest, service: Service) -> ToolSet:
    """The tools of a request, with a grammar of their calls. Raises ApiError."""
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise wrong_field("tool_choice", "there are no tools to choose from; give tools")
        return ToolSet()
    _check_tools(names, service)
    shown = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]
    if choice == "none":
        return ToolSet(shown)
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise wrong_field("tool_choice", "there is no tool of this name among tools")
        names = [choice.function.name]
    must = choice == "required" or isinstance(choice, NamedTool)
    source = json.dumps([_held(tool, must) for tool in tools if tool.function.name in names])
    grammar = await compiled("tools", "calls", source, service)
    many = body.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    return ToolSet(shown, frozenset(names), grammar, must, many)


def _check_tools(names: Sequence[str], service: Service) -> None:
    if len(names) > service.settings.max_tools:
        most = service.settings.max_tools
        raise wrong_field("tools", f"{len(names)} tools are more than the {most} that this server allows")
    if not service.tokenizer.template_knows("tools") or service.tokenizer.marks.call is None:
        message = "this model knows no tools, because its chat template does not show them; leave them out"
        raise wrong_field("tools", message)


def _held(tool: Tool, must: bool) -> dict[str, Any]:
    """A tool as the grammar takes it: held to its schema where that was asked for, else to the syntax."""
    function = tool.function
    return {"name": function.name, "parameters": function.parameters if must or function.strict else None}


def render(
    messages: Sequence[Message], service: Service, begin_turn: bool = True, go_on: bool = False,
    variables: dict[str, Any] | None = None, tools: list[dict[str, Any]] | None = None,
) -> str:  # fmt: skip
    """A conversation through the checkpoint's template; `go_on`: up to the end of its last message. Raises ApiError."""
    given = _plain(messages, service)
    if go_on and (given[-1]["role"] != "assistant" or not given[-1]["content"] or given[-1].get("tool_calls")):
        message = "the last message must be the assistant's, and have text; begin a turn"
        raise wrong_field("continue_final_message", message)
    extra = {**(variables or {}), **({} if tools is None else {"tools": tools})}
    try:
        text = chat_text(Conversation(given, begin_turn, extra), service.tokenizer)
    except GemmaMtpError as error:
        text = _without_system(given, begin_turn, extra, service, error)
    if not go_on:
        return text
    last = Conversation(given).messages[-1]["content"].strip()
    at = text.rfind(last)
    if at < 0:
        message = "the chat template changes the last message, so it can not be gone on with"
        raise wrong_field("continue_final_message", message)
    return text[: at + len(last)]


def _without_system(
    messages: list[dict[str, Any]], begin_turn: bool, extra: dict[str, Any], service: Service, error: GemmaMtpError
) -> str:
    """The same where a template refuses system messages: they come at the beginning of the first user's."""
    plain = [dict(message) for message in Conversation(messages).messages]
    system = [message["content"] for message in plain if message["role"] == "system"]
    others = [message for message in plain if message["role"] != "system"]
    first = next((message for message in others if message["role"] == "user"), None)
    if not system or first is None:
        raise ApiError(400, str(error), param="messages")
    first["content"] = "\n\n".join([*system, first["content"]])
    try:
        return chat_text(Conversation(others, begin_turn, extra), service.tokenizer)
    except GemmaMtpError:
        raise ApiError(400, str(error), param="messages") from None


def _plain(messages: Sequence[Message], service: Service) -> list[dict[str, Any]]:
    """Messages as templates take them. Raises ApiError where the template does not show a call or its answer."""
    names: dict[str, str] = {}
    plain = []
    for i, message in enumerate(messages):
        fields = message.model_dump(exclude_none=True)
        fields.setdefault("content", None)
        called = isinstance(message, AssistantMessage) and message.tool_calls
        if (called or isinstance(message, ToolMessage)) and not service.tokenizer.template_knows("tool_calls"):
            said = "this model's chat template does not show calls of tools and their answers; leave them out"
            raise wrong_field(f"messages[{i}]", said)
        if isinstance(message, AssistantMessage) and message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            for call in fields["tool_calls"]:
                call["function"]["arguments"] = _arguments(call["function"]["arguments"])
        elif isinstance(message, ToolMessage) and message.name is None and message.tool_call_id in names:
            fields["name"] = names[message.tool_call_id]
        plain.append(fields)
    return plain


def _arguments(text: str) -> Any:
    """Arguments as an object, which templates write in the model's own syntax; what is none stays as it is."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def with_turn(
    params: SamplingParams, begin: Region, thinking: Thinking, tools: ToolSet, marks: TurnMarks
) -> SamplingParams:
    """Parameters of a model's turn that begins in a part: what it must be, where it ends, what is no text."""
    rules = TurnRules(
        begin=begin,
        thinking=thinking.on and marks.thought is not None,
        max_thought_tokens=thinking.max_tokens,
        answer=params.grammar if isinstance(params.grammar, Grammar) else None,
        calls=tools.grammar,
        must_call=tools.must,
        many_calls=tools.many,
    )
    plain = tools.grammar is None and rules.max_thought_tokens is None
    plain = plain and (rules.answer is None or (begin == "text" and not rules.thinking))
    stop, bias = list(params.stop_token_ids), dict(params.logit_bias)
    if tools.grammar is not None and marks.response is not None:
        stop.append(marks.response)  # what the tool says is not the model's to write
    if tools.shown and tools.grammar is None and marks.call is not None:
        bias[marks.call[0]] = float("-inf")  # tool_choice is none
    return dataclasses.replace(
        params, grammar=params.grammar if plain else rules, apart=bool(marks.ids), stop_token_ids=stop, logit_bias=bias
    )
