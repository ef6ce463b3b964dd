"""The server process: uvicorn, which on SIGTERM takes no new requests and finishes the others."""

from __future__ import annotations

import logging
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from dash_onnx.serve.service import Service

_LOG = logging.getLogger(__name__)
_HEADER_BYTES = 32 << 10  # limit of a request's line and headers
_CLOSING_S = 5  # seconds for connections to close after their answers are sent


class Server(uvicorn.Server):
    """Serves an app from `create_app`."""

    def __init__(self, app: Starlette):
        """Does not answer yet: `run` takes the sockets that it answers on."""
        self._service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # the other implementation has no limit on headers
                h11_max_incomplete_event_size=_HEADER_BYTES,
                log_config=None,
                access_log=False,  # the app's own access log has request ids
                timeout_graceful_shutdown=_CLOSING_S,
                server_header=False,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains the server, which makes /ready fail; a second one ends it."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; called ten times a second."""
        drained = self._service.draining and not self._service.requests
        return await super().on_tick(counter) or drained
