"""A target whose weights are a table of next tokens, with Gemma 4's special tokens and a template of its form.

It says on demand what a script says, a thought or a call of a tool: the script whose key is in the conversation. What
comes next depends on the last token; after a token that several scripts have, such as a mark, on the token before it;
where a turn begins, on the key. So every piece of a script is a token of its own. The pair's drafter has the same
table, or a wrong one, or one of which every other row is wrong.

How it works, for V tokens: hidden states have three parts of V. The first is the token as it is; the second the mean of
the last two tokens, by a sliding layer with a window of two; the third the mean of all tokens, by a full layer. Queries
are zero, so that every row in sight counts the same, and other branches are switched off. The head is the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor

from gemma_mtp.backend.select import make_backend
from gemma_mtp.config import DrafterConfig, LayerType, TextConfig
from gemma_mtp.config.generation import GenerationDefaults
from gemma_mtp.engine.pair import Pair
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.model.layers import DecoderLayer
from gemma_mtp.model.target import Target
from gemma_mtp.tokenizer import Tokenizer

Quality = Literal["right", "wrong", "half"]
S: LayerType = "sliding_attention"
F: LayerType = "full_attention"
QUOTE = '<|"|>'
SPECIAL = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 46: "<|tool>", 47: "<tool|>", 48: "<|tool_call>",
    49: "<tool_call|>", 50: "<|tool_response>", 51: "<tool_response|>", 52: QUOTE, 98: "<|think|>", 100: "<|channel>",
    101: "<channel|>", 105: "<|turn>", 106: "<turn|>",
}  # fmt: skip
NEWLINE, EOS = 107, (1, 106, 50)
#: of the form of Gemma 4's: declarations in the system's turn, thoughts of the last turn, calls with their answers
TEMPLATE = """\
{%- macro value(v) -%}
{%- if v is string -%}<|"|>{{ v }}<|"|>
{%- elif v is boolean -%}{{ 'true' if v else 'false' }}
{%- elif v is mapping -%}
{ {%- for k, each in v | dictsort %}{{ ',' if not loop.first }}{{ k }}:{{ value(each) }}{% endfor -%} }
{%- elif v is sequence -%}
[{%- for each in v %}{{ ',' if not loop.first }}{{ value(each) }}{% endfor -%}]
{%- else -%}{{ v }}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set leads = messages[0]['role'] == 'system' -%}
{%- if leads or tools or enable_thinking -%}
<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{{ messages[0]['content'] | trim if leads }}
{%- for tool in tools or [] -%}
<|tool>declaration:{{ tool['function']['name'] }}{description:{{ value(tool['function']['description'] or '') }}
{%- if tool['function']['parameters'] %},parameters:{{ value(tool['function']['parameters']) }}{% endif %}}<tool|>
{%- endfor -%}
<turn|>
{% endif -%}
{%- set last = namespace(user=-1, open=false) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in (messages[1:] if leads else messages) -%}
{%- set at = loop.index0 + (1 if leads else 0) -%}
{%- if message['role'] == 'tool' -%}
<|tool_response>response:{{ message['name'] or 'unknown' }}{value:{{ value(message['content']) }}}<tool_response|>
{%- else -%}
{%- if not last.open %}<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% endif -%}
{%- set last.open = false -%}
{%- if message['reasoning_content'] and message['tool_calls'] and at > last.user -%}
<|channel>thought
{{ message['reasoning_content'] }}
<channel|>
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
<|tool_call>call:{{ call['function']['name'] }}{{ value(call['function']['arguments']) }}<tool_call|>
{%- set last.open = true -%}
{%- endfor -%}
{{ message['content'] | trim }}
{%- if not last.open %}<turn|>
{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not last.open -%}
<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif -%}
{%- endif -%}
"""

#: by the key that asks for it
SCRIPTS: dict[str, Sequence[str]] = {
    "TEXT": ["Hello", ", ", "world", ".", "<turn|>"],
    "WEATHER": ["<|tool_call>", "call:get_weather{", "city:", QUOTE, "Paris", ", France", QUOTE, ",days:3}",
                "<tool_call|>", "<|tool_response>"],
    "BOTH": ["Let me see: ", "<|tool_call>", "call:get_time{}", "<tool_call|>", "<|tool_call>",
             "call:get_weather{city:", QUOTE, "Rome {\\n\"}", QUOTE, "}", "<tool_call|>", "<|tool_response>"],
    "THINK": ["<|channel>", "thought\n", "Two ", "and ", "two ", "STOP ", "is four", "<channel|>",
              "The answer ", "STOP", " is 4", "<turn|>"],
    "PLAN": ["<|channel>", "thought\nfirst ", "the time", "<channel|>", "Asking. ", "<|tool_call>",
             "call:get_time{zone:", QUOTE, "UTC", QUOTE, ",at:1}", "<tool_call|>", "<|tool_response>"],
    "LOOP": ["<|channel>", "thought\nround ", "and round ", "again ", "and round "],
    "BROKEN": ["<|tool_call>", "call:no_such_tool(", "oops", ")", "<tool_call|>", "After", "<turn|>"],
    "JSON": ["{", '"city"', ":", ' "Oslo"', " }\n", "<turn|>"],
}  # fmt: skip
#: what follows a tool's answer
AFTER_ANSWER = ["<tool_response|>", "It is ", "sunny", " there.", "<turn|>"]


def pieces(scripts: Mapping[str, Sequence[str]]) -> list[str]:
    every = [piece for script in (*scripts.values(), AFTER_ANSWER) for piece in script]
    return list(dict.fromkeys([*scripts, *every]))


def table_tokenizer(scripts: Mapping[str, Sequence[str]] = SCRIPTS, template: str = TEMPLATE) -> Tokenizer:
    """Gemma 4's special tokens at their ids, every byte, and the pieces of the scripts."""
    vocab = {SPECIAL.get(i, f"<unused{i}>"): i for i in range(NEWLINE)} | {"\n": NEWLINE}
    for text in [f"<0x{byte:02X}>" for byte in range(256)]:
        vocab[text] = len(vocab)
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL.values()])
    own = [piece for piece in pieces(scripts) if piece not in vocab]
    raw.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])
    return Tokenizer(raw, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, template)


def table_pair(
    quality: Quality = "right", scripts: Mapping[str, Sequence[str]] = SCRIPTS, template: str = TEMPLATE
) -> Pair:
    """A pair of it, and its tokenizer."""
    tokenizer = table_tokenizer(scripts, template)
    size = -(-tokenizer.vocab_size // 32) * 32
    last, before, key = _tables(scripts, tokenizer, size)
    target = _target(size, torch.cat((last, before / 2, key), dim=1))
    wrong = {"right": [], "wrong": range(size), "half": range(0, size, 2)}[quality]
    order = torch.arange(size)
    order[list(wrong)] = (torch.tensor(list(wrong), dtype=torch.int64) + 7) % size
    drafter = _drafter(target.config, torch.cat((last, before / 2), dim=1)[order.argsort()])
    generation = GenerationDefaults(eos_token_ids=EOS)
    return Pair(backend=make_backend(target, drafter), tokenizer=tokenizer, generation=generation)


def _tables(scripts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What follows a token, what follows it where another one is between them, and what a key begins: [V, V] each."""
    ids: dict[str, int] = {piece: tokenizer.encode(piece, special=False)[0] for piece in pieces(scripts)}
    rows = [[ids[piece] for piece in script] for script in (*scripts.values(), AFTER_ANSWER)]
    follow: dict[int, set[int]] = {}
    for row in rows:
        for a, b in itertools.pairwise(row):
            follow.setdefault(a, set()).add(b)
    last, before, key = torch.zeros(3, size, size)
    for row in rows:
        for i, (a, b) in enumerate(itertools.pairwise(row)):
            if len(follow[a]) == 1:
                last[b, a] = 1.0
            elif i:
                before[b, row[i - 1]] = 1.0
    for name, script in scripts.items():
        first, second = ids[script[0]], ids[script[1]]
        key[first, ids[name]] = 1.0
        if len(follow[first]) > 1:  # what comes second depends on the key, too
            key[second, ids[name]], last[first, first] = 0.5, -1.0
    # the mean of the last two tokens has the last one in it, which is not the one before it
    return last - 0.4 * before, before, key


def _quiet(model: Target | Drafter) -> None:
    """Nothing but the residual stream: what each branch adds is multiplied by zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
            parameter.zero_()
        else:
            parameter.fill_(1.0)


def _config(size: int, hidden: int, layers: int) -> TextConfig:
    return TextConfig(
        vocab_size=size, hidden_size=hidden, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, num_global_key_value_heads=1, head_dim=size, global_head_dim=size,
        layer_types=(*[S] * (layers - 1), F), sliding_window=2,
        max_position_embeddings=4096, tie_word_embeddings=False, eos_token_ids=EOS,
        num_kv_shared_layers=0 if layers == 2 else layers,
    )  # fmt: skip


@torch.no_grad()
def _target(size: int, head: Tensor) -> Target:
    target = Target(_config(size, 3 * size, 2)).eval().requires_grad_(False)
    _quiet(target)
    one = torch.eye(size)
    target.embed_tokens.weight[:, :size] = one
    for i, layer in enumerate(target.layers):
        assert isinstance(layer, DecoderLayer)
        layer.self_attn.qkv_proj.weight[-size:, :size] = one  # values; queries and keys are zero
        layer.self_attn.o_proj.weight[(i + 1) * size : (i + 2) * size] = one
        layer.post_attention_layernorm.weight.fill_(1.0)
    assert target.lm_head is not None
    target.lm_head.weight.copy_(head)
    return target


@torch.no_grad()
def _drafter(target: TextConfig, head: Tensor) -> Drafter:
    size = target.vocab_size
    drafter = Drafter(DrafterConfig(_config(size, 2 * size, 4), target.hidden_size)).eval().requires_grad_(False)
    _quiet(drafter)
    one = torch.eye(size)
    drafter.pre_projection.weight[:size, :size] = one  # the last token
    drafter.pre_projection.weight[size:, 3 * size : 4 * size] = one  # and the one before it
    drafter.post_projection.weight[:size, :size] = one
    drafter.head.weight.copy_(head)
    return drafter
