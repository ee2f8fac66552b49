"""Recipes: every one is whole, its shell lines, YAML, JSON and Python parse, and what it names exists or is made."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import refused

from gemma_mtp.cli import main
from gemma_mtp.cli.recipe_run import TRIED
from gemma_mtp.engine.pair import bundled_directory
from gemma_mtp.errors import OptionError
from gemma_mtp.interop.gguf import FILE_TYPES, export_gguf
from gemma_mtp.interop.packings import PACKINGS
from gemma_mtp.recipes.fill import Filled, fill
from gemma_mtp.recipes.given import Drafts, Given, given
from gemma_mtp.recipes.read import read_recipe, runtimes

EVERYWHERE = Path(__file__).parents[1] / "docs" / "use" / "everywhere.md"
ASKED = ["litert-lm", "llama.cpp", "mlx", "ollama", "openvino", "ray-serve-llm", "sglang", "tensorrt-llm",
         "transformers", "vllm"]  # fmt: skip
#: pairs in every form that recipes read
PAIRS = ("bundled", "google/gemma-4-E4B-it", "gemma-4-26B-A4B-it", "files with spaces")
#: programs that a step's line begins with, after variables
PROGRAMS = {"pip", "python", "vllm", "serve", "trtllm-serve", "llama-server", "ollama", "litert-torch", "litert-lm",
            "optimum-cli", "mlx_lm.generate", "gemma-mtp"}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str | None]]:
    """Names of `PAIRS`, and what is given for them."""
    root = tmp_path_factory.mktemp("a pair's")
    for role in ("target", "drafter"):
        (root / f"my {role}").symlink_to(bundled_directory() / role)
    return {**{name: (name, None) for name in PAIRS}, PAIRS[-1]: (str(root / "my target"), str(root / "my drafter"))}


def values(place: tuple[str, str | None], device: str, **more: Any) -> Given:
    asked = {"context": None, "sequences": 4, "memory": 96 * 2**30, "drafts": None, **more}
    return given(*place, asked.pop("drafts"), device, **asked)


def filled_all(places: dict[str, tuple[str, str | None]]) -> list[tuple[Given, Filled]]:
    found = []
    for runtime in runtimes():
        recipe = read_recipe(runtime)
        for place in places.values():
            for device in recipe.devices:
                value = values(place, device)
                if value.form in recipe.reads:
                    found.append((value, fill(recipe, value)))
    return found


def test_there_is_a_recipe_for_every_runtime() -> None:
    assert runtimes() == ASKED


@pytest.mark.parametrize("runtime", ASKED)
def test_a_recipe_says_what_was_tried_and_when(runtime: str) -> None:
    recipe = read_recipe(runtime)
    assert recipe.tried in TRIED and re.fullmatch(r"20\d\d-\d\d", recipe.date) and recipe.seen
    assert recipe.versions and {one.works for one in recipe.versions} <= {"yes", "no", "partly", "unknown"}
    assert recipe.steps and recipe.lost and recipe.unknown
    if recipe.tried != "run":
        assert all(one.works in ("no", "unknown") for one in recipe.versions)


def test_every_line_and_file_parses_and_names_what_there_is(places: dict[str, tuple[str, str | None]]) -> None:
    parsed = {"yaml": yaml.safe_load, "python": lambda text: compile(text, "recipe", "exec"),
              "modelfile": lambda text: [line.split(None, 1)[1] for line in text.splitlines()]}  # fmt: skip
    seen = filled_all(places)
    assert len(seen) > 40
    for value, filled in seen:
        made = {file.name for file in filled.files}
        for file in filled.files:
            assert parsed[file.language](file.text), file.text
        for step in filled.steps:
            words = shlex.split(step.run.replace("\\\n", " "))
            program = next(word for word in words if not re.fullmatch(r"[A-Z_]+=.*", word))
            assert program in PROGRAMS, step.run
            outputs = {words[i + 1] for i, word in enumerate(words) if word == "--out"}
            inputs = [w for w in words if re.search(r"\.(gguf|yaml|py)$|^Modelfile$", w) and w not in outputs]
            assert all(word in made or Path(word).exists() for word in inputs), step.run
            made |= outputs
        whole = json.dumps(filled.to_dict())
        assert "{{" not in "".join(step.run for step in filled.steps) and not re.search(r"\bNone\b", whole)
        if value.form == "hub":
            assert "google/gemma-4" in whole
        else:
            assert all(Path(place).exists() for place in (value.target, value.drafter))


def test_recipes_name_the_exports_that_a_runtime_reads(tmp_path: Path) -> None:
    """By commands that parse, of types that there are; and a form that it does not read is told what makes another."""
    for runtime in runtimes():
        recipe = read_recipe(runtime)
        filled = fill(recipe, values(("bundled", None), recipe.devices[0]))
        told = [*filled.notes, *(step.run for step in filled.steps)]
        words = [shlex.split(line.partition(", then")[0].partition("gemma-mtp export ")[2]) for line in told]
        exports = {asked[asked.index("--to") + 1]: asked for asked in words if "--to" in asked}
        expected = {"llama.cpp": {"gguf"}, "ollama": {"gguf"}, "mlx": {"mlx", "safetensors"},
                    "vllm": {"compressed-tensors", "safetensors"}, "sglang": {"compressed-tensors", "safetensors"},
                    "ray-serve-llm": {"compressed-tensors", "safetensors"},
                    "transformers": {"compressed-tensors", "safetensors"}}.get(runtime, {"safetensors"})  # fmt: skip
        assert exports.keys() == expected, runtime
        for to, asked in exports.items():
            known = list(FILE_TYPES if to == "gguf" else PACKINGS[to])
            assert "--type" not in asked or asked[asked.index("--type") + 1] in known
    for directory in ("target", "drafter"):
        export_gguf(bundled_directory() / directory, tmp_path / f"{directory}.gguf", "Q8_0")
    of_files = values((str(tmp_path / "target.gguf"), str(tmp_path / "drafter.gguf")), "cpu")
    with pytest.raises(OptionError, match="gemma-mtp export --to safetensors makes of a file"):
        fill(read_recipe("vllm"), of_files)


def test_k_stands_where_each_runtime_wants_it() -> None:
    place = ("gemma-4-E4B-it", None)

    def text(runtime: str, device: str, place: tuple[str, str | None] = place) -> str:
        filled = fill(read_recipe(runtime), values(place, device, drafts=Drafts(5, "given")))
        return "\n".join([*(file.text for file in filled.files), *(step.run for step in filled.steps)])

    assert '"num_speculative_tokens": 5' in text("vllm", "cuda")
    assert "--speculative-num-steps 5 " in text("sglang", "cuda")
    assert "--speculative-num-draft-tokens 6" in text("sglang", "cuda")
    assert yaml.safe_load(text("tensorrt-llm", "cuda").split("trtllm-serve")[0])["speculative_config"] == {
        "decoding_type": "MTP", "max_draft_len": 5, "mtp_eagle_one_model": False,
        "speculative_model": "google/gemma-4-E4B-it-assistant",
    }  # fmt: skip
    assert "--draft-block-size 6" in text("mlx", "metal")
    assert "num_assistant_tokens = 5" in text("transformers", "cpu")
    assert "--spec-draft-n-max 5 " in text("llama.cpp", "cpu", ("bundled", None))
    assert "PARAMETER draft_num_predict 5" in text("ollama", "cpu", ("bundled", None))


def test_what_is_lost_depends_on_the_pair() -> None:
    lost = {size: fill(read_recipe("transformers"), values((f"gemma-4-{size}-it", None), "cpu")).lost
            for size in ("E2B", "31B")}  # fmt: skip
    assert any("distribution" in line for line in lost["E2B"])
    of_bundled = values(("bundled", None), "cpu")
    assert not of_bundled.centroids
    llama = read_recipe("llama.cpp")
    assert not any("centroid" in line for line in fill(llama, of_bundled).lost)
    with_centroids = Given(**{**vars(of_bundled), "centroids": True})
    assert any("centroid" in line for line in fill(llama, with_centroids).lost)


def test_ray_s_own_schema_takes_the_file() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    for device in ("cpu", "cuda"):
        (file,) = fill(read_recipe("ray-serve-llm"), values(("gemma-4-E2B-it", None), device)).files
        read = schema.ServeDeploySchema.model_validate(yaml.safe_load(file.text))
        (config,) = read.applications[0].args["llm_configs"]
        assert config["engine_kwargs"]["speculative_config"]["num_speculative_tokens"] == 2
        assert ("accelerator_config" in config) == (device == "cpu")


def test_transformers_own_classes_take_the_recipe_s_settings() -> None:
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    (file,) = fill(read_recipe("transformers"), values(("bundled", None), "cpu")).files
    for name in re.findall(r"generation_config\.(\w+) = ", file.text):
        assert hasattr(GenerationConfig(), name), name
    for role in ("target", "drafter"):
        config = json.loads((bundled_directory() / role / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_memory_flags_are_the_planner_s(capsys: pytest.CaptureFixture[str]) -> None:
    place = ("gemma-4-31B-it", None)
    fits = values(place, "cuda", context=8192, memory=141 * 10**9)
    assert fits.fits and fits.memory_share is not None and 0.45 < fits.memory_share < 0.7
    command = fill(read_recipe("vllm"), fits).steps[-1].run
    assert f"--gpu-memory-utilization {fits.memory_share}" in command and "--max-model-len 8192" in command
    tight = values(place, "cuda", context=262144, sequences=16, memory=80 * 10**9)
    assert tight.fits and tight.context < 262144 and f"--max-model-len {tight.context} " in fill(
        read_recipe("vllm"), tight).steps[-1].run  # fmt: skip
    never = values(place, "cuda", memory=24 * 10**9)
    filled = fill(read_recipe("vllm"), never)
    assert not never.fits and any("does not fit" in line for line in filled.memory)
    assert "--gpu-memory-utilization" not in filled.steps[-1].run
    assert main(["recipe", "vllm", "--target", "gemma-4-31B-it", "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draft_tokens"] == 4


def test_k_comes_from_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["acceptance", "--json", "--limit", "2", "-n", "16", "-t", "0", "--prompt-tokens", "32"]) == 0
    report = tmp_path / "report.json"
    written = json.loads(capsys.readouterr().out)
    written["settings"][0]["best_draft_tokens"] = 7  # what it is depends on the machine
    report.write_text(json.dumps(written), encoding="utf-8")
    assert main(["recipe", "llama.cpp", "--device", "cpu", "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert "drafts a round: 7, fastest by report.json (greedy)" in out and "--spec-draft-n-max 7 " in out


def test_a_report_that_is_not_there_is_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "vllm", "--report", "/absent/report.json"]) == 2
    assert "there is no file /absent/report.json; give what gemma-mtp acceptance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"settings": [{"best_draft_tokens": 0, "label": "greedy"}]}, "does not pay"),
        ({"settings": [{"best_draft_tokens": None, "label": "greedy"}]}, "measure again"),
        ({"settings": [{"best_draft_tokens": 99, "label": "greedy"}]}, "the most is"),
        ({"settings": [{"best_draft_tokens": True, "label": "greedy"}]}, "measure again"),
        ({"settings": 3}, "no report"), ([], "no report"), ({"settings": [3]}, "no report"),
    ],
)  # fmt: skip
def test_a_report_that_says_nothing_is_refused(
    report: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    assert said in refused(capsys, ["recipe", "vllm", "--device", "cpu", "--report", str(path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "there is no recipe for 'nonsense'"),
        (["vllm", "--device", "tpu"], "--device is 'tpu'"),
        (["tensorrt-llm", "--device", "cpu"], "--device cuda"),
        (["vllm", "-k", "0"], "--draft-tokens is 0"),
        (["vllm", "-k", "3", "--report", "x"], "give one of them"),
        (["vllm", "--report", "absent/report.json"], "absent"),
        (["vllm", "--context", "0"], "--context is 0"),
        (["vllm", "--sequences", "0"], "--sequences is 0"),
        (["llama.cpp", "--target", "gemma-4-E2B-it"], "a directory or a GGUF file"),
        (["vllm", "--target", "absent"], "neither a directory nor a known name"),
        (["vllm", "--memory", "many"], "--memory"),
    ],
)
def test_what_can_not_be_filled_in_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert said in refused(capsys, ["recipe", *arguments, *device])


def test_the_page_has_a_row_for_every_recipe() -> None:
    text = EVERYWHERE.read_text(encoding="utf-8")
    for runtime in runtimes():
        recipe = read_recipe(runtime)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{runtime}` |"))
        assert f"| {TRIED[recipe.tried]} |" in row and f"| {recipe.date} |" in row and f"| {recipe.seen} |" in row
    assert len(re.findall(r"^\| `", text, re.MULTILINE)) == len(runtimes())
