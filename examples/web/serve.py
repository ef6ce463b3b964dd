"""Serves the page and a fused folder, with the headers that let WebAssembly use threads.

dash-fuse out/ model/ --for web
python examples/web/serve.py model/ [--port 8000]
"""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent


class Handler(SimpleHTTPRequestHandler):
    """Files of the page; those below /model/ from the fused folder."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

    def __init__(self, *arguments, model: Path, **options):
        self._model = model
        super().__init__(*arguments, directory=str(PAGE), **options)

    def translate_path(self, path: str) -> str:
        """See the base class."""
        inside = path.removeprefix("/model/")
        if inside == path:
            return super().translate_path(path)
        self.directory, page = str(self._model), self.directory
        try:
            return super().translate_path("/" + inside)
        finally:
            self.directory = page

    def end_headers(self) -> None:
        """Adds what SharedArrayBuffer asks for."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, *_: object) -> None:
        """Only errors are worth a line."""


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="what `dash-fuse BUNDLE --for web` wrote")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    arguments = parser.parse_args()
    handler = partial(Handler, model=arguments.model.resolve())
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
