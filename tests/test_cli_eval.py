from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tool import Capture, Tool
from conftest import logits_of
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import dash_onnx
from dash_onnx.cli.eval import main
from dash_onnx.core.errors import PolicyError
from dash_onnx.eval.text import evaluate_policies
from dash_onnx.runtime.model import Model

SENTENCES = (
    "the keeper of the lighthouse counts the ships that pass in the night\n"
    "42 ships, and none of them slows down: the light is all they want\n"
)
WINDOW, PROMPT = 32, 8
SIZES = ("--window", WINDOW)  # a quarter is the prompt
TOOL = Tool("dash-eval", main)
run, refused, json_of = TOOL.run, TOOL.refused, TOOL.json_of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "night.txt"
    path.write_text(SENTENCES * 3)
    return path


@pytest.fixture(scope="module")
def low_bundle(
    tiny_folder: Path,
    export_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle without `full`."""
    calibration = tmp_path_factory.mktemp("text") / "calibration.txt"
    calibration.write_text(SENTENCES * 12)
    return export_tiny(tiny_folder, calibration=(calibration,), variants=("int8",))


def windows(model: Model, text: Path, size: int = WINDOW) -> list[np.ndarray]:
    ids = model.text.encode(text.read_text())
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def test_json_has_the_figures_of_the_policy(tiny_bundle: Path, text: Path, capsys: Capture) -> None:
    facts = json_of(capsys, tiny_bundle, "--text", text, *SIZES, "--policy", "int4")
    assert {"perplexity", "kl", "top1", "ms_per_token", "tokens", "actions"} <= set(facts)
    assert facts["perplexity"] > 1 and facts["reference_perplexity"] > 1
    assert facts["perplexity"] != facts["reference_perplexity"]
    assert facts["kl"] > 1e-4
    assert 0 < facts["top1"] < 1
    assert facts["ms_per_token"] > 0
    assert facts["actions"] == {"int4": 1.0}


def test_records_are_read_as_their_texts(
    tiny_bundle: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    records = tmp_path / "night.jsonl"
    lines = text.read_text().rstrip("\n").split("\n")
    records.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    same = ("kl", "perplexity", "tokens", "top1")
    plain, read = (
        json_of(capsys, tiny_bundle, "--text", file, *SIZES, "--policy", "int4", "--limit", 2)
        for file in (text, records)
    )
    assert [read[key] for key in same] == [plain[key] for key in same]
    records.write_text('{"nothing": 1}\n')
    assert "night.jsonl:1 needs" in refused(capsys, tiny_bundle, "--text", records)


@pytest.mark.parametrize("policy", [(), ("--policy", "full"), ("--policy", "static:full*4")])
def test_the_highest_precision_does_not_differ_from_the_reference(
    policy: tuple[str, ...], tiny_bundle: Path, text: Path, capsys: Capture
) -> None:
    facts = json_of(capsys, tiny_bundle, "--text", text, *SIZES, *policy)
    assert abs(facts["kl"]) <= 1e-6
    assert facts["top1"] == 1
    assert facts["perplexity"] == pytest.approx(facts["reference_perplexity"], rel=1e-5)
    assert facts["actions"] == {"full": 1.0}


def test_the_reference_is_the_highest_precision_of_the_bundle(
    low_bundle: Path, text: Path, capsys: Capture
) -> None:
    facts = json_of(capsys, low_bundle, "--text", text, *SIZES)
    assert abs(facts["kl"]) <= 1e-6
    assert facts["top1"] == 1
    assert facts["actions"] == {"int8": 1.0}


def test_perplexity_is_that_of_transformers(
    tiny_folder: Path, tiny_bundle: Path, tiny_model: Model, text: Path, capsys: Capture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    losses = []
    for ids in windows(tiny_model, text):
        tokens = torch.from_numpy(ids)
        with torch.inference_mode():
            logits = model(tokens[None]).logits[0]
        # The prompt's own tokens are not predicted, nor is the first one after it: its logits
        # come from the prefill and not from the policy.
        rows = slice(PROMPT, -1)
        losses.append(torch.nn.functional.cross_entropy(logits[rows], tokens[PROMPT + 1 :]))
    wanted = math.exp(torch.stack(losses).mean())
    capsys.readouterr()  # transformers' progress bar
    facts = json_of(capsys, tiny_bundle, "--text", text, *SIZES)
    assert facts["perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_kl_and_top1_compare_with_the_full_model_in_its_own_context(
    tiny_bundle: Path, tiny_model: Model, text: Path, capsys: Capture
) -> None:
    divergences, agreements = [], []
    for ids in windows(tiny_model, text):
        wanted = torch.from_numpy(tiny_model.logits(ids, policy="full")[PROMPT:-1]).double()
        policy = "static:full,int4,skip,full"
        scored = tiny_model.score(ids[:-1], prompt_tokens=PROMPT, policy=policy)
        found = torch.from_numpy(logits_of(scored)).double()
        divergences.append(
            torch.nn.functional.kl_div(
                found.log_softmax(1), wanted.log_softmax(1), reduction="none", log_target=True
            ).sum(1)
        )
        agreements.append(found.argmax(1) == wanted.argmax(1))
    policy = ("--policy", "static:full,int4,skip,full")
    facts = json_of(capsys, tiny_bundle, "--text", text, *SIZES, *policy)
    assert facts["kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert facts["top1"] == pytest.approx(float(torch.cat(agreements).double().mean()))
    assert facts["actions"] == {"full": 0.5, "int4": 0.25, "skip": 0.25}


@pytest.mark.parametrize(("window", "prompt"), [(32, 8), (20, 1), (17, 15), (3, 1)])
def test_every_token_after_the_first_decoded_one_is_predicted(
    window: int, prompt: int, tiny_model: Model, text: Path
) -> None:
    sizes = {"window": window, "prompt_tokens": prompt, "max_windows": 6}
    (found,) = evaluate_policies(tiny_model, text.read_text(), [tiny_model.policy("int8")], **sizes)
    count = min(6, len(windows(tiny_model, text, window)))
    assert found.tokens == count * (window - prompt - 1) > 0


def test_every_window_begins_as_texts_do(
    tiny_bundle: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With BOS, where the tokenizer puts one before a text."""
    seen = list[list[int]]()
    with dash_onnx.load(tiny_bundle) as model:
        special = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        model.text.tokenizer.post_processor = special
        ids = model.text.encode(text.read_text())
        assert ids[0] == 0

        def watched(ids: Any, **_: Any) -> Any:
            seen.append([*ids])
            return np.zeros((len(ids), 384))

        monkeypatch.setattr(model, "logits", watched)
        sizes = {"window": 32, "prompt_tokens": 8, "max_windows": 3, "timed": False}
        evaluate_policies(model, text.read_text(), [model.policy("int8")], **sizes)
    parts = [ids[at : at + 31].tolist() for at in range(1, 94, 31)]
    assert [window for window in seen if len(window) == 32] == [[0, *part] for part in parts]


def test_a_limit_takes_the_first_windows(
    tiny_bundle: Path, tiny_model: Model, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert len(windows(tiny_model, text)) > 2
    facts = json_of(capsys, tiny_bundle, "--text", text, *SIZES, "--limit", 2)
    assert facts["tokens"] == 2 * (WINDOW - PROMPT - 1)
    assert run(tiny_bundle, "--text", text, *SIZES, "--limit", 10_000, "--json") == 0
    shown = capsys.readouterr()
    assert "10000" not in shown.err and "windows: starts" in shown.err
    more = json.loads(shown.out)
    assert more["tokens"] == len(windows(tiny_model, text)) * (WINDOW - PROMPT - 1)


def test_a_random_policy_repeats_itself(tiny_bundle: Path, text: Path, capsys: Capture) -> None:
    drawn = (tiny_bundle, "--text", text, *SIZES, "--limit", 2, "--policy")
    first, again, other = (json_of(capsys, *drawn, f"random:{seed}") for seed in (1, 1, 2))
    for facts in (first, again, other):
        del facts["ms_per_token"]
        assert sum(facts["actions"].values()) == pytest.approx(1)
        assert set(facts["actions"]) == {"full", "int8", "int4", "skip"}
    assert first == again
    assert first != other


def test_the_table_shows_what_json_has(tiny_bundle: Path, text: Path, capsys: Capture) -> None:
    arguments = (tiny_bundle, "--text", text, *SIZES, "--policy", "int8")
    facts = json_of(capsys, *arguments)
    assert run(*arguments) == 0
    captured = capsys.readouterr()
    assert all(line.startswith("dash-eval: ") for line in captured.err.splitlines())
    shown = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert f"{facts['perplexity']:.3f}" in shown["perplexity"]
    assert f"{facts['kl']:.5f}" in shown["KL"]
    assert f"{facts['top1']:.2%}" in shown["top-1"]
    assert "int8 100.0%" in shown["actions"]


# Refusals


def test_a_text_shorter_than_one_window_is_refused(
    tiny_bundle: Path, tiny_model: Model, text: Path, capsys: Capture
) -> None:
    count = len(tiny_model.text.encode(text.read_text()))
    message = refused(capsys, tiny_bundle, "--text", text, "--window", count + 1)
    assert str(count) in message and str(count + 1) in message


@pytest.mark.parametrize("content", [b"", b" \n\t", b"\x00\xff\xfe\x80" * 500, None])
def test_an_unusable_text_is_refused_by_its_name(
    content: bytes | None, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(capsys, tiny_bundle, "--text", path, *SIZES)


def test_a_window_larger_than_the_context_is_refused(
    tiny_bundle: Path, text: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_bundle, "--text", text, "--window", 257)
    assert "257" in message and "256" in message


@pytest.mark.parametrize("prompt", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_a_prompt_part_that_leaves_nothing_to_decode_is_refused(
    prompt: int, tiny_model: Model, text: Path
) -> None:
    policies, sizes = [tiny_model.policy("int8")], {"window": WINDOW, "prompt_tokens": prompt}
    with pytest.raises(PolicyError, match=str(prompt)):
        evaluate_policies(tiny_model, text.read_text(), policies, **sizes)


def test_a_policy_that_the_bundle_lacks_is_refused(
    low_bundle: Path, text: Path, capsys: Capture
) -> None:
    message = refused(capsys, low_bundle, "--text", text, *SIZES, "--policy", "int4")
    assert "int4" in message and "int8" in message


def test_a_missing_bundle_is_refused(text: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "dash-export" in refused(capsys, tmp_path / "nowhere", "--text", text)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("out",),
        ("out", "--text"),
        ("out", "--text", "t", "--window", "0"),
        ("out", "--text", "t", "--limit", "none"),
        ("out", "--text", "t", "--threads", "-1"),
        ("out", "more", "--text", "t"),
    ],
    ids=" ".join,
)
def test_misuse_of_the_arguments_is_one_line_that_leads_to_the_help(
    arguments: tuple[str, ...], capsys: Capture
) -> None:
    assert "dash-eval --help" in refused(capsys, *arguments)


def test_help_has_examples(capsys: Capture) -> None:
    assert run("--help") == 0
    examples = capsys.readouterr().out.partition("examples:")[2]
    assert examples.count("dash-eval ") >= 2


@pytest.mark.parametrize(
    ("what", "option"),
    [
        ("task", ("--window", 32)),
        ("text", ("--speculate", 0)),
    ],
)
def test_an_option_of_the_other_kind_of_input_is_refused(
    what: str, option: tuple[object, ...], tiny_bundle: Path, text: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_bundle, f"--{what}", text, *option)
    assert f"{option[0]} goes with --{'text' if what == 'task' else 'task'}" in message


def test_policies_that_are_not_timed_give_the_same_figures(tiny_model: Model, text: Path) -> None:
    layers = tiny_model.manifest.model.num_layers
    skips = f"static:int8,{','.join(['skip'] * (layers - 2))},int4"
    policies = [tiny_model.policy(name) for name in ("int4", skips, "random:1")]
    sizes = {"window": WINDOW, "prompt_tokens": PROMPT, "max_windows": 2}
    timed, untimed = (
        evaluate_policies(tiny_model, text.read_text(), policies, timed=timed, **sizes)
        for timed in (True, False)
    )
    assert [found.ms_per_token is None for found in untimed] == [True, True, False]
    for one, other in zip(timed, untimed, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=1e-4)
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-4)
        assert (other.actions, other.cost_ms) == (one.actions, one.cost_ms)
