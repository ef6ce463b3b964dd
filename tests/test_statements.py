"""Statements of the documents that a machine can check: options, fields, defaults, figures."""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of

from dash_onnx.cli import bench, eval, export, fuse, info, profile, report, serve, train
from dash_onnx.cli import run as run_tool
from dash_onnx.core.budget import PRESETS
from dash_onnx.core.documents import ANSWERED, ASKED
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.facts import ModelFacts
from dash_onnx.exporters.calibration.tokens import LENGTH, SEQUENCES
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.fused.clients import CLIENTS
from dash_onnx.exporters.graphs.ends import EXACT_TOKENS
from dash_onnx.exporters.sources.gguf_config import MODEL_TYPES
from dash_onnx.exporters.sources.gguf_tokenizer import PRE_TOKENIZERS
from dash_onnx.exporters.train.options import PLANS, TrainOptions
from dash_onnx.exporters.train.tables import ROWS
from dash_onnx.runtime.drafts import MAX_DRAFT_ROWS, MAX_DRAFT_TOKENS
from dash_onnx.runtime.kv import CAPACITY
from dash_onnx.runtime.profile_passes import CONTEXTS, HEAD_ROWS
from dash_onnx.runtime.sequence import PREFILL_CHUNK
from dash_onnx.runtime.states import POINTS
from dash_onnx.serve.limits import Limits
from dash_onnx.serve.schema import MOST_PROMPTS, REFUSED, ChatRequest, CompletionRequest

ROOT = Path(__file__).parent.parent
TOOLS = {
    f"dash-{module.__name__.rpartition('.')[2]}": module
    for module in (bench, eval, export, fuse, info, profile, report, run_tool, serve, train)
}
FIGURE = re.compile(r"(?<![\w.-])\d+\.\d+(?!\w|\.\d)|\d+(?= tokens/s)|\d+(?= GB/s)")
NO_FIGURES = re.compile(
    r"^```.*?^```|^\| [\d.]+ B\b[^\n]*|\]\([^)]*\)|`[^`]*`|"  # and rows of estimates
    r"(?:arXiv|Python|Apache|Qwen|onnxruntime|ONNX Runtime) [\d.]+",
    re.M | re.S,
)
MEASURED = ["README.md", "docs/concepts/method.md"] + [
    f"docs/guide/{page}.md" for page in ("choose", "fused", "serve", "speculate")
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, argparse.ArgumentParser]:
    """Each tool's parser, caught when it is asked to parse."""

    class Caught(Exception):
        pass

    found: dict[str, argparse.ArgumentParser] = {}

    def catch(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found[parser.prog] = parser
        raise Caught

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", catch)
    for module in TOOLS.values():
        with pytest.raises(Caught):
            module.main([])
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_the_reference_says_which_tools_have_a_log_level(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    (sentence,) = re.findall(r"^([^.]*) have `--log-level`", text_of("docs/reference/cli.md"), re.M)
    named = set(re.findall(r"`(dash-\w+)`", sentence))
    assert named == {tool for tool, one in parsers.items() if "--log-level" in options_of(one)}


def test_the_tools_have_few_options_and_each_thing_has_one_name(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    inherent = {"-h", "--help", "--version"}
    options = [
        action
        for parser in parsers.values()
        for action in parser._actions
        if action.option_strings
        and not {*action.option_strings} <= inherent
        and action.help != argparse.SUPPRESS  # of benchmarks
    ]
    assert len(options) <= 110
    former = {"--max-new-tokens", "--new-tokens", "--tokens", "--rows", "--running", "--run"}
    for tool, parser in parsers.items():
        assert not former & options_of(parser), tool
        inputs = [action for action in parser._actions if action.dest in ("bundle", "bundles")]
        assert all(action.metavar == "BUNDLE" for action in inputs), tool


def test_the_help_of_dash_run_fits_on_a_screen(
    monkeypatch: pytest.MonkeyPatch, parsers: dict[str, argparse.ArgumentParser]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = parsers["dash-run"].format_help()
    assert len(shown.splitlines()) <= 45
    assert all(f"\n{group}:\n" in shown for group in ("basic", "sampling", "advanced"))


def test_the_reference_says_which_tools_have_json(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    assert "Every command except `dash-serve` has `--json`" in text_of("docs/reference/cli.md")
    without = {tool for tool, one in parsers.items() if "--json" not in options_of(one)}
    assert without == {"dash-serve"}


def test_the_defaults_in_the_guide_to_serving_are_those_of_the_options(
    parsers: dict[str, argparse.ArgumentParser],
) -> None:
    rows = re.findall(
        r"^\| `--([\w-]+)` \| .* \| ([\d,]+) \|$", text_of("docs/guide/serve.md"), re.M
    )
    assert len(rows) == 5
    for name, default in rows:
        found = parsers["dash-serve"].get_default(name.replace("-", "_"))
        assert found == int(default.replace(",", "")), name


def test_the_guide_to_serving_lists_every_refused_field() -> None:
    table = text_of("docs/guide/serve.md").partition("| refused field |")[2].partition("\n\n")[0]
    listed = [name for row in table.splitlines()[2:] for name in names_of(row.split("|")[1])]
    assert sorted(listed) == sorted(REFUSED)


def test_the_guide_to_serving_lists_every_field_of_a_request() -> None:
    rows = re.findall(
        r"^\| (?:`/v1/chat/completions`.*?|additional request fields) \| (.*) \|$",
        text_of("docs/guide/serve.md"),
        re.M,
    )
    listed = {name for row in rows for name in names_of(row)} - {"regex", "lark"}
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert listed == fields - {*REFUSED, "model", "messages", "prompt", "stream"}


def names_of(cell: str) -> list[str]:
    return re.findall(r"`([\w-]+)`", cell)


def test_the_guide_to_serving_states_the_limits_that_are_no_options() -> None:
    rows = re.findall(r"^\| \| (.*) \| ([\d,]+)(?: MB)? \|$", text_of("docs/guide/serve.md"), re.M)
    said = {what.split()[0]: int(limit) for what, limit in rows}
    (most,) = (m.le for m in ChatRequest.model_fields["n"].metadata if hasattr(m, "le"))
    stated = {"size": Limits().body_bytes >> 20, "strings": 16, "choices": most}
    assert said == {**stated, "texts": MOST_PROMPTS}
    for count, refused in ((16, False), (17, True)):
        request = CompletionRequest(prompt="a", stop=["b" * 1000] * count)
        with pytest.raises(PolicyError, match="16 strings of 1,000") if refused else nullcontext():
            request.options(9)


def test_the_guide_to_clusters_lists_the_arguments_of_ray() -> None:
    (sentence,) = re.findall(r"Arguments are\s([^;]*);", text_of("docs/guide/cluster.md"))
    module = ast.parse(text_of("dash_onnx/serve/ray.py"))  # Ray need not be installed
    (found,) = (node for node in module.body if getattr(node, "name", "") == "Arguments")
    fields = [ast.unparse(line.target) for line in found.body if isinstance(line, ast.AnnAssign)]
    assert sorted(names_of(sentence)) == sorted(fields)


def test_the_guide_to_fused_graphs_says_how_its_clients_differ() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (.*) \| (.*) \|$",
        text_of("docs/guide/fused.md").partition("| `--for` |")[2].partition("\n\n")[0],
        re.M,
    )
    assert {name for name, *_ in rows} == {*CLIENTS}
    for name, budget, cache in rows:
        client = CLIENTS[name]
        assert (budget == "an input that must be fed") == client.feeds_budget, name
        assert ("adapter" in budget) == client.genai_files, name
        assert cache == ("one buffer for past and present" if client.genai_files else "grows"), name


def test_the_guide_to_training_counts_the_tokens_of_each_effort() -> None:
    text = " ".join(text_of("docs/guide/train.md").split())
    rows = re.findall(r"\| `(\w+)`[^|]*\| ([\d,]+) \|", text)
    assert {effort for effort, _ in rows} == {*PLANS}
    few = re.findall(r"`quick` uses ([\d,]+) tokens", text)
    plans = [
        *((PLANS[effort], said) for effort, said in rows),
        (TrainOptions().plan_for(facts_of(3)), few[0]),
    ]
    for plan, said in plans:
        tokens = (plan.sequences + plan.held_out) * plan.length
        assert int(said.replace(",", "")) == tokens // 1000 * 1000 + (tokens % 1000 > 900) * 1000
    assert f"at least {PLANS['quick'].min_tokens:,} tokens" in text


def test_the_pages_state_the_sizes_that_the_code_has() -> None:
    drafts, texts, trouble = (
        " ".join(text_of(f"docs/{page}.md").split())
        for page in ("guide/speculate", "reference/texts", "guide/troubleshooting")
    )
    runtime, quantization, budget = (
        " ".join(text_of(f"docs/concepts/{page}.md").split())
        for page in ("runtime", "quantization", "budget")
    )
    assert f"logits for {MAX_DRAFT_TOKENS + 1} tokens" in drafts
    assert f"{MAX_DRAFT_TOKENS + 2} to {MAX_DRAFT_ROWS} tokens in a pass" in drafts
    assert f"up to {MAX_DRAFT_TOKENS} draft tokens" in runtime
    assert f"room for {CAPACITY} tokens and grows in steps of {CAPACITY}" in runtime
    assert f"in chunks of {PREFILL_CHUNK} tokens" in runtime
    assert POINTS == 4 and "up to four *points*" in runtime
    assert (
        "{}, {:,} and {:,} tokens, LM heads with {}, {} and {} rows".format(*CONTEXTS, *HEAD_ROWS)
        in runtime
    )
    assert f"recomputes the {EXACT_TOKENS['int4']} largest" in quantization
    assert f"Its second stage recomputes {EXACT_TOKENS['int2']} tokens" in quantization
    assert f"writes {SEQUENCES} sequences of {LENGTH} tokens itself" in quantization
    assert f"or {SEQUENCES // 2} with more than 500 million" in quantization
    assert f"sequences of {LENGTH} tokens" in texts
    assert f"needs {2 * LENGTH}." in trouble
    assert ROWS == 12 and "at about twelve multipliers" in budget


def test_the_reference_of_texts_lists_the_keys_of_a_prompt_and_a_response() -> None:
    (cell,) = re.findall(r"^\| (`prompt`.*) \| a prompt", text_of("docs/reference/texts.md"), re.M)
    assert names_of(cell) == [*ASKED, *ANSWERED]


def test_the_reference_of_models_lists_what_is_read_of_gguf_files() -> None:
    section = text_of("docs/reference/models.md").partition("\n## GGUF")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.M)
    assert sorted(name for cell in cells for name in names_of(cell)) == sorted({*MODEL_TYPES})
    (listed,) = re.findall(r"with a known pre-tokenizer:\s+(.*?)\.\s+Files\s", section, re.S)
    assert {*re.split(r",\s+", listed)} == {*PRE_TOKENIZERS} - {"default"}


def test_every_example_says_what_was_compiled() -> None:
    for folder in (ROOT / "examples").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            said = (folder / "README.md").read_text("utf-8")
            assert re.search(r"^\*\*(Compiled|Tested|Not compiled)\b", said, re.M), folder.name


def test_the_guide_to_running_says_what_the_presets_lose() -> None:
    text = " ".join(text_of("docs/guide/run.md").split())
    quality, balanced, fast = (PRESETS[name] for name in ("quality", "balanced", "fast"))
    assert f"at most {quality}, {balanced} and {fast} nats" in text
    for name, loss in PRESETS.items():
        assert re.search(rf"^\| `{name}` \| {loss} nats", text_of("docs/concepts/budget.md"), re.M)


@pytest.mark.parametrize("page", ["concepts/budget", "decisions/0099-presets-with-a-margin"])
def test_the_pages_say_what_presets_lose_on_texts_of_people(page: str) -> None:
    said = " ".join(text_of(f"docs/{page}.md").split())
    part = json.loads(text_of("benchmarks/results/quality.json"))
    for name, text in (("WikiText-2", "valid.txt"), ("fiction", "sherlock_1661.txt")):
        (rows,) = (c["found"]["rows"] for c in part["commands"] if c["found"]["text"] == text)
        kl = {row["name"]: f"{row['kl']:.3f}" for row in rows if row["policy"] == "dash"}
        quality, balanced, fast = (kl[preset] for preset in PRESETS)
        assert re.search(rf"{quality}, {balanced} and {fast}(?: nats)? on {name}", said)


def test_the_concepts_state_the_block_size_and_the_rank() -> None:
    small, large = (facts_of(layers) for layers in (2, 3))
    assert (small.large, large.large) == (False, True)
    one, other = (ExportOptions().resolved("folder", spec_of(facts)) for facts in (small, large))
    method, quantization = (
        " ".join(text_of(f"docs/concepts/{page}.md").split()) for page in ("method", "quantization")
    )
    where = "in a model with more than 200 million weights in its layers"
    rank = f"Its rank is {one.compensation_rank} by default, and {other.compensation_rank} {where}"
    assert rank in method
    assert f"in blocks of {one.block_size}, or of {other.block_size} {where}" in quantization


def facts_of(layers: int) -> ModelFacts:
    """A model with 86 million weights per layer."""
    return ModelFacts("big", "llama", layers, 2048, 12288, 32, 8, 64, 32768, 2048)


def test_every_page_counts_the_families_of_the_table() -> None:
    table = text_of("docs/reference/models.md").partition("The figures compare")[0]
    count = len(set(re.findall(r"^\| `(\w+)` \|", table, re.M)))
    for page in ("README.md", "CHANGELOG.md", "docs/concepts/method.md"):
        said = re.search(r"(\w+)\s+families", text_of(page))
        assert said and said[1] == str(count), page


def test_the_page_of_the_runtime_says_how_long_its_files_are() -> None:
    way = (
        text_of("docs/concepts/runtime.md")
        .partition("## How a token runs")[2]
        .partition("\n## ")[0]
    )
    said = dict(re.findall(r"`(\w+\.py)`\s+\((\d+)\s+lines\)", way))
    assert {*said} == {*re.findall(r"`(\w+\.py)`", way)} and "passes.py" in said
    for name, lines in said.items():
        assert len(text_of(f"runtime/{name}").splitlines()) == pytest.approx(int(lines), rel=0.2)


def test_no_page_names_a_value_that_the_option_for_drafts_refuses() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "dash_onnx").rglob("*.jinja")]
    for page in pages:
        if "decisions" not in page.parts:
            values = re.findall(r"\bspeculate=(\w+|\W)", page.read_text("utf-8"))
            assert {*values} <= {"True", "False", "None"}, page


def figures(text: str) -> Iterator[str]:
    yield from FIGURE.findall(NO_FIGURES.sub(" ", text))


@pytest.mark.parametrize("page", MEASURED)
def test_every_figure_of_a_page_has_its_row_in_the_results(page: str) -> None:
    results = "".join(text_of(str(page)) for page in (ROOT / "docs").glob("results*.md"))
    rows = [line for line in results.splitlines() if line.startswith("|") or "GB/s" in line]
    found = [float(number) for row in rows for number in re.findall(r"\d+(?:\.\d+)?", row)]
    told = list(figures(text_of(page)))
    assert len(told) > (15 if page == "README.md" else 2)
    for figure in told:
        digits = len(figure.partition(".")[2])
        assert any(f"{number:.{digits}f}" == figure for number in found), figure


def test_a_figure_without_a_row_is_found() -> None:
    text = (
        "1.49 times at 0.069 nats, 257 tokens/s with Python 3.11, Qwen2.5 0.5B, `--x 1.2`, 35 GB/s"
    )
    assert list(figures(text)) == ["1.49", "0.069", "257", "35"]


def test_the_guide_to_the_server_lists_every_code_of_an_error() -> None:
    rows = re.findall(r"^\| [45][^|]*\| ([^|]+) \|", text_of("docs/guide/serve.md"), re.M)
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    code = "".join(file.read_text("utf-8") for file in (ROOT / "dash_onnx/serve").glob("*.py"))
    raised = re.findall(r"(?:APIError|cls)\(\s*\d{3},[^\n]*?(?:\n[^\n]*?)??\"(\w+)\"[,)\n]", code)
    raised += re.findall(r'\d{3}: "(\w+)"', code.partition("_CODES")[2].partition("}")[0])
    assert {"busy", "not_found", "timeout"} <= {*raised}
    assert listed == {*raised} - {"closed"}  # which no client sees


def test_every_error_of_the_troubleshooting_page_is_in_the_code() -> None:
    folders = (ROOT / folder for folder in ("dash_onnx", "runtime", "exporters"))
    code = "\n".join(file.read_text("utf-8") for folder in folders for file in folder.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that Python joins
    page = text_of("docs/guide/troubleshooting.md")
    messages = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\*\*`.*", page, re.M)))
    ours = set(messages) - {"No matching distribution found for dash-onnx"}  # pip's
    assert len(ours) > 20
    filled_in = r"…|\d+|dash\.json|ONNX Runtime is|calibration|torch| and the|gptq"
    for message in ours:
        parts = [part.strip("; ,'") for part in re.split(filled_in, message)]
        assert all(part in code for part in parts if len(part) > 3), message
