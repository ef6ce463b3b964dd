"""Text of Hugging Face datasets: local folders and caches, for tests reach no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_texts import CHAT, render

from dash_onnx.core.errors import SourceError
from dash_onnx.exporters.calibration.texts import TextSource, text_sources

CHARACTERS, PASSAGE = 100_000, 4_000


def source(spelling: str) -> TextSource:
    (found,) = text_sources([spelling])
    return found


def text(spelling: str, characters: int = CHARACTERS) -> str:
    return source(spelling).content.excerpt(render, characters, PASSAGE).text


def refusal(spelling: str) -> str:
    with pytest.raises(SourceError) as caught:
        text(spelling)
    message = str(caught.value)
    assert message.startswith(spelling) and "\n" not in message
    return message


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the columns of a split as parquet; the library's cache is a fresh one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(split: str = "train", **columns: list[Any]) -> Path:
        folder = tmp_path / "tales"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
        return folder

    return run


# What is read


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": ["one", "", None, "two"], "id": [1, 2, 3, 4]}, "one\n\ntwo"),
        ({"messages": [CHAT]}, "user:who?|assistant:the keeper"),
        ({"question": ["p", "q"], "answer": ["r", ""]}, "user:p|assistant:r"),
        ({"instruction": ["p"], "input": [""], "output": ["r"]}, "user:p|assistant:r"),
        ({"text": ["t"], "messages": [CHAT], "prompt": ["p"], "response": ["r"]}, "t"),
    ],
)
def test_the_columns_are_those_of_json_lines(
    dataset: Callable[..., Path], columns: dict[str, list[Any]], found: str
) -> None:
    """Rows without text are left out."""
    assert text(f"hub:{dataset(**columns)}") == found


def test_a_column_holds_texts_or_conversations(dataset: Callable[..., Path]) -> None:
    folder = dataset(text=["wrong"], story=["right"], chat=[CHAT])
    assert text(f"hub:{folder}:train:story") == "right"
    assert text(f"hub:{folder}::chat") == "user:who?|assistant:the keeper"


def test_the_split_is_train_or_the_only_one(dataset: Callable[..., Path]) -> None:
    folder = dataset("test", text=["tested"])
    assert text(f"hub:{folder}") == "tested"
    dataset("train", text=["trained"])
    assert text(f"hub:{folder}") == text(f"hub:{folder}:train") == "trained"
    assert text(f"hub:{folder}:test") == "tested"


def test_a_configuration_is_named_after_a_comma(dataset: Callable[..., Path]) -> None:
    folder = dataset("sea", text=["ships"])
    dataset("land", text=["towers"])
    configs = "".join(
        f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("sea", "land")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert text(f"hub:{folder},sea") == "ships"
    assert text(f"hub:{folder},land:train:text") == "towers"
    for wrong in ("", ",air"):
        message = refusal(f"hub:{folder}{wrong}")
        assert "sea" in message and "land" in message and "hub:DATASET[,CONFIG]" in message


def test_an_excerpt_is_spread_over_the_rows(dataset: Callable[..., Path]) -> None:
    folder = dataset(text=[f"row {number} and more" for number in range(30_000)])
    found = source(f"hub:{folder}").content.excerpt(render, 40_000, PASSAGE)
    numbers = [int(number) for number in re.findall(r"row (\d+) and more", found.text)]
    assert len(found.text) < 41_000
    assert numbers[0] == 0 and 24_000 < numbers[-1] < 30_000 and numbers == sorted(numbers)
    assert numbers[1] == 1  # rows that belong together stay so
    whole = sum(len(f"row {number} and more") for number in range(30_000))
    assert found.size == pytest.approx(whole, rel=0.05)


def test_rows_of_very_different_sizes_are_all_read_if_they_fit(
    dataset: Callable[..., Path],
) -> None:
    rows = [" ".join(map(str, range(20_000))), *(f"row {number}" for number in range(63))]
    found = text(f"hub:{dataset(text=rows)}", 262_144)
    assert found.split("\n\n") == rows
    assert 20_000 < len(text(f"hub:{dataset(text=rows)}", 40_000)) < 41_000


def test_a_long_row_is_read_all_over(dataset: Callable[..., Path]) -> None:
    folder = dataset(text=[" ".join(map(str, range(100_000)))])
    found = text(f"hub:{folder}", 20_000)
    assert len(found) < 21_000 and "80000" < found.split("\n\n")[-1].split()[1] < "99999"


def test_a_bundle_is_not_told_where_a_local_dataset_lies(dataset: Callable[..., Path]) -> None:
    folder = dataset(text=["one"])
    assert source(f"hub:{folder}:train@0.5").name == "hub:tales:train@0.5"
    assert source("hub:org/name,config:train:text@2").name == "hub:org/name,config:train:text@2"


def test_the_checksum_follows_the_dataset(dataset: Callable[..., Path]) -> None:
    folder = dataset(text=["one"], other=["two"])
    first = source(f"hub:{folder}").sha256()
    assert source(f"hub:{folder}").sha256() == first
    others = {source(f"hub:{folder}{more}").sha256() for more in (":train:other", "@2")}
    dataset(text=["another"], other=["two"])
    others.add(source(f"hub:{folder}").sha256())
    assert len({first, *others}) == 4


# What is refused


@pytest.mark.parametrize("spelling", ["hub:", "hub:,config", "hub:org/name:train:text:more"])
def test_another_spelling_is_told_the_form(spelling: str) -> None:
    assert "hub:DATASET[,CONFIG][:SPLIT[:COLUMN]]" in refusal(spelling)


@pytest.mark.parametrize("name", ["text", "nowhere", "/none/such", "a/b/c", "https://x/y"])
def test_what_is_no_folder_and_no_id_is_not_looked_for(name: str) -> None:
    """Not even `text`, by which the library means the text files of the current folder."""
    with pytest.raises(SourceError, match=r"neither a folder nor the id|not of the form"):
        text(f"hub:{name}")


def test_an_unknown_split_or_column_is_told_what_there_is(dataset: Callable[..., Path]) -> None:
    folder = dataset("train", story=["one"], number=[3])
    dataset("test", story=["two"], number=[4])
    assert "no split valid; it has train, test" in refusal(f"hub:{folder}:valid")
    assert "no column poem; it has story, number" in refusal(f"hub:{folder}:train:poem")
    assert "no column of a usual name; it has story, number" in refusal(f"hub:{folder}")
    assert "no text and no messages in number" in refusal(f"hub:{folder}:train:number")


def test_several_splits_without_train_are_not_guessed_from(dataset: Callable[..., Path]) -> None:
    folder = dataset("test", text=["one"])
    dataset("validation", text=["two"])
    assert "has no split train; it has validation, test" in refusal(f"hub:{folder}")


def test_a_dataset_without_text_is_refused(dataset: Callable[..., Path], tmp_path: Path) -> None:
    assert "holds no text" in refusal(f"hub:{dataset(text=['', None, '  '])}")
    (tmp_path / "empty").mkdir()
    assert "any data files" in refusal(f"hub:{tmp_path}/empty")


def test_a_damaged_file_is_one_line(
    dataset: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = dataset(text=["one"])
    (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be opened" in refusal(f"hub:{folder}")
    assert capfd.readouterr().err == ""


def test_the_code_of_a_dataset_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text("raise SystemExit('it ran')")
    assert "cannot be opened" in refusal(f"hub:{folder}")


def test_a_missing_library_is_told_with_the_extra_to_install(
    dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataset(text=["one"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(f"hub:{folder}")


def test_a_dataset_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(name: str, config: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist.\nSo.")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    assert "the hub has no dataset org/none, or it is gated or private" in refusal("hub:org/none")


# Offline


def offline(home: Path, spelling: str) -> subprocess.CompletedProcess[str]:
    """Reads a source in another process, since the libraries read the environment once."""
    code = (
        "import sys; from dash_onnx.exporters.calibration.texts import text_sources\n"
        "from dash_onnx.core.documents import plain\n"
        "(source,) = text_sources(sys.argv[1:])\n"
        "print(source.content.excerpt(plain, 1000, 100).text)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, spelling],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_librarys_cache_serves_offline(dataset: Callable[..., Path], tmp_path: Path) -> None:
    """As it lies after a dataset of the hub has been loaded once."""
    text(f"hub:{dataset(text=['kept'])}")
    (cached,) = (tmp_path / "cache").glob("tales/default/*/*/")
    place = tmp_path / "home/datasets/org___tales" / cached.relative_to(tmp_path / "cache/tales")
    shutil.copytree(cached, place)
    done = offline(tmp_path / "home", "hub:org/tales:train")
    assert (done.stdout, done.stderr) == ("kept\n", "")


def test_what_the_hub_client_downloaded_serves_offline(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    revision, place = "a" * 40, tmp_path / "home/hub/datasets--org--tales"
    shutil.copytree(dataset(text=["kept"]), place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(revision)
    done = offline(tmp_path / "home", "hub:org/tales:train:text")
    assert (done.stdout, done.stderr) == ("kept\n", "")


def test_offline_without_a_copy_is_one_line(tmp_path: Path) -> None:
    done = offline(tmp_path, "hub:org/tales")
    assert done.stderr.splitlines()[-1].endswith(
        "SourceError: hub:org/tales: HF_HUB_OFFLINE is set and the cache has no org/tales: go "
        "online once, or give a local folder"
    )
