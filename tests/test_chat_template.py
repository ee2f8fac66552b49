"""Chat templates, text and ids, against transformers' apply_chat_template; the files they are read from."""

import enum
import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from byte_fallback import gemma_like
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from gemma_mtp.chat import template as chat_template
from gemma_mtp.datasets import Example
from gemma_mtp.errors import TokenizerError
from gemma_mtp.tokenizer import Tokenizer

SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
    "unk_token": "<unk>", "boi_token": "<|turn>", "extra_special_tokens": {"etr_token": "<turn|>"},
}  # fmt: skip

TURN = "<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}"
TEMPLATES = {
    "without bos": EACH + "{% if add_generation_prompt %}<|turn>model\n{% endif %}",
    "with bos": "{{ bos_token }}" + EACH,
    "with two": "{{ bos_token }}{{ bos_token }}" + EACH,
    "generation": (
        '{% for m in messages %}{% if m["role"] == "assistant" %}{% generation %}{{ m["content"] }}{% endgeneration %}'
        '{% else %}<|turn>{{ m["content"] }}{% endif %}{% endfor %}'
    ),
    "generation, trimmed": (
        "{%- for m in messages -%}\n  {%- generation -%}\n {% set seen = m.role %} {{ m.content }}{{ seen }} \n"
        "  {%- endgeneration -%}\n  {{ seen }}\n{% endfor %}"
    ),
    "generation in a macro": (
        "{% macro turn(m) %}{% generation %}{% if m.content %}{{ m.content | upper }}{% endif %}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ loop.index0 }}{{ turn(m) }}{% endfor %}"
    ),
    "tojson": "{{ bos_token }}{{ messages | tojson(ensure_ascii=False) }}",
    "tojson with everything": (
        "{{ messages | tojson(ensure_ascii=True, indent=2, separators=(',', ' : '), sort_keys=True) }}"
        "{{ {'é': '<&>', 'b': none, 'a': 1.5} | tojson }}{{ messages[0] | tojson(indent=1) }}"
    ),
    "tools and documents": (
        "{% if tools is none %}no tools{% elif tools %}{{ tools | tojson }}{% else %}empty{% endif %}"
        "{% if documents is defined and documents is none %}, no documents{% endif %}"
        "{% for d in documents or [] %}{{ d.title }}:{{ d['text'] }}{% endfor %}"
        "{% if tools is not none and tools | length > 0 %}{% for t in tools %}"
        "{{ t.function.name }}{% endfor %}{% endif %}"
    ),
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ boi_token }}{{ etr_token }}"
        "{{ sep_token is defined }}{{ mask_token is undefined }}{{ 'x' + pad_token }}{{ cls_token | default('none') }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}\n    {{- m.content | trim }}\n{% endfor %}"
        "{{ messages | length }}"
    ),
    "namespaces": (
        "{% set ns = namespace(found=false, last=none, count=0, self='me') %}{% for m in messages %}\n"
        "  {% if m.role == 'user' %}{% set ns.found = true %}{% set ns.last = m.content %}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}\n{% endfor %}{{ ns.found }}{{ ns.last }}{{ ns.count }}{{ ns.self }}"
        "{{ dict(a=1, b=2) }}{{ dict.fromkeys(['x', 'y'], 0) }}"
    ),
    "macros": (
        "{%- macro show(value, depth=0) -%}{%- if value is mapping -%}{%- for k, v in value.items() -%}"
        "{{ '  ' * depth }}"
        "{{ k }}={{ show(v, depth + 1) }};{%- endfor -%}{%- elif value is string -%}{{ value }}"
        "{%- elif value is iterable -%}[{% for v in value %}{{ show(v, depth + 1) }}"
        "{% if not loop.last %},{% endif %}{% endfor %}]"
        "{%- else -%}"
        "{{ value }}{%- endif -%}{%- endmacro -%}{% for m in messages %}{{ show(m) }}{% endfor %}"
    ),
    "call blocks and filters": (
        "{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}"
        "{% call wrap('b') %}{{ messages[-1]['content'] | string | replace('e', 'E') }}{% endcall %}"
        "{{ messages | map(attribute='role') | join('|') }}{{ messages | selectattr('role', 'equalto', 'user') | list |"
        " length }}{% filter upper %}shout{% endfilter %}{{ messages[0].content[:3] }}{{ messages[::-1][0].role }}"
    ),
    "trimmed blocks": (
        "    {% if true %}\n  kept   \n    {% endif %}\n{%+ if true %}\n  left\n{% endif +%}\n\n{# a comment #}\n"
        "  end {%- if 1 %}\n x {% endif %}   \n\n"
    ),
    "refuses": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('the first message must be a system message') }}"
        "{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 1) %}"
        "{{ raise_exception('roles must alternate, but ' + m.role + ' is message ' + loop.index | string) }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
    "dates": "{{ strftime_now('%Y %B %%') }}{% if strftime_now is defined %}{{ strftime_now('%d')[:0] }}{% endif %}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{% if nothing.more is defined %}x{% endif %}",
    "undefined added": "{{ 'a' + nothing }}",
    "own variables": (
        "{{ enable_thinking }}{{ bos_token }}{% if extra is defined %}{{ extra['k'] }}{{ extra.n }}{% endif %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m.reasoning_content is defined %}<{{ m.reasoning_content }}|{{ m.thinking }}>"
        "{% endif %}{{ m.content }}{% endfor %}"
    ),
    "tool calls": (
        "{% for m in messages %}{% if m.get('tool_calls') %}{% for call in m.tool_calls %}"
        "{{ call.function.name }}({{ call.function.arguments | tojson if call.function.arguments is mapping else"
        " call.function.arguments }}){% endfor %}{% elif m.role == 'tool' %}={{ m.content }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable and"
        " m.content is not none %}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text | trim }}{% else %}"
        "<{{ part.type }}>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    ),
    "changes its input": "{% set _ = messages.append({'role': 'x'}) %}{{ messages | length }}",
    "looks inside": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "looks inside a namespace": "{% set ns = namespace(__class__='x') %}",
    "looks inside dict": "{{ dict.__class__ }}|{{ dict.mro }}|{{ dict.__call__.__func__ }}",
    "looks inside namespace's class": "{{ namespace.__init__.__globals__ }}",
    "not valid": "{% if %}",
    "not closed": "{% generation %}x",
    "closed and not opened": "{% endgeneration %}",
    "no such filter": "{{ messages | nothing }}",
    "do": "{% do messages %}",
    "recursive loop": "{% for m in [[1, [2]], 3] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
    "empty": "",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "hello"}],
    "four": [
        {"role": "system", "content": "Be <bos> brief.  "}, {"role": "user", "content": "  What is <|turn> 2 + 2?\n"},
        {"role": "assistant", "content": "4 <turn|>"}, {"role": "user", "content": "ᚠᚢ é & <b> \"'\\"},
    ],
    "reasoning": [
        {"role": "system", "content": "x"}, {"role": "user", "content": "hello", "thinking": None},
        {"role": "assistant", "content": "ok", "reasoning": "why"},
        {"role": "assistant", "content": "ok", "thinking": "so", "reasoning": "why"},
    ],
    "tools": [
        {"role": "user", "content": "the weather"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {
            "name": "weather", "arguments": {"place": "Köln", "days": 2, "deep": [1.5, None, True]}}}]},
        {"role": "tool", "content": "{\"c\": 3}", "name": "weather"}, {"role": "assistant", "content": None},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ],
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "é", "parameters": {"type": "object"}}}
WITH: list[dict[str, Any]] = [
    {}, {"add_generation_prompt": True}, {"tools": [TOOL], "enable_thinking": True},
    {"documents": [{"title": "T", "text": "é"}], "extra": {"k": (1, 2), "n": 1.0}}, {"tools": [], "bos_token": "!"},
]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    gemma_like().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    (path / "config.json").write_text(json.dumps({"model_type": "gemma4_text"}))
    return path


@pytest.fixture(scope="module")
def theirs(directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_transformers(
    directory: Path, theirs: PreTrainedTokenizerFast, name: str, conversation: str
) -> None:
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    base = Tokenizer.from_dir(directory)
    ours = Tokenizer(base.raw, base.settings, template)
    for given in WITH:
        wanted = {"add_generation_prompt": False, **given}
        try:
            text = theirs.apply_chat_template(messages, tokenize=False, chat_template=template, **given)
        except jinja2.TemplateError as error:
            own_words = isinstance(error, jinja2.exceptions.SecurityError)
            with pytest.raises(TokenizerError, match=None if own_words else re.escape(str(error.message))):
                ours.apply_chat_template(messages, **wanted)
            continue
        except TypeError:  # of the template's own making, in both
            with pytest.raises((TokenizerError, TypeError)):
                ours.apply_chat_template(messages, **wanted)
            continue
        assert ours.apply_chat_template(messages, **wanted) == text
        ids = theirs.apply_chat_template(messages, chat_template=template, return_dict=False, **given)
        assert ours.encode_chat(messages, **wanted) == ids


def test_most_templates_render_and_differ(directory: Path) -> None:
    base, made = Tokenizer.from_dir(directory), set()
    for template in TEMPLATES.values():
        try:
            made.add(Tokenizer(base.raw, base.settings, template).apply_chat_template(CONVERSATIONS["four"]))
        except TokenizerError as error:
            made.add(str(error))
    assert len(made) >= len(TEMPLATES) - 3  # of those that show nothing of a template's, some look alike


def test_names_that_a_template_asks_for_are_transformers() -> None:
    for name, template in TEMPLATES.items():
        if name in ("not valid", "not closed", "closed and not opened", "do"):
            with pytest.raises(TokenizerError, match="not valid Jinja"):
                chat_template.asked_for(template)
        elif name != "no such filter":
            assert chat_template.asked_for(template) == chat_template_utils._get_template_variables(template)


class Role(enum.StrEnum):
    USER = "user"


@dataclass
class Part:
    type: str
    text: str


def test_templates_see_plain_values_only(directory: Path, theirs: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{{ m }}{% endfor %}{{ a }}{{ b }}{{ c }}{{ d }}{{ messages[0].role.name is defined }}"
    )
    messages = [{"role": Role.USER, "content": [Part("text", "x"), np.float32(0.5), np.bool_(False), b"raw", (1, 2)]}]
    given: dict[str, Any] = {"a": np.int64(3), "b": np.zeros(2), "c": {Role.USER: 1}, "d": open}
    base = Tokenizer.from_dir(directory)
    ours = Tokenizer(base.raw, base.settings, template).apply_chat_template(messages, **given)
    assert ours == theirs.apply_chat_template(messages, tokenize=False, chat_template=template, **given)


def test_a_template_is_rendered_in_many_threads_at_once(directory: Path) -> None:
    base = Tokenizer.from_dir(directory)
    ours = Tokenizer(base.raw, base.settings, TEMPLATES["generation in a macro"])
    made: list[bool] = []

    def work(number: int) -> None:
        messages = [{"role": "user", "content": f"n{number}"}] * 3
        made.extend(ours.apply_chat_template(messages) == f"0N{number}1N{number}2N{number}" for _ in range(200))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True] * 800


BOTH = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | length }}"}
AS_LIST = [{"name": name, "template": template} for name, template in BOTH.items()]
SOURCES: dict[str, dict[str, Any]] = {
    "one": {"config": "C"},
    "a list": {"config": AS_LIST},
    "a mapping": {"config": BOTH},
    "a mapping without default": {"config": {"tool_use": BOTH["tool_use"], "rag": "R"}},
    "an empty list": {"config": []},
    "a file": {"chat_template.jinja": "F"},
    "an empty file": {"chat_template.jinja": "", "config": "C"},
    "a file and the configuration": {"chat_template.jinja": "F", "config": AS_LIST},
    "a file and more": {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": BOTH["tool_use"]},
    "more without a default": {"additional_chat_templates/tool_use.jinja": BOTH["tool_use"], "config": "C"},
    "a default among more": {"additional_chat_templates/default.jinja": "A", "chat_template.jinja": "F"},
    "crlf in a file": {"chat_template.jinja": "a\r\nb\r\n{{ bos_token }}\r\n"},
    "the older file beside the configuration": {
        "chat_template.json": json.dumps({"chat_template": "J"}),
        "config": "C",
    },
    "none": {},
}


@pytest.mark.parametrize("source", SOURCES)
def test_templates_are_found_where_transformers_finds_them(directory: Path, tmp_path: Path, source: str) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    parts = SOURCES[source]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**SETTINGS, **({"chat_template": parts["config"]} if "config" in parts else {})})
    )
    for name, text in parts.items():
        if name != "config":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(text.encode())
    ours, theirs, messages = Tokenizer.from_dir(tmp_path), AutoTokenizer.from_pretrained(tmp_path), CONVERSATIONS["one"]
    asked: list[dict[str, Any]] = [{}, {"tools": [TOOL]}]
    for given in asked:
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **given)
        except ValueError:
            with pytest.raises(TokenizerError, match=r"no chat template|none is named 'default'"):
                ours.apply_chat_template(messages, **given)
        else:
            assert ours.apply_chat_template(messages, **given) == expected


def test_the_older_file_is_read_where_there_is_no_other(directory: Path, tmp_path: Path) -> None:
    """Only transformers' processors read it."""
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert Tokenizer.from_dir(tmp_path).apply_chat_template(CONVERSATIONS["one"]) == "J"
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "must be a template"),
        ('{"chat_template": 3}', "must be"),
    ):
        (tmp_path / "chat_template.json").write_text(content)
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("entry", [3, [3], [{"name": "x"}], {"default": None}, {"default": ["x"]}])
def test_malformed_templates_are_refused(directory: Path, tmp_path: Path, entry: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(TokenizerError, match=r"chat_template in .* must be a template"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="is not UTF-8"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("messages", [[], ["x"], [["role", "user"]]])
def test_what_is_no_conversation_is_refused(directory: Path, messages: Any) -> None:
    base = Tokenizer.from_dir(directory)
    with pytest.raises(TokenizerError, match="conversation"):
        Tokenizer(base.raw, base.settings, "x").apply_chat_template(messages)


def test_data_sets_have_the_templates_bos_and_texts_their_own(directory: Path) -> None:
    base = Tokenizer.from_dir(directory)
    ours = Tokenizer(base.raw, base.settings, TEMPLATES["without bos"])
    rendered = base.encode("<|turn>user\nhello<turn|>\n<|turn>model\n", special=False)
    for kind, content in (("prompt", "hello"), ("messages", tuple(CONVERSATIONS["one"]))):
        assert Example(kind, content, "x", "x").token_ids(ours) == rendered  # type: ignore[arg-type]
    assert Example("text", "hello", "x", "x").token_ids(ours) == base.encode("hello")
    assert Example("prompt", "hello", "x", "x").token_ids(base) == base.encode("hello")
