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
        """The one line with which the tool refuses, after its log: exit code 2, empty stdout."""
        code = self.run(*arguments)
        captured = capsys.readouterr()
        *log, error = captured.err.splitlines(keepends=True)
        assert error.startswith(f"{self.name}: error: ") and error.endswith("\n")
        assert all(line.startswith(f"{self.name}: ") and "error: " not in line for line in log)
        assert captured.out == ""
        assert code == 2
        return error

    def json_of(self, capsys: Capture, *arguments: object) -> dict[str, Any]:
        """The object that `--json` prints; only the log is on stderr."""
        assert self.run(*arguments, "--json") == 0
        captured = capsys.readouterr()
        assert all(line.startswith(f"{self.name}: ") for line in captured.err.splitlines())
        found = json.loads(captured.out)
        assert isinstance(found, dict)
        return found
