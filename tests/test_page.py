"""The page of dash-serve in headless Chromium, at the widths of a desk and of a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from node import example
from scored_bundle import with_scorer
from test_serve import Server
from test_web import chromium

import dash_onnx
from dash_onnx.core.bundle import Bundle, replace_manifest
from dash_onnx.core.colors import DARK, LIGHT, css
from dash_onnx.serve.limits import Limits

MARKDOWN = """\
# One *two*

<img src=x onerror=alert(1)> **bold** `a<b` [ok](https://a.b/?c=d&e) [no](javascript:alert(1))
![picture](http://a.b/c.png)

1. first
   - inner
2. second

> quoted
```js
let x = "<b>";
```
| a | b |
|---|---|
| 1 | 2 |"""
LINK = 'target="_blank" rel="noopener noreferrer"'
HTML = (
    "<h1>One <em>two</em></h1>"
    "<p>&#60;img src=x onerror=alert(1)&#62; <strong>bold</strong> <code>a&#60;b</code> "
    f'<a href="https://a.b/?c=d&#38;e" {LINK}>ok</a> [no](javascript:alert(1))<br>'
    f'<a href="http://a.b/c.png" {LINK}>picture</a></p>'
    "<ol><li>first<ul><li>inner</li></ul></li><li>second</li></ol>"
    "<blockquote><p>quoted</p></blockquote>"
    "<pre><code>let x = &#34;&#60;b&#62;&#34;;</code></pre>"
    "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
)


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("page") / "out")
    with dash_onnx.load(with_scorer(Path(folder)), policy="dash", budget=0.6) as model:
        short = Limits(max_tokens=16)  # two answers fit the context, whatever the policy chooses
        with Server({"out": model}, short) as server:
            yield server.url


def chatted(url: str, *options: str) -> dict[str, Any]:
    """What the page shows of two questions; before the second, the slider moves to its left."""
    example("web")  # has the browser's driver
    script = Path(__file__).parent / "chat_page.mjs"
    command = ["node", str(script), url, "the keeper", "counts", *options]
    result = subprocess.run(
        [*command, "--chromium", chromium()], capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["problems"] == []
    return found


@pytest.mark.parametrize("look", [("--width", "1200"), ("--width", "390", "--dark")], ids=str)
def test_the_page_chats_and_fits(look: tuple[str, ...], url: str) -> None:
    options = ("--system", "be brief", "--tokens", "8", "--markdown", MARKDOWN)
    found = chatted(url, *look, *options)
    assert not found["wide"]
    assert found["told"] == "60 % of the time at full"  # as the server was started
    presets = httpx.get(f"{url}/v1/models").json()["data"][0]["dash"]["presets"]
    first, second = found["asked"]
    assert "budget" not in first and second["budget"] == min(presets.values())  # slider moved
    assert first["messages"][0] == {"role": "system", "content": "be brief"}
    assert [message["role"] for message in second["messages"][1:]] == ["user", "assistant", "user"]
    assert first["max_tokens"] == 8 and first["temperature"] == 0 and "top_p" not in first
    _, facts = found["facts"]
    assert "a second" in facts and "int4" in facts
    assert "the keeper" in found["text"]
    assert found["colored"] == 8  # tokens of the first answer
    assert found["kept"]["before"] == found["kept"]["after"]
    assert found["kept"]["system"] == "be brief"
    assert found["again"] == {"roles": ["system", "user", "assistant", "user"], "shown": 4}
    assert found["left"] == ["(new chat)"]
    assert found["typed"] == "word" and found["stored"] == "[]"
    assert found["markdown"] == HTML


def untrained(folder: Path, most: int | None = None) -> Path:
    """A bundle whose presets take from some paths for all tokens; it has no scorer."""
    manifest = Bundle(with_scorer(folder)).manifest
    assert manifest.scorer is not None
    static = tuple(replace(point, kl=point.kl / 2) for point in manifest.scorer.static)
    replace_manifest(folder, replace(manifest, scorer=None, static=static[:most]))
    return folder


@pytest.mark.parametrize(
    ("prepare", "policy", "sent"),
    [
        (untrained, "", ("budget",)),
        (untrained, "int8", None),  # takes no budget
        (with_scorer, "int8", ("budget", "policy")),
        (partial(untrained, most=1), "", None),  # all presets run the same path
    ],
)
def test_the_slider_sends_what_the_bundle_supports(
    prepare: Callable[[Path], Path],
    policy: str,
    sent: tuple[str, ...] | None,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    folder = prepare(Path(shutil.copytree(tiny_bundle, tmp_path / "out")))
    with dash_onnx.load(folder, policy=policy) as model:
        with Server({"out": model}, Limits(max_tokens=16)) as server:
            found = chatted(server.url)
            facts = httpx.get(f"{server.url}/v1/models").json()["data"][0]["dash"]
    assert found["slides"] == (sent is not None)
    first, second = found["asked"]
    assert not {"budget", "policy"} & first.keys()
    usual = {"budget": min(facts["presets"].values()), "policy": "dash"}
    assert {name: second[name] for name in usual if name in second} == {
        name: usual[name] for name in sent or ()
    }


def test_the_page_runs_no_script_but_its_own_and_has_the_colors_of_the_report(url: str) -> None:
    answer = httpx.get(url)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    for color in (*LIGHT.values(), *DARK.values()):
        assert color in answer.text
    style = (Path(__file__).parent.parent / "examples/web/style.css").read_text("utf-8")
    assert css(LIGHT) in style and css(DARK) in style
