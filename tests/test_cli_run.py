from __future__ import annotations

import errno
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tool import Capture, Tool
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.cli import chat
from dash_onnx.cli.run import main
from dash_onnx.core.bundle import file_facts
from dash_onnx.core.errors import BundleError, DeviceError
from dash_onnx.runtime import sessions
from dash_onnx.runtime.cache import Cache
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.sequence import SequenceState
from dash_onnx.runtime.stream import Stream

PROMPT = "the keeper of the lighthouse"
QUICK = ("--max-tokens", "6", "--ignore-eos")
RAW = ("--raw", *QUICK)
LAYERS = 4
RUN = "import sys; from dash_onnx.cli.run import main; sys.exit(main())"
TOOL = Tool("dash-run", main)
run, refused, json_of = TOOL.run, TOOL.refused, TOOL.json_of


@pytest.fixture(scope="module")
def int4_bundle(
    tiny_folder: Path,
    export_tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    text = tmp_path_factory.mktemp("text") / "night.txt"
    text.write_text("the keeper of the lighthouse counts the ships in the night\n" * 64)
    return export_tiny(tiny_folder, calibration=(text,), variants=("int4",))


@pytest.fixture
def damaged(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def scored_bundle(damaged: Path) -> Path:
    """Likewise, with a scorer."""
    return with_scorer(damaged)


def give_stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def process(*arguments: object, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, timeout=60)


# Many prompts


def test_a_batch_answers_every_line_of_a_file(
    tiny_bundle: Path, tiny_model: Model, tmp_path: Path, capsys: Capture
) -> None:
    file, ask = tmp_path / "prompts.jsonl", [{"role": "user", "content": "hello"}]
    lines = ["hello", {"prompt": "ships?", "id": "b"}, {"messages": ask, "id": 7}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tiny_bundle, "--batch", file, "--parallel", 2, *QUICK) == 0
    out, err = capsys.readouterr()
    found = {answer["id"]: answer for answer in map(json.loads, out.splitlines())}
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    for name, text in ((0, "hello"), ("b", "ships?"), (7, "hello")):
        assert found[name]["text"] == tiny_model.chat(text, **options)
        assert found[name]["generated_tokens"] == 6
        assert 0 <= found[name]["accepted_tokens"] <= found[name]["draft_tokens"]
    assert "3 answers, 18 tokens" in err
    assert run(tiny_bundle, "--batch", file, "--raw", *QUICK) == 2  # a line is a chat
    assert "messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("{", "prompts.jsonl:1 is not JSON"),
        ('"a"\n{"text": "b"}\n', "prompts.jsonl:2 needs `prompt`"),
        ('{"messages": []}\n', "prompt 0: there is no message"),
        ('"a"\n"' + "a b " * 300 + '"\n', "prompt 1: this model's maximum context length"),
    ],
)
def test_a_batch_that_cannot_be_answered_is_refused_whole(
    text: str, told: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert told in refused(capsys, tiny_bundle, "--batch", file)


def test_an_answer_has_the_form_of_a_schema(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["night", "noon"]}')
    facts = json_of(capsys, tiny_bundle, "when?", "--json-schema", schema)
    assert json.loads(facts["text"]) in ("night", "noon")
    schema.write_text('{"const": "night"}')  # all of it is forced: no pass of a token is timed
    facts = json_of(capsys, tiny_bundle, "when?", "--json-schema", schema, "--max-tokens", 2)
    assert facts["tokens_per_s"] is None and facts["generated_tokens"] == 2
    for content in ("{", '{"type": "foo"}'):
        schema.write_text(content)
        refused(capsys, tiny_bundle, "when?", "--json-schema", schema)


# One prompt


def test_text_goes_to_stdout_and_a_one_line_summary_to_stderr(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    assert run(tiny_bundle, PROMPT, *RAW) == 0
    captured = capsys.readouterr()
    assert captured.out == tiny_model.generate(PROMPT, max_new_tokens=6, ignore_eos=True) + "\n"
    assert captured.err.count("\n") == 1
    for part in (
        "loaded in",
        "6 tokens",
        "tokens/s",
        "first token after",
        "full 100%, full head",
        "length",
    ):
        assert part in captured.err


def test_json_is_one_object_with_text_and_figures(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    facts = json_of(capsys, tiny_bundle, PROMPT, *RAW)
    assert set(facts) == {
        "text",
        "reasoning",
        "load_ms",
        "finish_reason",
        "prompt_tokens",
        "generated_tokens",
        "ttft_ms",
        "ms_per_token",
        "tokens_per_s",
        "policy",
        "budget",
        "sampling",
        "draft_tokens",
        "accepted_tokens",
        "actions",
        "head",
    }
    assert facts["text"] == tiny_model.generate(PROMPT, max_new_tokens=6, ignore_eos=True)
    assert facts["finish_reason"] == "length"
    assert facts["prompt_tokens"] == len(tiny_model.text.encode(PROMPT))
    assert facts["generated_tokens"] == 6
    assert facts["load_ms"] > 0
    assert facts["ttft_ms"] > 0
    assert facts["ms_per_token"] > 0
    assert facts["tokens_per_s"] > 0
    assert facts["policy"] == "balanced"
    assert facts["actions"] == {tiny_model.policy().uniform[0]: 1.0}


def test_expected_text_comes_sooner_and_is_the_same(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = (tiny_bundle, PROMPT, "--policy", "full", "--max-tokens", "60", "--ignore-eos")
    alone = json_of(capsys, *given, "--speculate", 0)
    assert alone["draft_tokens"] == 0
    file = tmp_path / "expected.txt"
    file.write_text(alone["text"])
    found = json_of(capsys, *given, "--expected", file)
    assert found["text"] == alone["text"]
    assert 0 < found["accepted_tokens"] <= found["draft_tokens"]
    file.write_text("")  # nothing is expected
    assert json_of(capsys, *given, "--expected", file)["text"] == alone["text"]
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in refused(capsys, *given, "--expected", missing)


def test_expected_text_and_decisions_for_each_token_do_not_go_together(
    scored_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "expected.txt"
    file.write_text("ships")
    given = (scored_bundle, PROMPT, "--policy", "dash", "--expected", file)
    assert "--expected needs draft tokens" in refused(capsys, *given)


@pytest.mark.parametrize(("temperature", "told"), [((), True), (("--temperature", 1), False)])
def test_sampling_options_without_sampling_are_told(
    temperature: tuple[str, int], told: bool, tiny_bundle: Path, capsys: Capture
) -> None:
    assert run(tiny_bundle, PROMPT, *QUICK, "--top-p", 0.5, *temperature) == 0
    assert ("warning: --top-p changes nothing" in capsys.readouterr().err) == told


def test_a_trace_on_stdout_tells_each_token_as_it_comes(tiny_bundle: Path, capsys: Capture) -> None:
    whole = json_of(capsys, tiny_bundle, PROMPT, *QUICK)
    assert run(tiny_bundle, PROMPT, *QUICK, "--trace", "-") == 0
    *tokens, figures = map(json.loads, capsys.readouterr().out.splitlines())
    assert "".join(token["text"] for token in tokens) == whole["text"]
    assert all(len(token["path"]) == LAYERS and token["ms"] >= 0 for token in tokens)
    assert figures["generated_tokens"] == len(tokens) == 6


def test_a_single_token_has_no_decoding_figures(tiny_bundle: Path, capsys: Capture) -> None:
    facts = json_of(capsys, tiny_bundle, PROMPT, "--max-tokens", 1, "--ignore-eos")
    assert facts["generated_tokens"] == 1
    assert facts["ms_per_token"] is None
    assert facts["tokens_per_s"] is None
    assert facts["actions"] == {}
    assert run(tiny_bundle, PROMPT, "--max-tokens", 1, "--ignore-eos") == 0
    assert "1 token" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["int4", "random:5", "static:int8,skip*2,full"])
def test_a_trace_has_a_line_for_each_token_with_its_path(
    policy: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "trace.jsonl"
    told = ("--policy", policy, "--prefill", "full", "--trace", path)
    facts = json_of(capsys, tiny_bundle, PROMPT, *QUICK, *told)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == facts["generated_tokens"] == 6
    for line in lines:
        assert set(line) - {"draft"} == {"token", "text", "ms", "path"}
        assert 0 <= line["token"] < 384
        assert line["ms"] >= 0
        assert len(line["path"]) == LAYERS
        assert set(line["path"]) <= {"full", "int8", "int4", "skip"}
    assert lines[0]["path"] == ["full"] * LAYERS  # the prefill
    decided = [action for line in lines[1:] for action in line["path"]]
    assert facts["actions"] == {
        action: round(decided.count(action) / len(decided), 4) for action in sorted(set(decided))
    }
    if policy.startswith("static"):
        assert all(line["path"] == ["int8", "skip", "skip", "full"] for line in lines[1:])


def test_the_same_seed_gives_the_same_text(tiny_bundle: Path, capsys: Capture) -> None:
    drawn = (tiny_bundle, PROMPT, *QUICK, "--temperature", 1.5, "--seed")
    texts = [json_of(capsys, *drawn, seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    whole = tiny_model.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    word = whole[8:10]
    facts = json_of(
        capsys,
        tiny_bundle,
        PROMPT,
        "--raw",
        "--max-tokens",
        20,
        "--ignore-eos",
        "--stop",
        word,
    )
    assert facts["finish_reason"] == "stop"
    assert facts["text"] == whole[: whole.index(word)]


def test_prefill_and_policy_may_differ(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "trace.jsonl"
    arguments = ("--policy", "int8", "--prefill", "int4", "--trace", path)
    json_of(capsys, tiny_bundle, PROMPT, *QUICK, *arguments)
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    assert first["path"] == ["int4"] * LAYERS
    assert second["path"] == ["int8"] * LAYERS


# Where the prompt comes from


def test_a_prompt_is_a_chat_message_unless_it_is_raw(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    answer = tiny_model.chat(messages, max_new_tokens=6, ignore_eos=True)
    facts = json_of(capsys, tiny_bundle, PROMPT, *QUICK)
    assert facts["text"] == answer
    assert facts["prompt_tokens"] == len(tiny_model.text.encode_chat(messages))
    raw = json_of(capsys, tiny_bundle, PROMPT, *RAW)
    assert raw["prompt_tokens"] == len(tiny_model.text.encode(PROMPT))


def test_a_model_without_chat_template_continues_the_prompt(
    damaged: Path, tiny_model: Model, capsys: Capture
) -> None:
    manifest = json.loads((damaged / "dash.json").read_text("utf-8"))
    del manifest["files"]["chat_template.jinja"]
    (damaged / "dash.json").write_text(json.dumps(manifest), "utf-8")
    facts = json_of(capsys, damaged, PROMPT, *QUICK)
    assert facts["prompt_tokens"] == len(tiny_model.text.encode(PROMPT))
    assert "no chat template" in refused(capsys, damaged, PROMPT, "--system", "be brief")
    assert "give a PROMPT" in refused(capsys, damaged)  # no chat in which every message fails


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_what_is_piped_in_follows_the_prompt(
    kind: str, tiny_bundle: Path, tiny_model: Model, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("42 ships\n")
    command = [sys.executable, "-c", RUN, str(tiny_bundle), PROMPT, *RAW, "--json"]
    with notes.open() as file:
        stdin = {"input": b"42 ships\n"} if kind == "pipe" else {"stdin": file}
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True, **stdin)
    facts = json.loads(done.stdout)
    assert facts["prompt_tokens"] == len(tiny_model.text.encode(f"{PROMPT}\n\n42 ships\n"))


def test_a_pipe_that_brings_nothing_is_told_of(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tiny_bundle), PROMPT, *QUICK]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as running:
        assert running.stdin is not None and running.stderr is not None
        assert b"waiting for text on stdin" in running.stderr.readline()
        running.stdin.close()
        assert running.wait(60) == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_empty_as_dev_null(closed: str, tiny_bundle: Path) -> None:
    shell = f'exec "$0" -c \'{RUN}\' "$1" "$2" --max-tokens 2 {closed}'
    words = ["bash", "-c", shell, sys.executable, str(tiny_bundle), PROMPT]
    done = subprocess.run(words, stderr=subprocess.PIPE, timeout=60, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_chat_without_streams_is_refused_in_one_line(closed: str, tiny_bundle: Path) -> None:
    shell = f'exec "$0" -c \'{RUN}\' "$1" {closed}'
    words = ["bash", "-c", shell, sys.executable, str(tiny_bundle)]
    done = subprocess.run(words, stderr=subprocess.PIPE, timeout=60, text=True)
    assert "the chat needs an open stdin and stdout" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


_SCRIPT = "import os, signal, sys, time; sys.argv[0] = '/usr/bin/dash-run'; import dash_onnx.cli; "
_CTRL_C = "os.kill(os.getpid(), signal.SIGINT); "


@pytest.mark.parametrize(
    "code",
    [
        # while the tool imports
        f"{_SCRIPT}{_CTRL_C}time.sleep(9)",
        # while it runs, cleans up and ends
        f"{_SCRIPT}from dash_onnx.cli.common import run\n"
        "def body():\n"
        f"    try: {_CTRL_C}time.sleep(9)\n"
        f"    finally: {_CTRL_C}time.sleep(9)\n"
        f"code = run('dash-run', body); {_CTRL_C}sys.exit(code)",
    ],
    ids=["importing", "thrice"],
)
def test_ctrl_c_is_one_line_at_any_time(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "\ndash-run: interrupted\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_text_that_stdout_cannot_hold_is_written_escaped(encoding: str, tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tiny_bundle), "🚢 灯台", *QUICK, "--show-path"],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout.decode(encoding).strip()


def test_a_system_message_comes_first(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    facts = json_of(capsys, tiny_bundle, PROMPT, "--system", "be brief", *QUICK)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": PROMPT},
    ]
    assert facts["prompt_tokens"] == len(tiny_model.text.encode_chat(messages))


def test_a_dash_reads_the_prompt_from_stdin(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    given = json_of(capsys, tiny_bundle, PROMPT, *QUICK)
    give_stdin(monkeypatch, PROMPT)
    piped = json_of(capsys, tiny_bundle, "-", *QUICK)
    assert (piped["text"], piped["prompt_tokens"]) == (given["text"], given["prompt_tokens"])


def test_a_prompt_that_begins_with_a_dash_follows_two_dashes(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    assert run(tiny_bundle, *RAW, "--json", "--", "-x the keeper") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt_tokens"] == len(tiny_model.text.encode("-x the keeper"))


def test_a_prompt_may_be_of_any_script(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "trace.jsonl"
    json_of(capsys, tiny_bundle, "灯台守 🚢 naïve", *QUICK, "--trace", path)
    assert len(path.read_text("utf-8").splitlines()) == 6


@pytest.mark.parametrize("given", ["argument", "stdin"])
def test_an_empty_prompt_is_refused(
    given: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_stdin(monkeypatch, "")
    message = refused(capsys, tiny_bundle, "" if given == "argument" else "-")
    assert "empty" in message


def test_stdin_that_is_no_text_is_refused_in_one_line(tiny_bundle: Path) -> None:
    done = process(tiny_bundle, "-", given=b"\xff\xfe the keeper")
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert done.returncode == 2


def test_stdin_without_end_is_refused_in_one_line(tiny_bundle: Path) -> None:
    shell = f'yes | "$0" -c \'{RUN}\' "$1" x'
    words = ["bash", "-c", shell, sys.executable, str(tiny_bundle)]
    done = subprocess.run(words, capture_output=True, timeout=60, text=True)
    assert "stdin holds more than 4000000 characters" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_bundle_may_be_pinned(tiny_bundle: Path) -> None:
    known = file_facts(tiny_bundle / "dash.json").sha256
    dash_onnx.load(tiny_bundle, sha256=known)
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        dash_onnx.load(tiny_bundle, sha256="0" * 64)


def test_a_bundle_must_have_a_name(capsys: Capture) -> None:
    assert "no bundle given" in refused(capsys, "", PROMPT)


def test_more_threads_than_cores_are_told_in_one_line(tiny_bundle: Path) -> None:
    words = [sys.executable, "-c", RUN, str(tiny_bundle), PROMPT, *RAW, "--threads", "64"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    told = done.stderr.splitlines()
    assert told[0].startswith("dash-run: warning: threads=64 exceeds the ")
    assert (done.returncode, len(told)) == (0, 2)


def test_a_prompt_that_is_no_text_is_refused_in_one_line(
    tiny_bundle: Path, capsys: Capture
) -> None:
    refused(capsys, tiny_bundle, os.fsdecode(b"\xff\xfe the keeper"))


# Refusals


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_longer_than_the_context_is_refused(
    chat: bool, tiny_bundle: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_bundle, "ships " * 300, *([] if chat else ["--raw"]))
    assert "256" in message and "context" in message


def test_the_context_may_be_filled_to_the_last_token(
    tiny_bundle: Path, tiny_model: Model, capsys: Capture
) -> None:
    prompt = tiny_model.text.decode([2] * 256)
    assert len(tiny_model.text.encode(prompt)) == 256
    facts = json_of(capsys, tiny_bundle, prompt, "--raw", "--ignore-eos")
    assert facts["generated_tokens"] == 1
    assert facts["finish_reason"] == "context"


def test_a_path_may_be_read_from_a_file(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "path.txt"
    path.write_text("int8\nskip*2\n int4,\n")
    facts = json_of(capsys, tiny_bundle, PROMPT, *QUICK, "--policy", f"static:@{path}")
    assert facts["actions"] == {"int4": 0.25, "int8": 0.25, "skip": 0.5}


def test_an_unknown_policy_is_answered_with_the_known_ones(
    tiny_bundle: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_bundle, PROMPT, "--policy", "fastest")
    for known in ("full", "int8", "int4", "random", "static"):
        assert known in message


@pytest.mark.parametrize(
    "choice", [("--policy", "int8"), ("--policy", "static:int4*3,full"), ("--prefill", "full")]
)
def test_an_action_that_the_bundle_lacks_is_refused_and_those_it_has_are_named(
    choice: tuple[str, str], int4_bundle: Path, capsys: Capture
) -> None:
    message = refused(capsys, int4_bundle, PROMPT, *choice)
    assert "int4" in message and "not in this bundle" in message


def test_the_balanced_plan_is_the_default(int4_bundle: Path, capsys: Capture) -> None:
    facts = json_of(capsys, int4_bundle, PROMPT, *QUICK)
    assert facts["policy"] == "balanced"
    assert facts["actions"] == {"int4": 1.0}


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--top-k", "-1"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--seed", "-1"),
    ],
    ids=" ".join,
)
def test_a_sampling_option_out_of_range_is_refused(
    option: tuple[str, str], tiny_bundle: Path, capsys: Capture
) -> None:
    message = refused(capsys, tiny_bundle, PROMPT, f"{option[0]}={option[1]}")
    assert option[0].strip("-").replace("-", "_") in message


def test_an_empty_stop_text_does_not_silence_the_answer(tiny_bundle: Path, capsys: Capture) -> None:
    code = run(tiny_bundle, PROMPT, *QUICK, "--stop", "", "--json")
    captured = capsys.readouterr()
    assert code == 2 or json.loads(captured.out)["generated_tokens"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("out", "prompt", "more"),
        ("out", "prompt", "--no-such-option"),
        ("out", "prompt", "--max-tokens", "0"),
        ("out", "prompt", "--threads", "0"),
        ("out", "prompt", "--temperature", "warm"),
        ("out", "prompt", "--prefill", "skip"),
        ("out", "--json"),
        ("out", "prompt", "--raw", "--system", "be brief"),
        ("out", "--batch", "file", "--raw", "--system", "be brief"),
        ("out", "--trace", "-"),
        ("out", "prompt", "--trace", "-", "--json"),
        ("out", "prompt", "--trace", "-", "--show-path"),
        ("out", "--raw"),
        ("out", "prompt", "--parallel", "4"),
        ("out", "prompt", "--session", "talk"),
        ("out", "prompt", "--raw", "--max-thinking-tokens", "4"),
        ("out", "prompt", "--max-thinking-tokens", "-1"),
        ("out", "prompt", "--speculate", "0", "--expected", "file"),
        ("out", "prompt", "--batch", "file"),
        ("out", "--batch", "file", "--json"),
    ],
    ids=" ".join,
)
def test_misuse_of_the_arguments_is_one_line_that_leads_to_the_help(
    arguments: tuple[str, ...], capsys: Capture
) -> None:
    assert "dash-run --help" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("option", "known"),
    [("--polcy=int4", "--policy"), ("--max-new-tokens", "--max-tokens"), ("--qqqqqq", None)],
)
def test_an_option_that_is_nearly_another_is_answered_with_it(
    option: str, known: str | None, capsys: Capture
) -> None:
    message = refused(capsys, "out", "prompt", option)
    assert ("did you mean" in message) == (known is not None)
    assert f"mean {known}?" in message or known is None


def test_the_first_options_of_other_tools_are_answered_with_what_stands_here(
    capsys: Capture,
) -> None:
    message = refused(capsys, "-m", "out", "-p", "hi", "-n", "5")
    for told in ("the model as the first", "the prompt as the second", "-n give --max-tokens"):
        assert told in message


def test_help_has_examples(capsys: Capture) -> None:
    assert run("--help") == 0
    examples = capsys.readouterr().out.partition("examples:")[2]
    assert examples.count("dash-run ") >= 3 and "/help" in examples


def test_a_missing_bundle_is_refused_with_the_remedy(tmp_path: Path, capsys: Capture) -> None:
    message = refused(capsys, tmp_path / "nowhere", PROMPT)
    assert "nowhere" in message and "dash-export" in message


def test_a_bundle_for_another_device_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(DeviceError, match="cuda"):
        dash_onnx.load(tiny_bundle, device="cuda")


@pytest.mark.parametrize("where", ["no/such/folder/trace.jsonl", ".", "file/trace.jsonl"])
def test_a_trace_that_cannot_be_opened_is_refused(
    where: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    message = refused(capsys, tiny_bundle, PROMPT, "--trace", tmp_path / where)
    assert str(tmp_path / where) in message


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@needs_dev_full
def test_a_trace_goes_into_no_device(tiny_bundle: Path, capsys: Capture) -> None:
    message = refused(capsys, tiny_bundle, PROMPT, *QUICK, "--trace", "/dev/full")
    assert "not a regular file" in message


@needs_dev_full
def test_stdout_on_a_full_disk_is_one_line(tiny_bundle: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tiny_bundle), PROMPT, *QUICK],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert b"Traceback" not in done.stderr
    assert b"No space left" in done.stderr
    assert done.returncode not in (0, 1)


@pytest.mark.parametrize("wrong", ["policy", "prompt", "session"])
def test_a_refused_run_does_not_empty_an_earlier_trace(
    wrong: str, tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, session = tmp_path / "trace.jsonl", tmp_path / "talk"
    path.write_text("precious\n")
    session.write_text("not a session")
    arguments = {
        "policy": (PROMPT, "--policy", "fastest"),
        "prompt": (PROMPT * 100,),
        "session": ("--session", session),
    }
    refused(capsys, tiny_bundle, *arguments[wrong], "--trace", path)
    assert path.read_text() == "precious\n"


@pytest.mark.parametrize(
    "name", ["layers/02/int4.onnx", "layers/02/int4.onnx.data", "head/int8.onnx.data"]
)
@pytest.mark.parametrize("damage", ["edited", "truncated", "removed"])
def test_a_damaged_file_is_refused_by_its_name(
    name: str, damage: str, damaged: Path, capsys: Capture
) -> None:
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content)
    arguments = ("--policy", "int4", "--prefill", "int4", *QUICK)
    assert name in refused(capsys, damaged, PROMPT, *arguments)


def test_a_graph_that_is_damaged_but_not_used_does_no_harm(damaged: Path, capsys: Capture) -> None:
    path = damaged / "layers/02/int4.onnx.data"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert json_of(capsys, damaged, PROMPT, *QUICK, "--policy", "int8")["text"]


def test_a_damaged_graph_that_only_decoding_uses_is_found_before_anything_is_written(
    damaged: Path, capsys: Capture
) -> None:
    path = damaged / "layers/02/int4.onnx.data"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert "int4.onnx.data" in refused(capsys, damaged, PROMPT, *QUICK, "--policy", "int4")


@pytest.mark.parametrize("prefill", [(), ("--prefill", "int8")])
@pytest.mark.parametrize("given", [(PROMPT,), ()])
def test_no_token_waits_for_a_graph_to_load(
    given: tuple[str, ...],
    prefill: tuple[str, ...],
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[set[str]] = []
    stream = Model.stream

    def watching(model: Model, *prompt: Any, **options: Any) -> Stream:
        def chunks(running: Stream) -> Generator[Chunk]:
            yield from running
            loaded.append(set(model.loaded))

        loaded.append(set(model.loaded))
        running = stream(model, *prompt, **options)
        return Stream(chunks(running), running._request)

    monkeypatch.setattr(Model, "stream", watching)
    give_stdin(monkeypatch, PROMPT)
    assert run(tiny_bundle, *given, *QUICK, "--policy", "static:int4*3,skip", *prefill) == 0
    before, after = loaded
    assert before == after
    assert "layers/00/int4.onnx" in before and "layers/01/skip.onnx" not in before


# Pipes


@pytest.mark.parametrize("more", ["", "--json"])
def test_a_reader_that_leaves_early_causes_no_traceback(more: str, tiny_bundle: Path) -> None:
    shell = (
        f'"$0" -c \'{RUN}\' "$1" "$2" --ignore-eos --max-tokens 200 {more}'
        " | head -c 1 >/dev/null; echo ${PIPESTATUS[0]}"
    )
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, str(tiny_bundle), PROMPT],
        capture_output=True,
        timeout=60,
        text=True,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stdout.strip() in ("0", "141")


# Chat


Prefills = list[tuple[int, int]]


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> Prefills:
    """For each prefill, how many tokens the cache held and how many were run."""
    seen: Prefills = []
    prefill = SequenceState.prefill

    def watched(self: SequenceState, ids: np.ndarray, *more: Any) -> Any:
        seen.append((self.length, len(ids)))
        return prefill(self, ids, *more)

    monkeypatch.setattr(SequenceState, "prefill", watched)
    return seen


def chatted(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, lines: str, *arguments: object, code: int = 0
) -> tuple[str, str]:
    give_stdin(monkeypatch, lines)
    assert run(*arguments) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def conversation(model: Model, *users: str) -> list[str]:
    """The answers of a chat in which every turn is computed afresh."""
    messages: list[dict[str, str]] = []
    answers = []
    for user in users:
        messages.append({"role": "user", "content": user})
        answers.append(model.chat(messages, max_new_tokens=6, ignore_eos=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_piped_chat_answers_each_line(
    tiny_bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, err = chatted(monkeypatch, capsys, "hello\n\n  \nships?\n", tiny_bundle, *QUICK)
    assert out == "".join(f"{a}\n" for a in conversation(tiny_model, "hello", "ships?"))
    assert len(err.splitlines()) == 2  # a summary for each answer, no prompt sign


def test_a_chat_reuses_the_keys_and_values_of_the_turns_before(
    tiny_bundle: Path,
    tiny_model: Model,
    prefills: Prefills,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    out, _ = chatted(monkeypatch, capsys, "hello\nships?\n", tiny_bundle, *QUICK)
    (held, ran), (held_again, ran_again) = prefills
    first = [{"role": "user", "content": "hello"}]
    answer = out.splitlines()[0]
    second = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "ships?"},
    ]
    assert (held, ran) == (0, len(tiny_model.text.encode_chat(first)))
    assert held_again >= ran - 1  # at least the first question is not computed again
    assert held_again + ran_again == len(tiny_model.text.encode_chat(second))


def test_a_session_goes_on_where_it_ended(
    tiny_bundle: Path,
    tiny_model: Model,
    prefills: Prefills,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    given = (tiny_bundle, *QUICK, "--session", tmp_path / "talk")
    first, _ = chatted(monkeypatch, capsys, "hello\n", *given)
    second, err = chatted(monkeypatch, capsys, "ships?\n", *given)
    assert (first + second).splitlines() == conversation(tiny_model, "hello", "ships?")
    assert "2 messages from" in err
    (_, ran), (held, _), *_ = prefills
    assert held >= ran - 1
    (tmp_path / "talk").write_text("damaged")
    assert "talk" in refused(capsys, *given)
    assert "regular file" in refused(capsys, tiny_bundle, "--session", "/dev/null")


def test_reset_forgets_the_conversation(
    tiny_bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, _ = chatted(monkeypatch, capsys, "hello\n/reset\nships?\n", tiny_bundle, *QUICK)
    answers = [*conversation(tiny_model, "hello"), *conversation(tiny_model, "ships?")]
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_reset_keeps_the_system_message(
    tiny_bundle: Path,
    prefills: Prefills,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    out, _ = chatted(
        monkeypatch, capsys, "hello\n/reset\nhello\n", tiny_bundle, *QUICK, "--system", "be brief"
    )
    first, second = out.splitlines()
    assert first == second
    assert sum(prefills[0]) == sum(prefills[1])


def test_exit_ends_the_chat(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, err = chatted(monkeypatch, capsys, "/exit\nhello\n", tiny_bundle, *QUICK)
    assert (out, err) == ("", "")


def test_a_chat_writes_every_token_into_the_trace(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = tmp_path / "trace.jsonl"
    chatted(monkeypatch, capsys, "hello\nships?\n", tiny_bundle, *QUICK, "--trace", path)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 12


def test_a_message_that_does_not_fit_the_context_does_not_end_the_chat(
    tiny_bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = f"{'ships ' * 300}\nhello\n"
    out, err = chatted(monkeypatch, capsys, lines, tiny_bundle, *QUICK)
    assert out == conversation(tiny_model, "hello")[0] + "\n"
    assert err.splitlines()[0].startswith("dash-run: error: ")
    assert "256" in err.splitlines()[0]


def test_an_interrupted_answer_does_not_end_the_chat(
    tiny_bundle: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    forward, calls = SequenceState.forward, iter(range(1000))

    def interrupted(self: SequenceState, *arguments: Any, **options: Any) -> Any:
        result = forward(self, *arguments, **options)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(SequenceState, "forward", interrupted)
    out, err = chatted(monkeypatch, capsys, "hello\n/reset\nships?\n", tiny_bundle, *QUICK)
    monkeypatch.undo()
    assert "stopped" in err
    assert out.endswith(conversation(tiny_model, "ships?")[0] + "\n")


@pytest.mark.parametrize(
    ("owner", "name", "message", "ordinal"),
    [
        (SequenceState, "prefill", "hello", 1),
        (Model, "preload", "ships " * 200, 2),  # the first call is at the start of the program
        (Model, "preload", "/budget fast", 2),
        (Cache, "save", "hello", 1),
    ],
)
def test_an_interrupt_before_or_after_an_answer_does_not_end_the_chat(
    owner: type,
    name: str,
    message: str,
    ordinal: int,
    scored_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    done, calls = getattr(owner, name), iter(range(1, 1000))

    def interrupted(*given: Any, **options: Any) -> Any:
        result = done(*given, **options)
        if next(calls) == ordinal:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    path, session = tmp_path / "chat.json", tmp_path / "talk"
    given = (scored_bundle, *QUICK, "--policy", "dash", "--session", session)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        lines = f"{message}\n/save {path}\n/reset\nships?\n"
        out, err = chatted(patched, capsys, lines, *given)
    answered = name == "save"
    assert err.count("dash-run: stopped") == 1
    assert len(json.loads(path.read_text("utf-8"))) == (2 if answered else 0)
    session.unlink()
    again, _ = chatted(monkeypatch, capsys, "ships?\n", *given)
    assert out.endswith(again) and (out == again) != answered


def test_an_interrupt_while_the_text_is_written_frees_the_conversation(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    show, kept = chat.show, []

    def interrupted(chunks: Iterator[Chunk], *more: Any) -> None:
        if kept:
            show(chunks, *more)
            return
        kept.append(chunks)  # somebody still holds them, as a traceback would
        next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "show", interrupted)
    out, err = chatted(monkeypatch, capsys, "hello\nships?\n", tiny_bundle, *QUICK)
    assert "stopped" in err and "in use" not in err
    assert len(out.splitlines()) >= 2


def test_kill_ends_the_chat(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(chat, "show", killed)
    give_stdin(monkeypatch, "hello\nships?\n")
    assert run(tiny_bundle, *QUICK) == 130
    assert "dash-run: interrupted" in capsys.readouterr().err


def test_a_stopped_answer_stays_in_the_conversation(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    forward, calls = SequenceState.forward, iter(range(1000))

    def interrupted(self: SequenceState, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    monkeypatch.setattr(SequenceState, "forward", interrupted)
    path = tmp_path / "chat.json"
    out, _ = chatted(monkeypatch, capsys, f"hello\n/save {path}\n", tiny_bundle, *QUICK)
    asked, answered = json.loads(path.read_text("utf-8"))
    assert asked == {"role": "user", "content": "hello"}
    assert answered == {"role": "assistant", "content": out.removesuffix("\n")}


def test_a_saved_conversation_goes_on(
    tiny_bundle: Path,
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    path = tmp_path / "chat.json"
    chatted(monkeypatch, capsys, f"hello\n/save {path}\n/save {path}\n", tiny_bundle, *QUICK)
    lines = f"/load {path}\nships?\n/reset\n/save {path}\n"
    out, err = chatted(monkeypatch, capsys, lines, tiny_bundle, *QUICK)
    assert out == conversation(tiny_model, "hello", "ships?")[1] + "\n"
    assert "2 messages from" in err and "error" not in err
    assert json.loads(path.read_text("utf-8")) == []
    _, err = chatted(monkeypatch, capsys, f"/save {path}\n", tiny_bundle, *QUICK)
    assert "exists" in err


def test_regen_answers_the_last_message_again(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, err = chatted(monkeypatch, capsys, "/regen\nhello\n/regen\n", tiny_bundle, *QUICK)
    first, again = out.splitlines()
    assert first == again
    assert "no answer yet" in err.splitlines()[0]


def test_system_sets_and_removes_the_system_message(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    paths = [tmp_path / name for name in ("with.json", "without.json")]
    lines = f"/system be brief\nhello\n/save {paths[0]}\n/system\n/save {paths[1]}\n"
    chatted(monkeypatch, capsys, lines, tiny_bundle, *QUICK)
    first, second = (json.loads(path.read_text("utf-8")) for path in paths)
    assert first[0] == {"role": "system", "content": "be brief"}
    assert second == first[1:]


@pytest.mark.parametrize(
    "line",
    [
        *("/rest", "/budget 0.8", "/load nowhere.json", "/load", "/save"),
        *("/load ~nobody-here/x", "/save ~nobody-here/x", "/load a\0b", "/save a\0b"),
        *(f"/save {'x' * 300}", "/save /proc/x"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused_and_the_chat_goes_on(
    line: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, err = chatted(monkeypatch, capsys, f"{line}\nhello\n", tiny_bundle, *QUICK)
    assert err.splitlines()[0].startswith("dash-run: error: ")
    assert len(out.splitlines()) >= 1


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([{"role": "assistant", "content": "hi"}], "no answer yet"),
        ([{"role": "user"}, {"role": "assistant", "content": "hi"}], "message is empty"),
    ],
)
def test_regen_of_a_loaded_conversation_may_lack_a_question(
    messages: list[dict[str, str]],
    told: str,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(messages))
    out, err = chatted(monkeypatch, capsys, f"/load {path}\n/regen\nhello\n", tiny_bundle, *QUICK)
    assert told in err.splitlines()[1] and len(out.splitlines()) >= 1


def test_a_session_that_cannot_be_written_does_not_end_the_chat(
    tiny_bundle: Path,
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def full(cache: Cache, path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Cache, "save", full)
    given = (tiny_bundle, *QUICK, "--session", tmp_path / "talk")
    out, err = chatted(monkeypatch, capsys, "hello\nships?\n", *given, code=2)
    assert out.splitlines() == conversation(tiny_model, "hello", "ships?")
    assert err.count("talk: No space left on device") == 2
    assert "the last answers are not in" in err.splitlines()[-1]


def test_a_session_that_stays_is_cleared_all_the_same(
    tiny_bundle: Path,
    tmp_path: Path,
    tiny_model: Model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, **options: Any) -> None:
        if path.name == "talk":
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    given = (tiny_bundle, *QUICK, "--session", tmp_path / "talk")
    out, err = chatted(monkeypatch, capsys, "hello\n/reset\nhello\n", *given)
    assert out.splitlines() == conversation(tiny_model, "hello") * 2
    assert "Permission denied" in err


def test_a_cleared_conversation_leaves_its_session(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    given = (tiny_bundle, *QUICK, "--session", tmp_path / "talk")
    chatted(monkeypatch, capsys, "hello\n/reset\n", *given)
    _, err = chatted(monkeypatch, capsys, "/reset\nships?\n", *given)
    assert "messages from" not in err
    _, err = chatted(monkeypatch, capsys, "", *given)
    assert "2 messages from" in err


def test_a_space_makes_a_message_of_a_command(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, err = chatted(monkeypatch, capsys, " /exit is a word\nhello\n", tiny_bundle, *QUICK)
    assert err.count("tokens/s") == 2 and out


def test_the_budget_of_a_chat_may_change(
    scored_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = "/budget\n/budget fast\nhello\n/budget 7\n"
    _, err = chatted(monkeypatch, capsys, lines, scored_bundle, *QUICK)
    told = [line for line in err.splitlines() if line.startswith("dash-run: ")]
    assert told[:2] == ["dash-run: policy dash", "dash-run: policy dash:fast"]
    assert told[2].startswith("dash-run: error: budget 7 is outside")


@pytest.mark.parametrize(
    ("own", "speculate", "wanted", "error"),
    [
        ("fast", None, "quality", "the graphs to load need 0.0 GB"),
        ("quality", True, "fast", "draft tokens are verified on one path for every token"),
    ],
)
def test_a_budget_whose_plan_is_refused_leaves_the_chat_at_its_own(
    own: str,
    speculate: bool | None,
    wanted: str,
    error: str,
    scored_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setattr(sessions, "available_bytes", lambda: 0)
    give_stdin(monkeypatch, f"/budget {wanted}\n/budget\n")
    with dash_onnx.load(scored_bundle) as model:
        name = model.policy(budget=own).name
        chat.Chat(model, GenerationOptions(budget=own, speculate=speculate)).run()
    refusal, told = capsys.readouterr().err.splitlines()
    assert refusal.startswith(f"dash-run: error: {error}") and told == f"dash-run: policy {name}"


def test_help_lists_the_commands(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    _, err = chatted(monkeypatch, capsys, "/help\n", tiny_bundle, *QUICK)
    for command in ("/budget", "/system", "/regen", "/save", "/load", "/reset", "/exit"):
        assert f"\n{command}" in f"\n{err}"


def test_a_chat_under_a_policy_that_cannot_be_is_refused_at_once(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    give_stdin(monkeypatch, "hello\nships?\n")
    assert "fastest" in refused(capsys, tiny_bundle, "--policy", "fastest")


# Chat at a terminal


class Terminal:
    """dash-run at a pseudo terminal."""

    def __init__(self, *arguments: object):
        self._master, self._slave = pty.openpty()
        tty = os.ttyname(self._slave)
        command = [sys.executable, "-c", RUN, *map(str, arguments)]
        # In a session of its own, the first terminal opened becomes the controlling one.
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" <{tty} >{tty} 2>{tty}', "sh", *command],
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        self.shown = ""
        self.read_until("> ")
        os.close(self._slave)  # held open until the process has opened it, too

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, mark: str, seconds: float = 30) -> str:
        """Returns what appears up to and including `mark`; at the end of the process, all."""
        deadline = time.monotonic() + seconds
        while mark not in self.shown:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"no {mark!r} in {self.shown!r}"
            try:
                piece = os.read(self._master, 4096)
            except OSError as error:
                assert error.errno == errno.EIO
                piece = b""
            assert piece, f"ended without {mark!r}: {self.shown!r}"
            self.shown += piece.decode(errors="replace")
        found, _, self.shown = self.shown.partition(mark)
        return found + mark

    def close(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self._master)
        return code


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()


def test_a_chat_at_a_terminal_answers_resets_and_leaves_with_ctrl_d(
    tiny_bundle: Path, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal(tiny_bundle, *QUICK)
    chat.send("hello\n")
    first = chat.read_until("| length]")
    assert "6 tokens" in first
    chat.read_until("> ")
    chat.send("/reset\n")
    chat.read_until("> ")
    chat.send("hello\n")
    again = chat.read_until("| length]")
    assert again.split("[6 tokens")[0] == first.split("[6 tokens")[0]
    chat.read_until("> ")
    chat.send("\x04")
    assert chat.close() == 0


def test_ctrl_c_at_the_prompt_of_a_chat_drops_the_line_and_stays(
    tiny_bundle: Path, terminal: Callable[..., Terminal]
) -> None:
    chat = terminal(tiny_bundle, *QUICK)
    time.sleep(0.5)  # readline shows its prompt a moment before it waits for signals
    chat.send("half a mess\x03")
    shown = chat.read_until("/exit or Ctrl-D leaves")
    assert "Traceback" not in shown
    chat.read_until("> ")
    chat.send("\x04")
    assert chat.close() == 0


def test_a_pasted_text_is_one_message(
    tiny_bundle: Path, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    chat, path = terminal(tiny_bundle, *QUICK), tmp_path / "chat.json"
    chat.send("hello\nto all\nships\n")
    chat.read_until("| length]")
    chat.read_until("> ")
    chat.send(f"/save {path}\n")
    chat.read_until("2 messages in")
    chat.read_until("> ")
    chat.send("\x04")
    assert chat.close() == 0
    assert json.loads(path.read_text("utf-8"))[0]["content"] == "hello\nto all\nships"
