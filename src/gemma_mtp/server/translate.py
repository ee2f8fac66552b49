"""From OpenAI's requests to the engine's: prompts to token ids, fields to sampling parameters, limits checked."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from gemma_mtp.chat.marks import region_after
from gemma_mtp.chat.template import template_of
from gemma_mtp.decoding.grammar import Grammar
from gemma_mtp.decoding.params import SamplingParams
from gemma_mtp.engine.request import Request
from gemma_mtp.errors import GemmaMtpError
from gemma_mtp.server.constraints import text_grammar
from gemma_mtp.server.errors import ApiError, from_engine, too_long, wrong_field
from gemma_mtp.server.fields import check_others
from gemma_mtp.server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from gemma_mtp.server.protocol_others import TokenizerInfo
from gemma_mtp.server.service import Service
from gemma_mtp.server.settings import ServerSettings
from gemma_mtp.server.turns import callable_tools, render, thinking_of, with_turn

#: OpenAI's default for completions
COMPLETION_TOKENS = 16
#: what a client may send for no limit of its own
NO_LIMIT = -1
#: shorter texts are encoded at once, longer ones in a thread, so that other requests' tokens go on
SHORT_TEXT = 2000


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that `echo` repeats. `special`: special tokens are a part of the text."""

    token_ids: list[int]
    text: str = ""
    special: bool = False


async def completion_requests(body: CompletionRequest, service: Service) -> tuple[list[Prompt], list[Request]]:
    """A completion's prompts, and n requests for each of them in turn. Raises ApiError."""
    check_others(body.model_extra)
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise wrong_field("max_tokens", "0 tokens can only be asked for with echo or prompt_logprobs")
    given = _as_list(body.prompt)
    _at_most("prompt", len(given), service.settings.max_prompts, "prompts")
    _at_most("n", len(given) * (body.n or 1), service.engine.settings.max_waiting, "choices in all")
    prompts = [await _prompt(prompt, bool(body.echo), service) for prompt in given]
    grammar = await text_grammar(body, service)
    default = min(COMPLETION_TOKENS, service.settings.max_output_tokens or COMPLETION_TOKENS)
    most = service.settings.max_output_tokens or service.engine.max_tokens
    given_limit = default if body.max_tokens is None else body.max_tokens
    limit = most if given_limit == NO_LIMIT else given_limit
    params = _params(body, body.logprobs, limit, grammar, service)
    return prompts, [request for prompt in prompts for request in _requests(body, prompt, params, service)]


class ChatPlan(NamedTuple):
    """A conversation as one prompt, n requests for it, and the names of tools that may be called."""

    prompt: Prompt
    requests: list[Request]
    tools: Collection[str]


async def chat_requests(body: ChatCompletionRequest, service: Service) -> ChatPlan:
    """Raises ApiError."""
    check_others(body.model_extra)
    _at_most("n", body.n or 1, service.engine.settings.max_waiting, "choices in all")
    thinking, tools = thinking_of(body, service), await callable_tools(body, service)
    go_on = bool(body.continue_final_message)
    if go_on and body.add_generation_prompt:
        message = "a turn that goes on is not begun; leave out add_generation_prompt"
        raise wrong_field("continue_final_message", message)
    begin_turn = body.add_generation_prompt is not False and not go_on
    text = render(body.messages, service, begin_turn, go_on, thinking.variables, tools.shown)
    prompt = await _prompt(text, False, service, special=False)  # the template writes its own
    room = service.engine.max_tokens - len(prompt.token_ids)
    limit = min(room, service.settings.max_output_tokens or room)
    defaults = service.engine.pair.generation
    given = body.max_completion_tokens or body.max_tokens
    max_tokens = limit if given == NO_LIMIT else given or min(limit, defaults.max_new_tokens or limit)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(body, logprobs, max_tokens, await text_grammar(body, service), service)
    suppressed = dict.fromkeys(defaults.suppress_tokens, float("-inf"))
    stop = defaults.stop if body.stop is None else params.stop
    params = dataclasses.replace(params, logit_bias={**suppressed, **params.logit_bias}, stop=stop)
    marks = service.tokenizer.marks
    if marks.ids:
        params = with_turn(params, region_after(prompt.token_ids, marks), thinking, tools, marks)
    return ChatPlan(prompt, _requests(body, prompt, params, service), tools.names)


async def encode(text: str, service: Service, special: bool = True) -> list[int]:
    """Token ids of a text; `special` adds what the tokenizer's files put around one, such as the BOS token."""
    encoded = service.tokenizer.encode
    return encoded(text, special) if len(text) < SHORT_TEXT else await asyncio.to_thread(encoded, text, special)


async def _prompt(given: str | list[int], echo: bool, service: Service, special: bool = True) -> Prompt:
    token_ids = await encode(given, service, special) if isinstance(given, str) else given
    if len(token_ids) > service.longest_prompt:
        raise too_long(len(token_ids), service.longest_prompt, service.engine.max_tokens)
    if isinstance(given, str) or not echo:
        return Prompt(token_ids, given if isinstance(given, str) else "")
    return Prompt(token_ids, decode(token_ids, service), special=True)


def decode(token_ids: Sequence[int], service: Service) -> str:
    """Text of token ids, special tokens included. Raises ApiError."""
    vocab_size = service.engine.pair.target.config.vocab_size
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise ApiError(400, f"there is no token {token_id}; ids end at {vocab_size - 1}.", param="tokens")
    return service.tokenizer.decode(token_ids, skip_special_tokens=False)


def tokenizer_facts(service: Service) -> TokenizerInfo:
    """What a client needs to know of the tokenizer."""
    tokenizer = service.tokenizer
    facts: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        facts[name] = text = tokenizer.special_tokens.get(name)
        facts[f"{name}_id"] = None if text is None else tokenizer.raw.token_to_id(text)
    template = None if tokenizer.chat_template is None else template_of(tokenizer.chat_template)
    length = service.engine.max_tokens
    return TokenizerInfo(**facts, vocab_size=tokenizer.vocab_size, model_max_length=length, chat_template=template)


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _requests(body: GenerationRequest, prompt: Prompt, params: SamplingParams, service: Service) -> list[Request]:
    drafts = service.settings.draft_tokens if body.draft_tokens is None else body.draft_tokens
    verification = body.verification or "exact"
    return [
        Request(prompt.token_ids, dataclasses.replace(params, seed=(params.seed + choice) % 2**63), drafts,
                verification, body.priority or 0)
        for choice in range(body.n or 1)
    ]  # fmt: skip


def _params(
    body: CompletionRequest | ChatCompletionRequest, logprobs: int | None, max_tokens: int, grammar: Grammar | None,
    service: Service,
) -> SamplingParams:  # fmt: skip
    stop = _check_limits(body, service.settings)
    if body.stream and body.prompt_logprobs is not None:
        raise wrong_field("prompt_logprobs", "they are not sent in streams; leave out stream")
    defaults = service.engine.pair.generation
    try:
        return SamplingParams(
            temperature=0.0 if body.top_p == 0 else _given(body.temperature, defaults.temperature, 1.0),
            top_k=max(0, int(_given(body.top_k, defaults.top_k, 0))),
            top_p=_given(body.top_p or None, defaults.top_p, 1.0),
            min_p=_given(body.min_p, defaults.min_p, 0.0),
            repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(key): bias for key, bias in (body.logit_bias or {}).items()},
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
            max_tokens=max_tokens,
            stop=stop,
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=_scored(body, logprobs, max_tokens),
            grammar=grammar,
        )
    except GemmaMtpError as error:
        raise from_engine(error) from None


def _scored(body: GenerationRequest, logprobs: int | None, max_tokens: int) -> int | None:
    """How many alternatives of each of the prompt's tokens are wanted; None where no scores are."""
    echoed = bool(getattr(body, "echo", False))
    counts = [body.prompt_logprobs, logprobs if echoed else None, None if max_tokens else 0]
    return max((count for count in counts if count is not None), default=None)


def _check_limits(body: CompletionRequest | ChatCompletionRequest, settings: ServerSettings) -> list[str]:
    stop = [body.stop] if isinstance(body.stop, str) and body.stop else list(body.stop or [])
    _at_most("n", body.n or 1, settings.max_choices, "choices")
    _at_most("stop", len(stop), settings.max_stop, "stop strings")
    _at_most("stop", max(map(len, stop), default=0), settings.max_stop_characters, "characters in a stop string")
    _at_most("stop_token_ids", len(body.stop_token_ids or ()), settings.max_logit_bias, "stop tokens")
    _at_most("logit_bias", len(body.logit_bias or ()), settings.max_logit_bias, "biased tokens")
    for param in ("max_tokens", "max_completion_tokens"):
        if settings.max_output_tokens is not None:
            _at_most(param, getattr(body, param, None) or 0, settings.max_output_tokens, "output tokens")
    return stop


def _given(*values: float | None) -> float:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def _at_most(param: str, value: int, most: int, what: str) -> None:
    if value > most:
        raise wrong_field(param, f"{value} {what} are more than the {most} that this server allows")
