"""Options that would have no effect beside others are refused, by every tool."""

from __future__ import annotations

import importlib

import pytest
from cli_tool import Capture, Tool

REFUSED = [
    ("run out --parallel 4", "--parallel goes with --batch"),
    ("run out hello --expected a.py --speculate 0", "--expected needs draft tokens"),
    ("export m out --effort none --decisions 2", "--decisions needs a training"),
    ("export m out --fused --device cuda", "--device does not go with --fused"),
    ("export m out --fused --kv-cache int8", "--kv-cache does not go with --fused"),
    ("train out --from base --decisions 2", "--decisions is kept from the other policy"),
    ("eval out --text a.txt --speculate 4", "--speculate goes with --task"),
    ("eval out --task piqa --window 64", "--window goes with --text"),
    ("bench out --skip quality --picture a.png", "--picture needs the KL"),
    ("bench out --skip quality --reference out", "--reference needs the KL"),
    ("info --variants int4", "--variants needs a PATH"),
    ("info --requantize", "--requantize needs a PATH"),
    ("info m --remove m", "PATH does not go with --remove"),
    ("profile out --dry-run --force", "--force does not go with --dry-run"),
    ("report out --json --html a.html", "--html is not written with --json"),
    ("serve out --prefix-mb 0 --prefix-cache kept", "--prefix-cache keeps nothing"),
    ("bench out --rounds 99999999999999999999", "is more than any"),
    ("serve out --prefix-mb -5", "-5 is not at least 0"),
]


@pytest.mark.parametrize(("command", "said"), REFUSED, ids=[command for command, _ in REFUSED])
def test_an_option_without_effect_is_refused(command: str, said: str, capsys: Capture) -> None:
    name, *arguments = command.split()
    tool = Tool(f"dash-{name}", importlib.import_module(f"dash_onnx.cli.{name}").main)
    assert said in tool.refused(capsys, *arguments)
