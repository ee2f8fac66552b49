"""What `gemma-mtp doctor` does: look, measure why drafts are refused, and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer

from gemma_mtp.chat.prompt import Conversation, chat_ids
from gemma_mtp.cli import options
from gemma_mtp.cli.console import console
from gemma_mtp.cli.doctor import DoctorData, ExaminedPair
from gemma_mtp.cli.doctor_checks import Check, Status, machine_checks, pair_checks
from gemma_mtp.cli.progress import progress
from gemma_mtp.engine.pair import Pair
from gemma_mtp.measure.acceptance import Prompt, prompts_of
from gemma_mtp.measure.diagnosis import Finding, compare_prompts, compare_types, diagnose, write

QUESTIONS = (
    "Explain why the sky is blue.", "Write a short story about a lighthouse.", "What is a prime number?",
    "Give three tips for learning a language.",
)  # fmt: skip
PROMPTS, PROMPT_TOKENS = 6, 192
MARKS: dict[Status, str] = {"ok": " ", "note": "-", "problem": "!"}


def doctor(models: ExaminedPair, given: DoctorData, output: options.JsonOutput) -> None:
    """Print what was found. Exits with 1 where something is wrong."""
    checks = machine_checks()
    findings: list[Finding] = []
    if models.target is not None:
        checks += pair_checks(models)
        findings = _diagnosis(models, given.data)
    if output.as_json:
        found = {"checks": [asdict(check) for check in checks], "diagnosis": [asdict(finding) for finding in findings]}
        print(json.dumps(found))
    else:
        _print(checks, findings)
    if any(check.status == "problem" for check in checks) or any(f.verdict == "cause" for f in findings):
        raise typer.Exit(1)


def _diagnosis(models: ExaminedPair, data: Sequence[Path] | None) -> list[Finding]:
    with progress("loading") as say:
        pair = models.load()
        if pair.drafter is None:
            return []
        say("measuring")
        plain, templated, foreign = _prompts(pair, data)
        if not plain:
            return [Finding("first drafts", "not measured", "the target's directory has no tokenizer.json; add it")]
        prompts = templated or plain
        written = write(pair, prompts, say)
        findings = diagnose(pair, written, foreign, say)
        if templated:
            findings.append(compare_prompts(pair, write(pair, plain), written))
        else:
            findings.append(
                Finding("chat template", "not measured", "the tokenizer has none, or the data has its own form")
            )
        if pair.target.weight_types and models.quantize:
            dense = replace(models, quantize=None).load()
            findings.append(compare_types(pair, written, dense, write(dense, prompts)))
        else:
            why = "the target is stored quantised" if pair.target.weight_types else "the target is not quantised"
            findings.append(Finding("the target's quantisation", "not measured", why))
    return findings


def _prompts(pair: Pair, data: Sequence[Path] | None) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Prompts as plain text, the same ones through the chat template if there is one, and text that others wrote."""
    if pair.tokenizer is None:
        return [], [], []
    own = prompts_of(pair, options.spread(options.sources_of(data), "*", PROMPTS), PROMPT_TOKENS)
    if data or pair.tokenizer.chat_template is None:
        return own, [], own
    plain = [Prompt(question, question) for question in QUESTIONS]
    templated = [
        Prompt(question, chat_ids(Conversation.of_user(question, None), pair.tokenizer)) for question in QUESTIONS
    ]
    return plain, templated, own


def _print(checks: Sequence[Check], findings: Sequence[Finding]) -> None:
    out = console()
    for check in checks:
        out.print(f"{MARKS[check.status]} {check.name}: {check.found}", soft_wrap=True)
        if check.advice:
            out.print(f"    {check.advice}", soft_wrap=True)
    if findings:
        out.print("\nwhy drafts are accepted or not", style="bold", soft_wrap=True)
    for finding in findings:
        out.print(
            f"{'!' if finding.verdict == 'cause' else ' '} {finding.name}: {finding.verdict}: {finding.measured}",
            soft_wrap=True,
        )
        if finding.advice:
            out.print(f"    {finding.advice}", soft_wrap=True)
