"""A real Gemma: 270 M pretrained parameters in a GGUF file, beside transformers' reading of the same file.

What random weights can not show: that text comes out right, and what quantisation costs on text. Nothing here is kept,
and figures are printed (`pytest -m real -s`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quality import loss
from real_weights import gemma3_270m
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import load_target, open_source, read_target_config, save_drafter
from gemma_mtp.engine.pair import Pair
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.model.drafter import Drafter
from gemma_mtp.training.shapes import DrafterShape, initialise, new_drafter_config

pytestmark = pytest.mark.real

NEW_TOKENS = 72
PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n", "Die Hauptstadt von Deutschland ist", "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8, 13,", "The three laws of motion are:\n1.", "東京は日本の",
)  # fmt: skip
TEXTS = (
    *PROMPTS, "", " ", "  two  spaces ", "tabs\tand\nlines\r\n\n", "naïve café — “quoted”", "emoji 🙂🙃 👩‍👩‍👧",
    "<bos>x<eos>", "<start_of_turn>user\nHi<end_of_turn>\n", "x = [1, 2.5e-3, 0xFF]", "ﬁ ﬀ Å ḱ",
    "العربية עברית हिन्दी", "\u0000\u0001",
    "a" * 300, "don't stop; CamelCaseWords_and_snake",
)  # fmt: skip
#: the project's own words, under its licence
TEXT = Path(__file__).parent.parent / "docs" / "explain" / "exactness.md"
ROW, ROWS = 256, 6


@pytest.fixture(scope="module")
def file() -> Path:
    return gemma3_270m()


@pytest.fixture(scope="module")
def theirs(file: Path) -> Gemma3ForCausalLM:
    """What transformers makes of the file: its blocks as float32."""
    read: Any = AutoModelForCausalLM
    return read.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def root(file: Path, theirs: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`copy`: what transformers has, as safetensors; `drafter`: a random one that fits. Both are removed."""
    root = tmp_path_factory.mktemp("real")
    (root / "copy").mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, root / "copy" / "model.safetensors")
    known = Gemma3TextConfig().to_dict()
    config = {name: value for name, value in theirs.config.to_dict().items() if name in known}
    (root / "copy" / "config.json").write_text(json.dumps(config))
    open_source(file).copy_companions(root / "copy")
    of_drafter = new_drafter_config(read_target_config(file), DrafterShape(hidden=64, heads=4))
    drafter = Drafter(of_drafter)
    initialise(drafter, 0)
    save_drafter(drafter, of_drafter, root / "drafter", torch.float32)
    del drafter
    yield root
    for weights in root.rglob("*.safetensors"):
        weights.unlink()


@pytest.fixture(scope="module")
def prompts(file: Path) -> list[list[int]]:
    tokenizer = open_source(file).tokenizer()
    return [tokenizer.encode(text) for text in PROMPTS]


def generated(pair: Pair, prompt: list[int], draft_tokens: Any = 0, **params: Any) -> list[int]:
    chosen = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **params)
    return pair.generate(prompt, chosen, draft_tokens=draft_tokens).token_ids


def test_the_weights_are_transformers_of_the_file(file: Path, theirs: Gemma3ForCausalLM) -> None:
    """Bit for bit; norms as they are stored in the file, with the 1 inside, which transformers takes out and adds."""
    stored = theirs.state_dict()
    weights = load_target(file, torch.float32, strict=True).checkpoint_tensors()
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.allclose(weight.values(), stored[name] + 1, rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(weight.values(), stored[name]), name
    assert {name.removeprefix("model.") for name in stored} - {n.removeprefix("model.") for n in weights} == {
        "lm_head.weight"
    }


@torch.inference_mode()
def test_tokens_are_transformers(theirs: Gemma3ForCausalLM, root: Path, prompts: list[list[int]]) -> None:
    """576 of 576 in float32; and of the pair with a drafter."""
    pair = load_pair(root / "copy", root / "drafter", dtype="float32", device="cpu", strict=True)
    same = 0
    for prompt in prompts:
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                               do_sample=False)[0, len(prompt) :].tolist()  # fmt: skip
        ours = generated(pair, prompt)
        same += sum(a == b for a, b in zip(ours, made, strict=True))
        assert generated(pair, prompt, 3) == ours
    assert same == len(PROMPTS) * NEW_TOKENS
    print(f"\n{same} of {len(PROMPTS) * NEW_TOKENS} tokens are transformers'")


@pytest.mark.parametrize("weights", ["file", "bfloat16", "int8", "int4"])
def test_drafted_equals_plain(file: Path, root: Path, prompts: list[list[int]], weights: str) -> None:
    where, rest = (file, {}) if weights == "file" else (root / "copy", {"dtype": "bfloat16"})
    quantize = weights if weights.startswith("int") else None
    pair = load_pair(where, root / "drafter", device="cpu", quantize=quantize, **rest)  # type: ignore[arg-type]
    drawn: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "seed": 7})
    for prompt in prompts[:3]:
        for params in drawn:
            plain = generated(pair, prompt, **params)
            assert [generated(pair, prompt, K, **params) for K in (1, 3, "auto")] == [plain] * 3


def test_the_text_is_right(file: Path) -> None:
    """A base model goes on as everybody would."""
    pair = load_pair(file, use_drafter=False, device="cpu")
    params = SamplingParams(max_tokens=8)
    texts = ("Monday, Tuesday, Wednesday,", "1, 2, 3, 4, 5, 6,")
    days, numbers = (pair.generate(text, params).text or "" for text in texts)
    assert days.startswith(" Thursday, Friday")
    assert numbers.startswith(" 7, 8")


def test_the_tokenizer_is_transformers(file: Path) -> None:
    """Made of the file's scores by both; and llama.cpp's own where it is installed."""
    ours = open_source(file).tokenizer()
    theirs: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    different = [
        text for text in TEXTS if ours.encode(text, special=False) != theirs.encode(text, add_special_tokens=False)
    ]
    assert different == []
    for text in PROMPTS:
        ids = ours.encode(text)
        assert ids[0] == 2
        assert ours.decode(ids) == text


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, of the extra bench")
def test_the_tokenizer_is_llama_cpps(file: Path) -> None:
    import llama_cpp

    ours = open_source(file).tokenizer()
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    texts = [text for text in TEXTS if text and "\u0000" not in text]  # where a text of C ends
    encoded = {text: model.tokenize(text.encode(), add_bos=False, special=True) for text in texts}
    assert [text for text, ids in encoded.items() if ours.encode(text, special=False) != ids] == []


@torch.inference_mode()
def test_perplexity(file: Path, root: Path, theirs: Gemma3ForCausalLM) -> None:
    """Of float32 it is transformers'; and what else there is comes near it, each in its order."""
    ids = open_source(file).tokenizer().encode(TEXT.read_text(encoding="utf-8"), special=False)
    rows = torch.tensor([[2, *ids[i * (ROW - 1) : (i + 1) * (ROW - 1)]] for i in range(ROWS)])
    expected = sum(float(theirs(row[None], labels=row[None]).loss) for row in rows) / ROWS
    found: dict[str, float] = {}
    for name, dtype, quantize in (("float32", "float32", None), ("bfloat16", "bfloat16", None),
                                  ("int8", "bfloat16", "int8"), ("int4", "bfloat16", "int4")):  # fmt: skip
        pair = load_pair(root / "copy", use_drafter=False, dtype=dtype, quantize=quantize, device="cpu")
        found[name] = loss(pair.backend, rows)
    found["the file's blocks"] = loss(load_pair(file, use_drafter=False, device="cpu").backend, rows)
    shown = ", ".join(f"{name} {math.exp(nats):.2f}" for name, nats in found.items())
    print(f"\nperplexity of {rows.numel()} tokens: {shown}; transformers {math.exp(expected):.2f}")
    assert abs(found["float32"] - expected) < 1e-3
    assert abs(found["the file's blocks"] - expected) < 0.01
    assert abs(found["bfloat16"] - expected) < 0.02
    assert abs(found["int8"] - expected) < 0.05
    assert found["int8"] < found["int4"] < expected + 0.5


def test_speed_beside_llama_cpp(file: Path, prompts: list[list[int]]) -> None:
    """Both plain, on the same file, prompt by prompt in turn: the figures are printed, and decide nothing. The tokens
    are nearly the same: both multiply blocks by rounded activations, in another order."""
    llama = pytest.importorskip("llama_cpp_decoder", exc_type=ImportError)
    pair = load_pair(file, use_drafter=False, device="cpu")
    target = llama.Target(str(file), torch.get_num_threads(), 256)
    seconds, same = {"ours": 0.0, "llama.cpp": 0.0}, 0
    for prompt in prompts:
        started = time.perf_counter()
        ours = generated(pair, prompt)
        between = time.perf_counter()
        other = llama.generate(target, None, prompt, NEW_TOKENS, 0)["tokens"]
        seconds["llama.cpp"] += time.perf_counter() - between
        seconds["ours"] += between - started
        same += sum(a == b for a, b in zip(ours, other, strict=True))
    count = NEW_TOKENS * len(prompts)
    shown = ", ".join(f"{name} {count / taken:.1f}" for name, taken in seconds.items())
    print(f"\ntokens/s with prefill: {shown}; {same} of {count} tokens are the same")
    assert same > count // 3


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_its_export_is_llama_cpps(file: Path, prompts: list[list[int]], tmp_path: Path, kind: str) -> None:
    """Written anew the file has the same tokenizer and, as float32, the same weights; llama.cpp splits text alike."""
    made = export_gguf(file, tmp_path / "out.gguf", kind)
    assert not any("tokenizer" in loss for loss in made.losses)
    before, after = (
        load_pair(each, use_drafter=False, device="cpu", dtype="float32") for each in (file, tmp_path / "out.gguf")
    )
    if kind == "F32":
        of_file = load_target(file, torch.float32).checkpoint_tensors()
        for name, weight in load_target(tmp_path / "out.gguf", torch.float32).checkpoint_tensors().items():
            assert torch.equal(weight.values(), of_file[name].values()), name
    texts = [pair.generate(prompts[0], SamplingParams(max_tokens=8)).text for pair in (before, after)]
    assert texts[0] == texts[1]
    llama = pytest.importorskip("llama_cpp_decoder", exc_type=ImportError)
    target = llama.Target(str(tmp_path / "out.gguf"), torch.get_num_threads(), 256)
    found = llama.generate(target, None, prompts[0], NEW_TOKENS, 0)["tokens"]
    same = sum(a == b for a, b in zip(generated(after, prompts[0]), found, strict=True))
    assert same == NEW_TOKENS if kind == "F32" else same > NEW_TOKENS // 3
