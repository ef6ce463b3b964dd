"""Errors a user can act on.

Each message is one line: the rule, what was observed, and the remedy. The command line
tools print it on stderr and exit with code 2; nothing else is turned into exit code 2.
"""


class DashError(Exception):
    """Base of every error that the user can mend."""


class BundleError(DashError):
    """A bundle is missing, damaged, from another version, or would be overwritten."""


class SourceError(DashError):
    """The source model or a text file cannot be read."""


class UnsupportedError(DashError):
    """The model, or a part of its configuration, has no exporter."""


class PolicyError(DashError):
    """A policy, action or sampling option is not valid for this bundle."""


class ContextLengthError(DashError):
    """A prompt does not fit the context of the bundle."""


class DeviceError(DashError):
    """ONNX Runtime is missing, too old, or lacks the wanted device."""
