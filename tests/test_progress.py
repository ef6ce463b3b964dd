"""Progress: bars on a terminal, lines in a log, nothing where nobody listens."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from conftest import save_tiny, spec_of

from dash_onnx.core import progress
from dash_onnx.core.facts import ModelFacts
from dash_onnx.core.progress import Expected, Loop, Phase, announce
from dash_onnx.exporters.expected import Speed, export_phases, training_phases
from dash_onnx.exporters.export import ExportOptions, export
from dash_onnx.exporters.train.options import PLANS

Log = pytest.LogCaptureFixture
COMMAND = "import sys; from dash_onnx.cli.export import main; sys.exit(main())"


@pytest.fixture
def log(caplog: Log) -> Iterator[Log]:
    """What a program sees that asks for INFO."""
    caplog.set_level(logging.INFO, "dash_onnx")
    yield caplog
    announce(())


def test_a_phase_is_a_line_at_its_start_lines_meanwhile_and_one_at_its_end(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.02)
    for _ in Loop("layers", range(12, 15), done=12):
        time.sleep(0.05)
    first, *meanwhile, last = log.messages
    assert first == "layers: starts after 12 of 15"
    assert re.fullmatch(r"layers: done in 0\.\d s", last)
    assert any(line.startswith("layers: 13 of 15 after 1 s, about 1 s to go") for line in meanwhile)


def test_a_phase_of_one_step_and_one_of_unknown_length(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.01)
    with Phase("check", total=1):
        time.sleep(0.05)
    assert log.messages[0] == "check: starts" and "check: after 1 s" in log.messages
    log.clear()
    for _ in Loop("search", iter(range(3))):
        time.sleep(0.03)
    assert log.messages[0] == "search: starts" and "search: 1 after 1 s" in log.messages


def test_a_phase_that_is_left_early_says_where(log: Log) -> None:
    for number in Loop("rows", range(9)):
        if number == 4:
            break
    assert log.messages[-1].startswith("rows: ended after 4 of 9 in ")


def test_a_phase_that_fails_leaves_the_last_word_to_the_error(log: Log) -> None:
    with pytest.raises(KeyError), Phase("check", total=1):
        raise KeyError
    assert log.messages == ["check: starts"]


def test_the_phases_to_come_are_told_when_the_first_starts(log: Log) -> None:
    announce([Expected("text", 60.0), Expected("layers", 200.0), Expected("head", 3.0)])
    assert log.messages == []
    with Phase("text", total=1):
        pass
    assert log.messages[:2] == [
        "3 phases, about 4 min on this machine: text 60 s, layers 3 min, head 3 s",
        "text: starts, expected 60 s",
    ]
    assert log.messages[2].startswith("text: done in 0.0 s (expected 60 s)")


def test_phases_of_an_earlier_run_are_told_as_done(log: Log) -> None:
    announce([Expected("text", 60.0), Expected("layers", 200.0), Expected("head", 3.0)])
    for _ in Loop("layers", range(15, 20), done=15):
        pass
    assert log.messages[:2] == [
        "3 phases (1 done), about 53 s on this machine: text (done), layers 50 s, head 3 s",
        "layers: starts after 15 of 20, expected 50 s",
    ]


def test_what_a_phase_took_corrects_what_is_expected_of_the_next(log: Log) -> None:
    announce([Expected("text", 0.01), Expected("layers", 100.0)])
    with Phase("text", total=1):
        time.sleep(0.1)
    seconds = re.search(r"about (\d+) min to go", log.messages[-1])
    assert seconds and int(seconds[1]) >= 16  # ten times as long
    with Phase("layers", total=1):
        assert log.messages[-1] == f"layers: starts, expected {seconds[1]} min"


def test_a_name_that_is_not_scheduled_changes_nothing(log: Log) -> None:
    announce([Expected("text", 60.0)])
    with Phase("download", total=1):
        pass
    assert log.messages[0] == "download: starts"
    with Phase("text", total=1):
        assert log.messages[-1] == "text: starts, expected 60 s"


def test_the_library_says_nothing_unless_asked(
    tiny_folder: Path, night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(str(tiny_folder), tmp_path / "out", ExportOptions(("int8",), calibration=(night,)))
    assert capfd.readouterr() == ("", "")


def test_larger_models_and_slower_machines_are_expected_to_take_longer() -> None:
    small = ModelFacts("", "llama", 30, 576, 1536, 9, 3, 64, 49152, 2048)
    large = ModelFacts("", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, 2048)

    def seconds(facts: ModelFacts, speed: Speed) -> float:
        options = ExportOptions().resolved("folder", spec_of(facts))
        phases = export_phases(facts, options, speed, check=True)
        phases += training_phases(facts, PLANS["quick"], speed, generated=True)
        return sum(phase.seconds for phase in phases)

    fast, slow = Speed(1e11, 3e11), Speed(2e10, 2e10)
    assert 240 < seconds(small, fast) < 960  # five to ten minutes were measured
    assert seconds(small, fast) < seconds(large, fast) / 2
    assert seconds(small, slow) > 4 * seconds(small, fast)
    measured = Speed.measured()
    assert measured.fast >= measured.float32 > 1e8


# The command, in processes whose stderr is a pipe or a terminal


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", COMMAND, *map(str, arguments)]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the model is too small for more


def test_a_log_has_every_phase_and_says_when_the_bundle_can_answer(tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "model", num_hidden_layers=2), tmp_path / "out"
    done = subprocess.run(
        command(model, out, "--max-length", 64, "--json"),
        capture_output=True,
        text=True,
        timeout=300,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(out)
    tool, log = "dash-export: ", done.stderr.splitlines()
    assert all(line.startswith(tool) for line in log)
    lines = [line.removeprefix(tool) for line in log]
    assert lines[0] == f"opening {model}"  # before the seconds of the imports
    head, _, rest = lines[1].partition(" on this machine: ")
    assert re.fullmatch(r"18 phases, about \d+ (s|min)", head)
    names = [re.sub(r" \d+ (s|min)$", "", part) for part in rest.split(", ")]
    assert [line.partition(": starts")[0] for line in lines if ": starts" in line] == names
    assert sum("(expected " in line for line in lines) == len(names)
    answers = lines.index(f'{out} can answer now: dash-run {out} "Hello!"; training the policy')
    assert any(line.startswith("costs: done in ") for line in lines[:answers])
    assert any(line.startswith("training text: starts") for line in lines[answers:])


def on_terminal(command: list[str], env: Mapping[str, str] | None = None) -> tuple[bytes, str]:
    """What a command writes to stdout, and what its terminal shows."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:  # how Linux tells that the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.stdout is not None
    with process.stdout:
        written = process.stdout.read()
    assert process.wait(timeout=60) == 0
    return written, shown.decode()


def test_a_terminal_shows_bars_in_place_of_lines(
    tiny_folder: Path, night: Path, tmp_path: Path
) -> None:
    arguments = (tiny_folder, tmp_path / "out", "--effort", "none", "--calibration", night)
    written, text = on_terminal(command(*arguments, "--json"), ONE_THREAD)
    assert json.loads(written)["model"]["num_layers"] == 4
    assert "dash-export: 6 phases, about " in text
    for name in ("layers", "LM head", "costs", "check"):
        assert re.search(rf"{name}: 100%\|", text), text
    assert ": starts" not in text and "done in" not in text


@pytest.mark.parametrize("columns", ["80", "1"])
def test_a_line_of_a_log_breaks_no_word_in_two(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    words = ["x" * 60, "dash-run", "models/smollm2-instruct"]
    record = logging.makeLogRecord({"msg": " ".join(words)})
    assert progress.BarHandler().format(record).split() == words


def test_a_bar_moves_between_two_steps() -> None:
    """Bars of few steps would stand still for minutes otherwise."""
    code = """
import logging, time
from dash_onnx.core import progress
logging.getLogger("dash_onnx").addHandler(progress.BarHandler())
logging.getLogger("dash_onnx").setLevel("INFO")
progress.announce([progress.Expected("layers", 90.0), progress.Expected("check", 60.0)])
with progress.Phase("layers", total=10) as phase:
    time.sleep(2.5)
    phase.update()
"""
    _, text = on_terminal([sys.executable, "-c", code])
    moments = [line for line in text.split("\r") if "0/10 [00:0" in line]
    assert any("[00:02<" in line for line in moments)
    assert any("about 88 s to go, 60 s after it" in line for line in moments)
