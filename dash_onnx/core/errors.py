"""Errors a user can act on.

Each message is one line: the rule, what was observed, and the remedy. The command line
tools print it on stderr and exit with code 2; nothing else is turned into exit code 2.
"""

_LONGEST = 800  # characters of a message


class DashError(Exception):
    """Base of every error that the user can fix.

    Messages quote files, templates and libraries: lines are joined, other unprintable characters
    are escaped, and long messages cut.
    """

    def __init__(self, message: str):
        """Takes the message."""
        super().__init__(_cut(printable(" ".join(map(str.strip, _cut(message).splitlines())))))


def first_line(error: Exception) -> str:
    """The first line of another library's message, or the type of an error without one."""
    return (str(error) or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """Text that cannot move the cursor or hide anything: unprintable characters are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _cut(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"


class BundleError(DashError):
    """A bundle is missing, damaged, of another version, or would be overwritten."""


class ResumeError(BundleError):
    """An interrupted export cannot be continued.

    Attributes:
        reason: the message without its remedy.
    """

    def __init__(self, reason: str, remedy: str):
        """Takes the two halves of the message."""
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class SourceError(DashError):
    """The source model or a text file cannot be read."""


class UnsupportedError(DashError):
    """The model, or a part of its configuration, has no exporter."""


class PolicyError(DashError, ValueError):
    """A policy, a message, or an option of a generation is not valid for this bundle."""


class ContextLengthError(DashError):
    """A prompt does not fit the context of the bundle."""


class DeviceError(DashError):
    """ONNX Runtime is missing or too old, or the device is missing, fails or lacks memory."""
