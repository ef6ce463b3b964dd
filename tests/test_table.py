"""The table that layers read, larger than all else of such a model: it is never read as a whole."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_tokenizer
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_model
from gguf_models import tiny_model
from safetensors.torch import load_file, save_file
from test_sources import opened

from dash_onnx.core.contract import EMBED_PATH, TABLE_PATH
from dash_onnx.core.errors import SourceError
from dash_onnx.core.facts import Target
from dash_onnx.exporters.architectures import architecture_of
from dash_onnx.exporters.architectures.base import ModelSpec, PerLayer
from dash_onnx.exporters.calibration.reference import streamed_model
from dash_onnx.exporters.export import ExportOptions
from dash_onnx.exporters.export.sizes import Sizes, sizes_of
from dash_onnx.exporters.graphs import build_embed
from dash_onnx.exporters.quantize.blockwise import row_groups
from dash_onnx.exporters.sources import Source, Table, Weights
from dash_onnx.exporters.sources.source import Wrapped

NAME = "model.embed_tokens_per_layer.weight"
COLUMNS = 4 * 32
GROUP = (1 << 24) // COLUMNS  # rows that are in memory at once
ROWS = GROUP + 3
FILES = ("folder", "f16.gguf", "q8_0.gguf")


class Noted(Wrapped):
    """Weights that note how many rows of the table are read at once."""

    def __init__(self, weights: Weights):
        super().__init__(weights)
        self.read: list[int] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == NAME:
            self.read.append(self.shape(name)[0])
        return super().__getitem__(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read.append(stop - start)
        return super().rows(name, start, stop)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one model in several formats."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_model("gemma4_text", vocab_size_per_layer_input=ROWS)
    model.save_pretrained(folder / "folder")
    tiny_tokenizer().save_pretrained(folder / "folder")
    for kind in (Kind.F16, Kind.Q8_0):
        write_model(folder / f"{kind.name.lower()}.gguf", model, kind=kind)
    return folder


def parts_of(source: Source, weights: Weights) -> tuple[ModelSpec, torch.Tensor, PerLayer]:
    """What the graph of embeddings is built from."""
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    per_layer = family.per_layer(weights, spec)
    assert per_layer is not None
    return spec, family.embedding(weights, spec), per_layer


@pytest.mark.parametrize("rounded", [False, True], ids=["fp16", "int8"])
@pytest.mark.parametrize("file", FILES)
def test_parts_give_the_files_that_the_whole_table_gives(
    file: str, rounded: bool, models: Path, tmp_path: Path
) -> None:
    source = opened(models / file)
    weights, target = Noted(source.weights), Target("cpu", "float32", 32, 0)
    spec, embedding, per_layer = parts_of(source, weights)
    whole = replace(per_layer, table=source.weights[NAME])
    for name, one in (("parts", per_layer), ("whole", whole)):
        (tmp_path / name).mkdir()
        build_embed(tmp_path / name, embedding, spec, target, one, rounded)
    assert weights.read == [GROUP, ROWS - GROUP]
    for path in (EMBED_PATH, TABLE_PATH):
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()
    written = (tmp_path / "parts" / TABLE_PATH).read_bytes()
    if not rounded:
        assert written == source.weights[NAME].half().numpy().tobytes()
    else:
        assert len(written) == ROWS * COLUMNS * 9 // 8
        scales = source.weights[NAME].view(ROWS, -1, 32).abs().amax(-1) / 127
        assert written[ROWS * COLUMNS :] == scales.numpy().tobytes()


def test_a_value_beyond_fp16_in_the_last_part_makes_all_rows_fp32(
    models: Path, tmp_path: Path
) -> None:
    source = opened(models / "folder")
    spec, embedding, per_layer = parts_of(source, source.weights)
    table = source.weights[NAME]
    table[-1, -1] = 1e5
    target, one = Target("cpu", "float32", 32, 0), replace(per_layer, table=table)
    assert "per_layer.rows" in build_embed(tmp_path, embedding, spec, target, one)
    assert (tmp_path / TABLE_PATH).read_bytes() == table.numpy().tobytes()


def test_rows_that_were_read_leave_memory(models: Path) -> None:
    file = models / "f16.gguf"
    table = Table(opened(file).weights, NAME)
    before = resident_bytes(file)
    assert before > 0  # its header: the mappings are found
    assert sum(map(len, row_groups(table))) == ROWS  # 2 bytes of each value are in the file
    assert resident_bytes(file) - before < COLUMNS * ROWS


def resident_bytes(file: Path) -> int:
    """Memory that this process's mappings of a file hold.

    Source: proc_pid_smaps(5): a line per mapping that ends with its file, then its numbers.
    """
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = line.endswith(f" {file}")
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("file", ["folder", "f16.gguf"])
def test_transformers_gets_the_rows_of_the_tokens_that_it_is_compared_on(
    file: str, models: Path
) -> None:
    source, ids = opened(models / file), np.random.default_rng(3).integers(2, 300, (1, 30))
    noted = Noted(source.weights)
    model = streamed_model(replace(source, weights=noted))
    wanted = tiny_model("gemma4_text", vocab_size_per_layer_input=ROWS)
    with torch.inference_mode():
        for tokens in (ids, ids[:, :7]):
            read, expected = (one(torch.from_numpy(tokens)).logits for one in (model, wanted))
            torch.testing.assert_close(read, expected, atol=1e-5, rtol=0)
    assert noted.read == [1] * (len(np.unique(ids)) + len(np.unique(ids[:, :7])))


@pytest.mark.parametrize("file", ["folder", "tiny.gguf"])
def test_the_memory_of_an_export_does_not_grow_with_the_table(
    file: str, models: Path, tmp_path: Path
) -> None:
    model = tiny_model("gemma4_text")
    model.save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    write_model(tmp_path / "tiny.gguf", model, kind=Kind.F16)

    def sizes(path: Path) -> Sizes:
        return sizes_of(opened(path), ExportOptions(variants=("full",)))

    small, large = sizes(tmp_path / file), sizes(models / file.replace("tiny", "f16"))
    assert large.embedding - small.embedding == 2 * COLUMNS * (ROWS - TINY["vocab_size"])
    assert large.export == small.export


def test_a_table_that_is_missing_is_named(tmp_path: Path) -> None:
    model = tiny_model("gemma4_text")
    model.save_pretrained(tmp_path / "folder")
    tiny_tokenizer().save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    save_file({name: one for name, one in load_file(file).items() if name != NAME}, file)
    write_model(tmp_path / "tiny.gguf", model)
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(content.replace(b"per_layer_token_embd", b"x" * 20))
    for name in ("folder", "tiny.gguf"):
        source = opened(tmp_path / name)
        with pytest.raises(SourceError, match=f"no tensor .*{NAME}"):
            parts_of(source, source.weights)


def test_a_table_of_another_width_is_refused(models: Path) -> None:
    source = opened(models / "folder")
    family = architecture_of(source.config)
    spec = family.describe("", source.config, None)
    other = replace(spec, block=replace(spec.block, per_layer_width=64))
    with pytest.raises(SourceError, match=rf"shape \({ROWS}, 128\), the config asks for .* 256\)"):
        family.per_layer(source.weights, other)
