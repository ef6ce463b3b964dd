"""The package version and the bundle format version."""

__version__ = "0.1.0"

FORMAT_VERSION = 2
"""Version of the bundle format; a reader refuses any other."""
