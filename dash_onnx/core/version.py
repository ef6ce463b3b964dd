"""The package version and the bundle format version."""

__version__ = "0.1.0"

FORMAT_VERSION = 4
"""Version of the bundle format; a reader accepts the one before it, too, and refuses any other."""
