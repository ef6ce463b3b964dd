"""The log of the command line tools: on stderr, for people or for programs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from dash_onnx.core.progress import PACKAGE, BarHandler, announce


class Line(logging.Formatter):
    """Format of the tools' log: tool name, level from warnings up, and message."""

    def __init__(self, tool: str):
        """Takes the name of the tool."""
        super().__init__()
        self._tool = tool

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        word = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self._tool}: {word}{super().format(record)}"


class JsonLine(logging.Formatter):
    """One JSON object per line for log collectors; `facts` of a record become its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)


_UVICORN = "uvicorn.error"
"""Name of uvicorn's logger, whose warnings are of requests that it cannot read."""


@contextmanager
def logging_to_stderr(level: int, formatter: logging.Formatter) -> Iterator[None]:
    """The log goes to stderr, with bars if that is a terminal; so do errors of uvicorn."""
    levels = {PACKAGE: level, _UVICORN: max(level, logging.ERROR)}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    bars = sys.stderr.isatty() and not isinstance(formatter, JsonLine)
    handler = (BarHandler if bars else logging.StreamHandler)(sys.stderr)
    handler.setFormatter(formatter)
    before = [logger.level for logger in loggers]
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:  # before an error is reported: that is the last line
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        announce(())
