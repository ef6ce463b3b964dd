"""Damaged bundles: whatever is in a file, the runtime runs it or refuses it in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.bundle import file_facts

CASES = pytest.mark.parametrize(
    "cases", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["quick", "long"]
)
SECONDS = 5  # at most, of a case
ODD: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2, 7, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), 10**6,
    10**12, 10**400, "", "x", "x" * 300, "\udc80", "\x1b[2J\n", "../x", "skip", "int8", [], [0], {},
    {"a": 1},
)  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own, with a scorer."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"
    return with_scorer(Path(shutil.copytree(tiny_bundle, folder)))


def refused(folder: Path) -> str | None:
    """Loads a bundle and generates; the message where it is refused. Checks its form."""
    started, message = time.monotonic(), None
    try:
        with dash_onnx.load(folder) as model:
            model.generate("the keeper", policy="int4", max_new_tokens=2)
            if model.manifest.scorer:
                model.generate("the keeper", max_new_tokens=2)
            if model.text.chat_template:
                model.chat([{"role": "user", "content": "hello"}], max_new_tokens=1)
    except dash_onnx.DashError as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert len(message) < 1000, message
    assert time.monotonic() - started < SECONDS
    return message


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


def damaged(text: str, rng: random.Random) -> str:
    """JSON with one value replaced, removed, renamed or doubled."""
    data = json.loads(text)
    found = [*places(data)]
    # All parts alike: most of the places are in the list of files.
    part = rng.choice([*data])
    *inner, last = rng.choice([place for place in found if place[0] == part])
    parent = data
    for key in inner:
        parent = parent[key]
    kind = rng.randrange(5)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x" * 300, "../x", "\udc80", "a\nb"])] = parent.pop(last)
    elif kind == 1:
        parent.append(parent[last])
    elif kind == 2 and isinstance(parent[last], (int, float)):
        parent[last] = parent[last] * rng.choice([-1, 0.5, 2, 3, 1000]) + rng.choice([0, 1])
    else:
        parent[last] = rng.choice(ODD)
    return json.dumps(data)


def torn(text: str, rng: random.Random) -> str:
    """Text with a piece cut out, doubled, or replaced by odd characters."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + rng.choice([1, 3, 30, 3000]))
    piece = rng.choice(
        ["", text[start:end] * 2, '"', "{{", "0", "[" * 5000, "\0", "\u202e", "\r\n"]
    )
    return text[:start] + piece + text[end:]


def signed(folder: Path, name: str) -> None:
    """Makes the manifest say what a file is now, as whoever meant harm would."""
    manifest = folder / "dash.json"
    data = json.loads(manifest.read_text("utf-8"))
    data["files"][name] = vars(file_facts(folder / name))
    manifest.write_text(json.dumps(data), "utf-8")


@CASES
def test_a_damaged_manifest_is_run_or_refused_in_one_line(bundle: Path, cases: int) -> None:
    manifest = bundle / "dash.json"
    text, rng, messages = manifest.read_text("utf-8"), random.Random(0), []
    try:
        for case in range(cases):
            changed = damaged(text, rng)
            manifest.write_text(changed, "utf-8")
            try:
                messages.append(refused(bundle))
            except Exception as error:
                error.add_note(f"case {case}")
                raise
    finally:
        manifest.write_text(text, "utf-8")
    assert sum(message is not None for message in messages) > cases / 3


@CASES
@pytest.mark.parametrize("damage", [torn, damaged])
def test_damaged_text_files_are_run_or_refused_in_one_line(
    bundle: Path, damage: Callable[[str, random.Random], str], cases: int
) -> None:
    """Even where the checksums were made to fit."""
    rng = random.Random(1)
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"]
    names += ["chat_template.jinja"] if damage is torn else []
    manifest = (bundle / "dash.json").read_text("utf-8")
    for case in range(cases // 3):
        name = names[case % len(names)]
        whole = (bundle / name).read_bytes()
        try:
            (bundle / name).write_text(damage(whole.decode(), rng), "utf-8", "surrogateescape")
            signed(bundle, name)
            refused(bundle)
        except Exception as error:
            error.add_note(f"case {case}, {name}")
            raise
        finally:
            (bundle / name).write_bytes(whole)
            (bundle / "dash.json").write_text(manifest, "utf-8")


@CASES
def test_damaged_graphs_are_refused(bundle: Path, cases: int) -> None:
    """By their checksum: what ONNX Runtime makes of a damaged graph, nobody can promise."""
    rng = random.Random(2)
    names = ["embed.onnx", "layers/01/int4.onnx", "layers/01/int4.onnx.data", "head/int4.onnx"]
    for case in range(cases // 10):
        path = bundle / names[case % len(names)]
        whole = path.read_bytes()
        place, byte = rng.randrange(len(whole)), rng.randrange(1, 256)
        cut = whole[:place] + bytes([whole[place] ^ byte]) + whole[place + 1 :]
        try:
            path.write_bytes(rng.choice([cut, whole[:place], whole + b"x"]))
            os.utime(path)
            assert refused(bundle) is not None, (case, path)
        finally:
            path.write_bytes(whole)
