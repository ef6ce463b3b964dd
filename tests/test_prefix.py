"""K/V that outlive their sequence: taken up again, by their own bundle alone."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from scored_bundle import with_scorer

import dash_onnx
from dash_onnx.core.errors import BundleError, DashError, SourceError
from dash_onnx.core.manifest import Manifest
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.prefix import PrefixStore, Saved, identity_of
from dash_onnx.runtime.results import Chunk
from dash_onnx.runtime.sequence import SequenceState

FIRST = "the keeper of the lighthouse counts the ships that pass in the night " * 5
SECOND = "a keeper counts other ships, and writes what they are called in a book " * 3
OPTIONS = GenerationOptions(
    policy="int8", max_new_tokens=12, ignore_eos=True, speculate=False
)  # passes of several tokens are counted


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Length of every part of a prompt that runs."""
    found: list[int] = []
    layers = SequenceState.layers

    def watched(state: SequenceState, tokens: Any, decider: Any) -> Any:
        if not isinstance(tokens, int):
            found.append(tokens.shape[-1])
        return layers(state, tokens, decider)

    monkeypatch.setattr(SequenceState, "layers", watched)
    return found


def answer(model: Model, store: PrefixStore | None, *prompts: str) -> list[str]:
    """One after the other, in a batch of one row."""
    batch, texts = model.new_scheduler(1, store), []
    for prompt in prompts:
        chunks: list[Any] = []
        batch.submit(model.request(prompt, chunks.append, OPTIONS))
        while batch.step():
            pass
        texts.append("".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)))
    batch.save()
    return texts


def test_a_text_that_comes_again_runs_only_what_is_new(tiny_model: Model, ran: list[int]) -> None:
    store = PrefixStore(tiny_model.manifest, 1 << 30)
    found = answer(tiny_model, store, FIRST, SECOND, FIRST + "again")
    lengths = [len(tiny_model.text.encode(text)) for text in (FIRST, SECOND)]
    assert sum(ran[:2]) == sum(lengths)
    assert sum(ran[2:]) < 10  # what `again` adds, and the last token before it
    wanted = [
        tiny_model.generate(text, options=OPTIONS) for text in (FIRST, SECOND, FIRST + "again")
    ]
    assert found == wanted


def test_a_text_serves_only_prompts_that_run_as_it_did(tiny_model: Model, ran: list[int]) -> None:
    store = PrefixStore(tiny_model.manifest, 1 << 30)
    batch = tiny_model.new_scheduler(2, store)
    found = []
    for policy in ("int4", "int8", "int4"):
        options = dataclasses.replace(OPTIONS, policy=policy)
        batch.submit(tiny_model.request(FIRST, lambda chunk: None, options))
        while batch.step():
            pass
        found.append(sum(ran))
    length = len(tiny_model.text.encode(FIRST))
    assert found == [length, 2 * length, 2 * length + 1]


def test_a_folder_keeps_them_for_the_next_process(
    tiny_model: Model, tmp_path: Path, ran: list[int]
) -> None:
    store = PrefixStore(tiny_model.manifest, 1 << 30, tmp_path)
    answer(tiny_model, store, FIRST)
    (folder,) = tmp_path.iterdir()
    (folder / ("0" * 32 + ".safetensors")).write_bytes(b"damaged")  # warned of, and left out
    (folder / "notes.txt").write_text("not ours")
    again = PrefixStore(tiny_model.manifest, 1 << 30, tmp_path)
    assert len(again) == 1
    ran.clear()
    (found,) = answer(tiny_model, again, FIRST)
    assert sum(ran) == 1
    assert found == tiny_model.generate(FIRST, options=OPTIONS)
    assert (folder / "notes.txt").is_file()


def test_nobody_waits_for_a_file(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), Saved.write

    def slow(saved: Saved, path: Path, manifest: Manifest) -> None:
        assert may_write.wait(60)
        write(saved, path, manifest)

    monkeypatch.setattr(Saved, "write", slow)
    store = PrefixStore(tiny_model.manifest, 1 << 30, tmp_path)
    batch = tiny_model.new_scheduler(1, store)
    for prompt in (FIRST, SECOND, FIRST):
        batch.submit(tiny_model.request(prompt, lambda chunk: None, OPTIONS))
        while batch.step():
            pass
    assert not [*tmp_path.rglob("*.safetensors")]
    may_write.set()
    batch.save()
    assert len([*tmp_path.rglob("*.safetensors")]) == len(store) == 2


def test_a_folder_that_cannot_be_is_refused_in_one_line(tiny_model: Model, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(BundleError, match="choose another folder"):
        PrefixStore(tiny_model.manifest, 1 << 30, file)


def test_the_oldest_go_when_there_is_no_room(tiny_model: Model, tmp_path: Path) -> None:
    store = PrefixStore(tiny_model.manifest, 1 << 30, tmp_path)
    answer(tiny_model, store, FIRST)
    (file,) = tmp_path.rglob("*.safetensors")
    first, second = (len(tiny_model.text.encode(text)) for text in (FIRST, SECOND))
    room = file.stat().st_size * (second + first // 2) // first  # for the second, not for both
    small = PrefixStore(tiny_model.manifest, room, tmp_path)
    answer(tiny_model, small, SECOND)
    (left,) = tmp_path.rglob("*.safetensors")
    assert left != file and len(small) == 1
    assert len(PrefixStore(tiny_model.manifest, 0, tmp_path)) == 0
    none = PrefixStore(tiny_model.manifest, 0)
    assert answer(tiny_model, none, FIRST, SECOND, FIRST)[0] and len(none) == 0


def test_a_text_without_room_leaves_the_others(tiny_model: Model, tmp_path: Path) -> None:
    store = PrefixStore(tiny_model.manifest, 1 << 30, tmp_path)
    answer(tiny_model, store, FIRST)
    (file,) = tmp_path.rglob("*.safetensors")
    small = PrefixStore(tiny_model.manifest, file.stat().st_size, tmp_path)
    answer(tiny_model, small, FIRST + SECOND)
    assert [*tmp_path.rglob("*.safetensors")] == [file] and len(small) == 1


def test_a_cache_is_taken_up_from_its_file(
    tiny_model: Model, tmp_path: Path, ran: list[int]
) -> None:
    cache, other, file = tiny_model.new_cache(), tiny_model.new_cache(), tmp_path / "talk"
    with pytest.raises(DashError, match="nothing"):
        cache.save(file)
    text = tiny_model.generate(FIRST, options=OPTIONS, cache=cache)
    cache.save(file, {"title": "ships"})
    assert other.load(file)["title"] == "ships"
    assert (other.tokens, len(other)) == (cache.tokens, len(cache))
    ran.clear()
    assert tiny_model.generate(FIRST, options=OPTIONS, cache=other) == text
    assert sum(ran) == 1


def test_a_file_is_of_the_layers_that_wrote_it(
    tiny_bundle: Path, tiny_with: Any, tiny_model: Model, tmp_path: Path
) -> None:
    file = tmp_path / "talk"
    sequence = tiny_model.new_sequence()
    ids = tiny_model.text.encode(FIRST)
    sequence.prefill(ids, ("int8",) * 4, "int8")
    Saved.of(sequence, ids.tolist()).write(file, tiny_model.manifest)
    trained = with_scorer(Path(shutil.copytree(tiny_bundle, tmp_path / "trained")))
    with dash_onnx.load(trained) as model:
        assert identity_of(model.manifest) == identity_of(tiny_model.manifest)
        saved, _ = Saved.read(file, model.manifest)
        np.testing.assert_array_equal(saved.tokens, ids)
    with dash_onnx.load(tiny_with(kv_cache="int8")) as model:
        with pytest.raises(SourceError, match="another bundle"):
            Saved.read(file, model.manifest)
        assert answer(model, PrefixStore(model.manifest, 1 << 30), FIRST, SECOND, FIRST)


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_the_old_one(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    cache = tiny_model.new_cache()
    tiny_model.generate(FIRST, options=OPTIONS, cache=cache)
    cache.save(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(BundleError, match=f"cannot write {path}: I/O error: No space left"):
        cache.save(path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_a_full_context_is_taken_up_from_its_file(tiny_model: Model, tmp_path: Path) -> None:
    cache, other, file = tiny_model.new_cache(), tiny_model.new_cache(), tmp_path / "talk"
    *_, last = tiny_model.generate_step(
        [3, 4, 5], max_new_tokens=1000, ignore_eos=True, cache=cache
    )
    assert last.finish_reason == "context" and len(cache) == tiny_model.manifest.model.max_length
    cache.save(file)
    other.load(file)
    assert other.tokens == cache.tokens


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file_is_refused_in_one_line(cut: int, tiny_model: Model, tmp_path: Path) -> None:
    cache, file = tiny_model.new_cache(), tmp_path / "talk"
    tiny_model.generate(FIRST, options=OPTIONS, cache=cache)
    cache.save(file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(SourceError) as error:
        cache.load(file)
    assert "\n" not in str(error.value)
    assert tiny_model.generate(FIRST, options=OPTIONS, cache=cache)  # as it was
    with pytest.raises(SourceError, match="cannot read"):
        cache.load(tmp_path / "missing")


def test_what_a_file_claims_is_checked(tiny_model: Model, tmp_path: Path) -> None:
    cache, file = tiny_model.new_cache(), tmp_path / "talk"
    tiny_model.generate(FIRST, options=OPTIONS, cache=cache)
    cache.save(file)
    saved, _ = Saved.read(file, tiny_model.manifest)
    whole, name = saved.arrays["keys.0"], "keys.0"
    for tokens, array in (
        (saved.tokens, whole[:, :-1]),
        (saved.tokens, whole.astype(np.float16)),
        (saved.tokens + 1000, whole),
        (saved.tokens[:0], whole),
        (saved.tokens.astype(np.int32), whole),
    ):
        Saved(tokens, {**saved.arrays, name: np.ascontiguousarray(array)}).write(
            file, tiny_model.manifest
        )
        with pytest.raises(SourceError, match="does not hold"):
            Saved.read(file, tiny_model.manifest)
