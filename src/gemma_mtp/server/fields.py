"""Fields of other servers that would change the output and are not offered: refused by name, unless they ask for what
is done anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_mtp.server.errors import ApiError

_SEVERAL = "ask for n choices with logprobs and keep the likeliest"
_TOOLS = "use tools and tool_choice"
_GRAMMAR = "use response_format, regex or structured_outputs"
_TEMPLATE = "the checkpoint's own template is used"
_SAMPLING = "use temperature, top_k, top_p or min_p"

#: field -> (values that change nothing, what to do instead)
Refused = Mapping[str, tuple[tuple[Any, ...], str]]
REFUSED: Refused = {
    "add_special_tokens": ((True,), "prompts begin as the tokenizer's files say; give token ids for another beginning"),
    "allowed_token_ids": (([],), "use logit_bias"),
    "audio": ((), "this model writes text only"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), _SEVERAL),
    "chat_template": ((), _TEMPLATE),
    "documents": (([],), "give them in chat_template_kwargs, or in a message"),
    "dry_multiplier": ((0,), "use repetition_penalty or frequency_penalty"),
    "function_call": (("none",), _TOOLS),
    "functions": (([],), _TOOLS),
    "grammar": (("",), _GRAMMAR),
    "guided_grammar": (("",), _GRAMMAR),
    "include_stop_str_in_output": ((False,), "add the stop string yourself"),
    "json_schema": ((), _GRAMMAR),
    "length_penalty": ((1,), _SEVERAL),
    "min_tokens": ((0,), "use ignore_eos with max_tokens"),
    "mirostat": ((0,), _SAMPLING),
    "modalities": ((["text"],), "this model writes text only"),
    "skip_special_tokens": ((True,), "special tokens are no text; ask for logprobs to see them"),
    "spaces_between_special_tokens": ((True, False), ""),  # there are none in the text
    "structural_tag": ((), _GRAMMAR),
    "suffix": ((), "prompts are completed at their end"),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself"),
    "typical_p": ((1,), _SAMPLING),
    "use_beam_search": ((False,), _SEVERAL),
    "verbosity": (("medium",), "say in a message how long the answer is to be"),
    "web_search_options": ((), "nothing is searched for; offer a tool"),
    "xtc_probability": ((0,), _SAMPLING),
}


def check_others(fields: Mapping[str, Any] | None, also: Refused | None = None) -> None:
    """Raise ApiError where fields that no model of a request has ask for what is not offered; `also`: of one route."""
    refused = {**REFUSED, **(also or {})}
    for name, value in (fields or {}).items():
        if name in refused and value is not None:
            neutral, instead = refused[name]
            if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
                raise ApiError(400, f"{name} is not offered; {instead}.", param=name)
