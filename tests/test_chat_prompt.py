"""From a conversation to a prompt, which commands, data sets and the server share."""

import json
from typing import Any

import pytest
from byte_fallback import gemma_like

from gemma_mtp.chat.prompt import Conversation, chat_ids, chat_text, thinking_variable
from gemma_mtp.datasets import Example
from gemma_mtp.errors import DataError, TokenizerError
from gemma_mtp.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}{{ tools | length if tools else '' }}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)
HALF = r"{{ '\ud800' }}"
PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]


def tokenizer(template: str | None) -> Tokenizer:
    return Tokenizer(gemma_like(), {"bos_token": "<bos>"}, template)


def test_messages_are_brought_into_the_form_that_templates_know() -> None:
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": PARTS}, {"role": "user", "content": "é", "name": "a"},
        {"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": []},
    ]  # fmt: skip
    kept = json.dumps(given)
    conversation = Conversation(given)
    assert list(conversation.messages) == [
        {"role": "system", "content": "hello"}, {"role": "user", "content": "é", "name": "a"},
        {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": ""},
    ]  # fmt: skip
    assert Conversation(conversation.messages) == conversation
    assert json.dumps(given) == kept


def test_the_prompt_has_the_messages_the_variables_and_the_models_turn() -> None:
    ours = tokenizer(TEMPLATE)
    assert chat_text(Conversation.of_user("Hi"), ours) == "<bos><user>Hi<model>"
    assert chat_text(Conversation.of_user("Hi", "Be brief"), ours) == "<bos><system>Be brief<user>Hi<model>"
    thinking = Conversation.of_user("Hi", variables={"enable_thinking": True, "tools": [{"type": "function"}]})
    assert chat_text(thinking, ours) == "<bos><user>Hi<think>1<model>"
    assert chat_text(Conversation(thinking.messages, begin_turn=False), ours) == "<bos><user>Hi"


def test_a_variable_of_any_name_reaches_the_template() -> None:
    ours = tokenizer("{{ system }}{{ prompt }}{{ messages | length }}")
    assert Example("prompt", "Hi", "x", "x").render(ours, system="a", prompt="b") == "ab1"


def test_a_prompt_has_the_templates_special_tokens_and_no_others() -> None:
    for template, begins in ((TEMPLATE, 1), (TEMPLATE.removeprefix("{{ bos_token }}"), 0)):
        ours = tokenizer(template)
        ids = chat_ids(Conversation.of_user("Hi"), ours)
        assert ids == ours.encode(chat_text(Conversation.of_user("Hi"), ours), special=False)
        assert [ours.raw.id_to_token(i) for i in ids].count("<bos>") == begins
        for example in (
            Example("prompt", "Hi", "x", "x"),
            Example("messages", ({"role": "user", "content": "Hi"}, {"role": "model", "content": "Ho"}), "x", "x"),
        ):
            assert example.token_ids(ours) == ids


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "has no chat template"), ("{{ raise_exception('no') }}", "can not render these messages: no"),
     (HALF, "what the chat template makes of them")],
)  # fmt: skip
def test_what_is_no_prompt_is_refused_for_every_caller(template: str | None, words: str) -> None:
    ours = tokenizer(template)
    for make in (chat_text, chat_ids):
        with pytest.raises(TokenizerError, match=words):
            make(Conversation.of_user("Hi"), ours)
    with pytest.raises(DataError, match=f"^a.jsonl:3 can not be rendered as a conversation: .*{words}"):
        Example("messages", ({"role": "user", "content": "Hi"},), "a.jsonl:3", "x").token_ids(ours)


@pytest.mark.parametrize(
    ("template", "name"),
    [("{{ enable_thinking }}", "enable_thinking"), ("{{ thinking }}", "thinking"),
     ("{{ thinking }}{{ enable_thinking }}", "enable_thinking"), ("{% set thinking = 1 %}{{ thinking }}", None),
     ("{{ messages }}", None), (None, None)],
)  # fmt: skip
def test_the_switch_for_thinking_is_the_one_that_the_template_asks_for(template: str | None, name: str | None) -> None:
    assert thinking_variable(tokenizer(template)) == name
