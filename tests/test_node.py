"""The Node example finds the tokens and takes the decisions that Python finds and takes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from node import example
from scored_bundle import with_scorer
from test_fused import Client

import dash_onnx
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.text import TextCodec
from dash_onnx.exporters.fused import BUDGET, FuseOptions, fuse

QUESTION = "the keeper counts 12 ships"
TOKENS = 24


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("node") / "out")
    return Bundle(with_scorer(Path(folder)))


def fused(bundle: Bundle, policy: str, client: str = "node") -> Path:
    folder = bundle.folder.parent / policy
    if not folder.exists():
        fuse(bundle, folder, FuseOptions(client, policy), overwrite=False)
    return folder


def node(folder: Path, *arguments: str) -> str:
    result = started(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(example("node") / "generate.mjs"), str(folder), QUESTION, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def python(
    bundle: Bundle, folder: Path, budget: float | None, tokens: int = TOKENS
) -> dict[str, Any]:
    """Greedy, on the same graph."""
    text = TextCodec(bundle)
    client = Client(folder, bundle.manifest)
    extra = {} if budget is None else {BUDGET: np.array([budget], np.float32)}
    prompt = text.encode_chat([{"role": "user", "content": QUESTION}]).tolist()
    found: dict[str, Any] = {"prompt": prompt, "tokens": [], "paths": []}
    ids = prompt
    for _ in range(tokens):
        logits, path = client(ids, **extra)
        token = int(logits[-1].argmax())
        if token in text.eos_token_ids:
            break
        found["tokens"].append(token)
        found["paths"].append(path or client.facts["path"])
        ids = [token]
    return found


@pytest.mark.parametrize(
    ("policy", "budget"), [("dash", None), ("dash", 0.35), ("dash", 0.6), ("int4", None)]
)
def test_tokens_and_paths_are_those_of_python(
    bundle: Bundle, policy: str, budget: float | None
) -> None:
    folder = fused(bundle, policy)
    given = [] if budget is None else ["--budget", str(budget)]
    found = json.loads(node(folder, "--json", "--max-tokens", str(TOKENS), *given))
    assert found == python(bundle, folder, budget)
    assert len(found["tokens"]) > 4


def test_the_text_is_that_of_the_tokens(bundle: Bundle) -> None:
    folder = fused(bundle, "int8")
    tokens = python(bundle, folder, None)["tokens"]
    text = dash_onnx.load(bundle.folder).text.decode(tokens)
    shown = node(folder, "--max-tokens", str(TOKENS)).removesuffix("\n")
    assert shown.rstrip("\ufffd") == text.rstrip("\ufffd") != ""


def test_a_preset_is_a_budget(bundle: Bundle) -> None:
    folder = fused(bundle, "dash")
    presets = json.loads((folder / "dash_fused.json").read_text())["budgets"]["presets"]
    by_name = node(folder, "--json", "--budget", "fast", "--max-tokens", "8")
    assert by_name == node(folder, "--json", "--budget", str(presets["fast"]), "--max-tokens", "8")


SPACED = "x = 'some' , y . isn't it ?"
"""Text that decoders for English prose would change, even text that was shown already."""

DECODE = """
import {{ readFileSync }} from "node:fs";
import {{ Template }} from "@huggingface/jinja";
import {{ Tokenizer }} from "@huggingface/tokenizers";
import {{ Text }} from "{fused}";
const read = async (name) => readFileSync("{folder}/" + name, "utf8");
const text = await Text.open({{ Tokenizer, Template }}, read);
const add = text.decoder();
process.stdout.write({ids}.map(add).join(""));
"""


def test_no_space_of_a_text_is_changed(bundle: Bundle) -> None:
    folder, text, home = fused(bundle, "int8"), TextCodec(bundle), example("node")
    ids = text.encode(SPACED).tolist()
    code = DECODE.format(fused=home.parent / "web" / "fused.mjs", folder=folder, ids=ids)
    command = ["node", "--input-type=module", "-e", code]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=home)
    assert result.stdout == text.decode(ids), result.stderr
    assert "'some' ," in result.stdout


def test_a_model_without_a_chat_template_continues_the_text(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fused(bundle, "int8"), tmp_path / "fused"))
    (folder / "chat_template.jinja").unlink()
    found = json.loads(node(folder, "--json", "--max-tokens", "4"))
    assert found["prompt"] == TextCodec(bundle).encode(QUESTION).tolist()
    assert len(found["tokens"]) == 4


def test_a_template_that_takes_only_parts_gets_parts(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(fused(bundle, "int8"), tmp_path / "fused"))
    parts = "{% for part in m.content %}{{ part.text }};{% endfor %}"
    template = f"{{% for m in messages %}}{parts}{{% endfor %}}"
    (folder / "chat_template.jinja").write_text(template)
    found = json.loads(node(folder, "--json", "--max-tokens", "1"))
    assert TextCodec(bundle).decode(found["prompt"]) == f"{QUESTION};"


@pytest.mark.parametrize(
    ("policy", "arguments", "why"),
    [
        ("dash", ("--budget", "balancd"), "nor a preset (balanced, fast, quality)"),
        ("dash", ("--max-tokens", "many"), "not a number"),
        ("int8", ("--budget", "fast"), "takes no --budget"),
    ],
)
def test_a_wrong_option_is_one_line(
    bundle: Bundle, policy: str, arguments: tuple[str, ...], why: str
) -> None:
    result = started(fused(bundle, policy), *arguments)
    assert result.returncode == 2 and not result.stdout
    assert why in result.stderr and result.stderr.count("\n") == 1
