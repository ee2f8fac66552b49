"""Other runtimes run what we export, and give the tokens that ours gives: `make interop` installs and runs them.

All are compared in float32, where order of sums is all that differs: near ties are far apart there. Where a runtime has
only narrower numbers, the test says what they may change.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from byte_fallback import CHARACTERS, FIRST_BYTE, gemma_like
from gemma3 import IDS, build
from models import WIDE, backends, open_caches, random_target, run_rows, save_pair, wide_drafter
from runtimes import llama_server, llama_tokens, played
from safetensors.torch import load_file, save_file
from test_mobile import check_alike

from gemma_mtp import SamplingParams, load_pair
from gemma_mtp.checkpoint import load_target
from gemma_mtp.cli import main
from gemma_mtp.engine.pair import Pair, bundled_directory
from gemma_mtp.interop.directory import export_directory
from gemma_mtp.interop.gguf import export_gguf
from gemma_mtp.recipes.fill import fill
from gemma_mtp.recipes.given import Drafts, given
from gemma_mtp.recipes.read import read_recipe
from gemma_mtp.weights.matrix import matrices

pytestmark = pytest.mark.interop

TARGET, DRAFTER = bundled_directory() / "target", bundled_directory() / "drafter"
COUNT, K = 32, 3
#: what makes llama.cpp keep keys and values, and sum scores, as float32
FLOAT32 = ["--float32"]
Tokens = list[list[int]]
#: of the tokenizer of `splits_alike`: where characters begin, and a prompt of them that is longer than the window
FIRST_TEXT = FIRST_BYTE + 256
WORDS = [FIRST_TEXT + (7 * i * i + i) % len(CHARACTERS) for i in range(40)]


@pytest.fixture(scope="module")
def prompts() -> Tokens:
    """Python of 3, 8 and 180 tokens: the last is longer than the window."""
    tokenizer = load_pair().tokenizer
    assert tokenizer is not None
    lines = (bundled_directory() / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    long = next(ids for ids in (tokenizer.encode(json.loads(line)["text"]) for line in lines) if len(ids) > 180)[:180]
    return [long[:3], long[40:48], long]


def ours(target: Path, prompts: Tokens, drafter: Path | None = None, dtype: str = "float32") -> Tokens:
    """Greedy tokens, plain, and with drafts too where there is a drafter."""
    pair = load_pair(target, drafter, use_drafter=drafter is not None, dtype=dtype, device="cpu")
    plain = decoded(pair, prompts, 0)
    assert drafter is None or decoded(pair, prompts, K) == plain
    return plain


def decoded(pair: Pair, prompts: Tokens, draft_tokens: int) -> Tokens:
    params = SamplingParams(max_tokens=COUNT, ignore_eos=True)
    return [pair.generate(prompt, params, draft_tokens=draft_tokens).token_ids for prompt in prompts]


def same(one: Tokens, other: Tokens) -> float:
    """The share of tokens that are the same, place by place."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def recipe_words(runtime: str, target: Path, drafter: Path) -> list[str]:
    """The last command of a recipe, for a pair in files, with 2 sequences of 512 tokens."""
    filled = fill(read_recipe(runtime), given(str(target), str(drafter), Drafts(K, "given"), "cpu", 512, 2, None))
    return shlex.split(filled.steps[-1].run.replace("\\\n", " "))


# -- llama.cpp


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled pair as GGUF files."""
    root = tmp_path_factory.mktemp("gguf")
    for kind in ("F32", "BF16", "Q8_0"):
        for directory in (TARGET, DRAFTER):
            export_gguf(directory, root / f"{directory.name}-{kind}.gguf", kind)
    return root


def llama_pair(root: Path, kind: str) -> list[str]:
    program, *words = recipe_words("llama.cpp", root / f"target-{kind}.gguf", root / f"drafter-{kind}.gguf")
    assert program == "llama-server"
    return words


def test_llama_cpp_drafts_our_tokens(files: Path, prompts: Tokens) -> None:
    """By the recipe's own command, in float32."""
    expected = ours(files / "target-F32.gguf", prompts, files / "drafter-F32.gguf")
    with llama_server([*llama_pair(files, "F32"), *FLOAT32]) as client:
        made = [llama_tokens(client, prompt, COUNT) for prompt in prompts]
    assert [tokens for tokens, _ in made] == expected
    assert all(drafts > 0 for _, drafts in made)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_llama_cpp_reads_narrow_files(files: Path, prompts: Tokens, kind: str) -> None:
    """By the recipe's command as it is printed. It rounds what it multiplies blocks and bf16 by in its own way, and
    keeps keys and values as f16: near ties go another way, and all that follows."""
    expected = ours(files / f"target-{kind}.gguf", prompts, files / f"drafter-{kind}.gguf")
    with llama_server(llama_pair(files, kind)) as client:
        made = [llama_tokens(client, prompt, COUNT) for prompt in prompts]
    assert [tokens[0] for tokens, _ in made] == [tokens[0] for tokens in expected]
    assert same([tokens for tokens, _ in made], expected) > 1 / 3


def test_identity_of_llama_cpp(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain server and a drafted one, by our command: in float32 every output is the same, one at a time."""
    words = [*llama_pair(files, "F32"), *FLOAT32]
    with llama_server(words) as drafted, llama_server(["-m", words[words.index("-m") + 1], *FLOAT32]) as plain:
        urls = [str(client.base_url) for client in (plain, drafted)]
        code = main(["identity", *urls, "--limit", "4", "-n", str(COUNT), "--clients", "1", "--json"])
    read = json.loads(capsys.readouterr().out)
    assert (code, read["identical"], read["failed"]) == (0, 1.0, 0)
    assert read["drafts"]["plain"] == 0 and read["drafts"]["drafted"] > 50


def test_llama_cpp_reads_gemma3(tmp_path: Path) -> None:
    """Of random weights, beyond the window; and it splits text as the exported tokenizer does."""
    build(query_pre_attn_scalar=16, vocab_size=400).save_pretrained(tmp_path / "target")
    splits_alike(tmp_path / "target", tmp_path / "t.gguf")


def test_llama_cpp_reads_experts(tmp_path: Path) -> None:
    """Of random weights, as float32 and in blocks, which it need not decode alike."""
    config = dataclasses.replace(WIDE["moe"], vocab_size=400)
    save_pair(tmp_path, random_target(config=config), wide_drafter(config))
    splits_alike(tmp_path / "target", tmp_path / "t.gguf")
    export_gguf(tmp_path / "target", tmp_path / "q.gguf", "Q8_0")
    with llama_server(["-m", str(tmp_path / "q.gguf"), "-c", "512", "-np", "1"]) as client:
        tokens, _ = llama_tokens(client, WORDS, COUNT)
    (expected,) = ours(tmp_path / "q.gguf", [WORDS])
    assert tokens[0] == expected[0]


def splits_alike(directory: Path, file: Path) -> None:
    """A random checkpoint gets a tokenizer of Gemma's form: the same tokens after a prompt, and the same ids of texts.

    It says no special tokens nor bytes: their rows of the table are small. llama.cpp's server fails at what is no text.
    """
    raw = gemma_like()
    raw.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **names}))
    tensors = load_file(directory / "model.safetensors")
    for rows in (slice(FIRST_TEXT), slice(raw.get_vocab_size(), None)):
        tensors["model.embed_tokens.weight"][rows] *= 0.01
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert not any("tokenizer" in loss for loss in export_gguf(directory, file, "F32").losses)
    pair = load_pair(file, use_drafter=False, dtype="float32", device="cpu")
    assert pair.tokenizer is not None
    texts = ["hello the ok", "  two\n\nlines ", "".join(CHARACTERS)]
    with llama_server(["-m", str(file), "-c", "512", "-np", "1", *FLOAT32]) as client:
        tokens, _ = llama_tokens(client, WORDS, COUNT)
        asked = [{"content": text, "add_special": True, "parse_special": True} for text in texts]
        ids = [client.post("/tokenize", json=one).json()["tokens"] for one in asked]
    assert [tokens] == decoded(pair, [WORDS], 0)
    assert ids == [pair.tokenizer.encode(text) for text in texts]


# -- transformers


def test_transformers_drafts_our_tokens(prompts: Tokens, tmp_path: Path) -> None:
    for directory in (TARGET, DRAFTER):
        export_directory(directory, tmp_path / directory.name, "safetensors", "F32")
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    made = played("transformers", "run_transformers.py", str(target), str(drafter), prompts, str(COUNT))
    assert made["drafted"] == made["plain"] == ours(target, prompts, drafter)


@pytest.mark.parametrize("kind", ["W4A16", "W8A16"])
def test_transformers_decodes_compressed_tensors(prompts: Tokens, tmp_path: Path, kind: str) -> None:
    export_directory(TARGET, tmp_path / kind, "compressed-tensors", kind)
    made = played("transformers", "run_transformers.py", str(tmp_path / kind), "-", prompts, str(COUNT))
    assert made["plain"] == ours(tmp_path / kind, prompts)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_transformers_mobile_checkpoints(seed: int, tmp_path: Path) -> None:
    """Of numbers of 2, 4 and 8 bits and static scales of activations, by its own layers and writer."""
    made = played("transformers", "make_mobile.py", str(tmp_path), str(seed))
    target, expected = load_target(tmp_path, torch.float32, strict=True), load_file(tmp_path / "expected.safetensors")
    assert sum(len(matrix.activations) for matrix in matrices(target)) == made["layers"] - 1  # one is not calibrated
    for backend in backends(target).values():
        (cache,) = open_caches(backend, 1, len(expected["ids"][0]))
        with torch.inference_mode():
            check_alike(backend.logits(run_rows(backend, cache, expected["ids"][0].tolist())), expected["logits"][0])


# -- MLX


def test_mlx_decodes_our_tokens(prompts: Tokens, tmp_path: Path) -> None:
    """As float32 the same. Packed it computes in bf16, the type of the scales: near ties go another way."""
    for kind in ("F32", "8BIT", "4BIT"):
        export_directory(TARGET, tmp_path / kind, "mlx", kind)
    directories = {kind: str(tmp_path / kind) for kind in ("F32", "8BIT", "4BIT")}
    made = played("mlx-lm", "run_mlx.py", list(directories.values()), prompts, str(COUNT))
    assert made[directories["F32"]] == ours(tmp_path / "F32", prompts)
    for kind in ("8BIT", "4BIT"):
        expected = ours(tmp_path / kind, prompts)
        found = made[directories[kind]]
        assert [tokens[0] for tokens in found] == [tokens[0] for tokens in expected]
        assert same(found, expected) > 1 / 3


def test_mlx_decodes_experts(tmp_path: Path) -> None:
    """Of random weights: as float32 the same tokens, and packed the same first one."""
    save_pair(tmp_path, random_target(config=WIDE["moe"]), wide_drafter(WIDE["moe"]))
    for kind in ("F32", "8BIT"):
        export_directory(tmp_path / "target", tmp_path / kind, "mlx", kind)
    directories, prompt = [str(tmp_path / kind) for kind in ("F32", "8BIT")], IDS.tolist()
    made = played("mlx-lm", "run_mlx.py", directories, [prompt], str(COUNT))
    assert made[directories[0]] == ours(tmp_path / "F32", [prompt])
    assert made[directories[1]][0][0] == ours(tmp_path / "8BIT", [prompt])[0][0]


# -- vLLM


def test_vllm_drafts_our_tokens(prompts: Tokens) -> None:
    """By the recipe's own arguments, which its parser and its configuration take, with float32 for the comparison."""
    words = recipe_words("vllm", TARGET, DRAFTER)
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                 "OMP_NUM_THREADS": str(os.cpu_count() or 1), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # fmt: skip
    made = played("vllm", "run_vllm.py", words[words.index("--model") :], prompts, str(COUNT), **variables)
    assert made["drafted"] == ours(TARGET, prompts, DRAFTER)
    assert (made["method"], made["draft_tokens"]) == ("mtp", K)
    assert 0 < made["accepted"] <= made["drafts"]
