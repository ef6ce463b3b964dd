"""A command line tool run inside the test's process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Tool:
    """A console script by name, with its entry point."""

    name: str
    main: Callable[[list[str]], int]

    def run(self, *arguments: object) -> int:
        """Returns the exit code."""
        try:
            return self.main([str(argument) for argument in arguments])
        except SystemExit as leave:
            return int(leave.code or 0)

    def refused(self, capsys: Capture, *arguments: object) -> str:
        """The one line with which the tool refuses: exit code 2, nothing on stdout."""
        code = self.run(*arguments)
        captured = capsys.readouterr()
        assert captured.err.startswith(f"{self.name}: error: ")
        assert captured.err.endswith("\n") and captured.err.count("\n") == 1
        assert captured.out == ""
        assert code == 2
        return captured.err

    def json_of(self, capsys: Capture, *arguments: object) -> dict[str, Any]:
        """The object that `--json` prints; nothing on stderr."""
        assert self.run(*arguments, "--json") == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        found = json.loads(captured.out)
        assert isinstance(found, dict)
        return found
