"""The addresses on which dash-serve listens, and the options that it refuses."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from cli_tool import Capture, Tool

from dash_onnx.cli.serve import main
from dash_onnx.serve.app import create_app

TOOL = Tool("dash-serve", main)


def test_a_port_in_use_is_refused_before_a_bundle_is_opened(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = TOOL.refused(capsys, "nowhere", "--port", port)
    assert f"cannot listen on port {port} of 127.0.0.1: Address already in use" in error
    assert "pass another --port or --host" in error


@pytest.mark.parametrize("host", ["192.0.2.1", "no..name"])
def test_a_host_that_is_not_this_machine_is_refused(
    host: str, tmp_path: Path, capsys: Capture
) -> None:
    key = tmp_path / "key.txt"
    key.write_text("secret")
    given = ("nowhere", "--port", "0", "--host", host, "--api-key-file", key)
    assert f"cannot listen on port 0 of {host}: " in TOOL.refused(capsys, *given)


def test_a_host_may_have_an_address_that_this_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def both(_: str, port: int, **options: Any) -> list[Any]:
        return [*found("192.0.2.1", port, **options), *found("127.0.0.1", port, **options)]

    found = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", both)
    given = ("nowhere", "--port", "0", "--host", "localhost")
    assert "no bundle" in TOOL.refused(capsys, *given)


def test_clients_are_refused_until_the_bundle_is_loaded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with socket.socket() as other:  # a server that loads at the same time
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))

        def loaded(*given: Any, **options: Any) -> Any:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            other.listen()
            return create_app(*given, **options)

        monkeypatch.setattr("dash_onnx.serve.app.create_app", loaded)
        given = (tiny_bundle, "--port", port, "--max-weights-mb", "100")
        assert f"cannot listen on port {port}" in TOOL.refused(capsys, *given)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_address_in_the_log_answers(host: str, tiny_bundle: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        pytest.skip(f"this machine has no {host}")
    command = [sys.executable, "-m", "dash_onnx", "serve", str(tiny_bundle), "--host", host]
    command += ["--port", "0", "--max-weights-mb", "100"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        try:
            line = next(line for line in running.stderr if "http://" in line)
            found = re.fullmatch(r"dash-serve: (http://(.+):([1-9]\d*))\n", line)
            assert found is not None and found[2] == (f"[{host}]" if ":" in host else host)
            assert httpx.get(f"{found[1]}/v1/models").status_code == 200
        finally:
            running.terminate()
        assert running.wait(30) == 0


def test_a_folder_for_prefixes_that_keeps_nothing_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    given = ("nowhere", "--prefix-cache", tmp_path, "--prefix-mb", "0")
    assert "--prefix-cache keeps nothing with --prefix-mb 0" in TOOL.refused(capsys, *given)
