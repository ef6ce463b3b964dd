"""The CUDA driver: calls, and handles that are destroyed with their owner."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

from dash_onnx.core.errors import DeviceError

LIBRARY = "libcuda.so.1"


def open_driver(library: str = LIBRARY) -> Any:
    """Loads the driver's library.

    Raises:
        DeviceError: there is none.
    """
    try:
        return ctypes.CDLL(library)
    except OSError as error:
        raise DeviceError(f"no CUDA driver ({error}); install one, or use --device cpu") from None


class Driver:
    """The driver in the primary context of a device, which ORT uses as well."""

    def __init__(self, library: Any):
        """Retains the context of the first device for as long as the process lives.

        Args:
            library: the CUDA driver, or a stand-in for it in a test.

        Raises:
            DeviceError: the driver refuses.
        """
        self._library = library
        self._context = ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), 0)
        self.enter()

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function.

        Raises:
            DeviceError: it returns an error.
        """
        if code := getattr(self._library, name)(*arguments):
            raise DeviceError(f"CUDA driver: {name} failed with error {code}")

    def enter(self) -> None:
        """Makes the context current on this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def new_stream(self) -> ctypes.c_void_p:
        """A stream, which lives as long as the process: ORT's sessions refer to it."""
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), 0)
        return handle

    def release_with(self, owner: object, *calls: tuple[str, ctypes.c_void_p]) -> None:
        """Destroys handles with their owner, by calls given as pairs of name and handle."""
        weakref.finalize(owner, _release, self, calls).atexit = False


def _release(driver: Driver, calls: tuple[tuple[str, ctypes.c_void_p], ...]) -> None:
    driver.enter()
    for name, handle in calls:
        driver.call(name, handle)
