"""Generation: steps, caches, threads, ends of text."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dash_onnx
from dash_onnx.core.arrays import Logits
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import ContextLengthError, DeviceError, PolicyError
from dash_onnx.runtime.backend import Backend
from dash_onnx.runtime.model import Model
from dash_onnx.runtime.sequence import SequenceState

PROMPT = list(range(10, 30))


def tokens(model: Model, ids: list[int], **options: object) -> list[int]:
    options = {"ignore_eos": True, "max_new_tokens": 12, **options}
    return [step.token for step in model.generate_step(ids, **options)]


@pytest.mark.parametrize("policy", ["full", "int8", "int4", "random:3", "static:full,skip,int4*2"])
def test_generation_equals_teacher_forcing_of_its_own_output(
    tiny_model: Model, policy: str
) -> None:
    out = tokens(tiny_model, PROMPT, policy=policy)
    scored = tiny_model.score(PROMPT + out[:-1], prompt_tokens=len(PROMPT), policy=policy)
    assert [int(token.logits.argmax()) for token in scored] == out[1:]


def test_steps_tell_path_and_time(tiny_model: Model) -> None:
    options = dash_onnx.GenerationOptions(
        policy="static:int4,skip*3", max_new_tokens=3, ignore_eos=True
    )
    steps = list(tiny_model.generate_step(PROMPT, options=options))
    assert steps[0].path == ("int4",) * 4  # the prefill gives the first token, and skips nothing
    assert all(step.path == ("int4", *["skip"] * 3) for step in steps[1:])
    assert all(step.ms > 0 for step in steps)
    assert [step.finish_reason for step in steps] == [None, None, "length"]


def test_prefill_precision_is_chosen(tiny_model: Model) -> None:
    step = next(tiny_model.generate_step(PROMPT, prefill="int8"))
    assert step.path == ("int8",) * 4
    with pytest.raises(PolicyError, match="prefill precision 'skip'"):
        next(tiny_model.generate_step(PROMPT, prefill="skip"))


def test_eos_ends_the_text(tiny_model: Model, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tokens(tiny_model, PROMPT, max_new_tokens=8)
    model = dash_onnx.load(tiny_bundle)
    model.text.eos_token_ids = frozenset({out[3]})
    steps = list(model.generate_step(PROMPT, max_new_tokens=8))
    assert len(steps) == out.index(out[3]) + 1
    assert steps[-1].finish_reason == "stop"


@pytest.mark.parametrize("speculate", [False, True])
def test_a_control_token_may_be_a_stop_string(tiny_model: Model, speculate: bool) -> None:
    """Text has none, so it would never be found there."""
    word, token = next(iter(tiny_model.text.control.items()))

    def only(_: Sequence[int], logits: Logits) -> Logits:
        return np.where(np.arange(len(logits)) == token, np.inf, logits)

    given: dict[str, Any] = {"max_new_tokens": 4, "ignore_eos": True, "logits_processor": only}
    assert tiny_model.generate("the", **given).finish_reason == "length"
    found = tiny_model.generate("the", stop=[word], speculate=speculate, **given)
    assert (found, found.finish_reason, found.generated_tokens) == ("", "stop", 1)


def test_context_end_is_a_stop_reason(tiny_model: Model) -> None:
    limit = tiny_model.manifest.model.max_length
    prompt = (PROMPT * 20)[: limit - 5]
    steps = list(tiny_model.generate_step(prompt, max_new_tokens=50, ignore_eos=True))
    assert len(steps) == 6  # five fill the context, the last is the prediction after it
    assert steps[-1].finish_reason == "context"
    whole = (PROMPT * 20)[:limit]
    assert [s.finish_reason for s in tiny_model.generate_step(whole)] == ["context"]


def test_a_prompt_longer_than_the_context_is_refused(tiny_model: Model) -> None:
    with pytest.raises(
        ContextLengthError, match="maximum context length is 256 tokens, the prompt has 257"
    ):
        next(tiny_model.generate_step((PROMPT * 20)[:257]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "is empty"), ([[1, 2]], "not a list"), ([5, 384], "0..383"), ([-1], "0..383")],
)
def test_bad_prompts_are_refused(tiny_model: Model, ids: list, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        tiny_model.logits(ids)


def test_a_cache_saves_the_common_prefix(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_model.new_cache()
    first = tokens(tiny_model, PROMPT, cache=cache, max_new_tokens=6)
    longer = [*PROMPT, *first, 40, 41]
    # All K/V of the first turn but the last token's, which was never run.
    assert len(cache) == len(PROMPT) + 5
    fresh = tokens(tiny_model, longer)
    runs: list[int] = []
    prefill = SequenceState.prefill

    def watched(self: SequenceState, ids: np.ndarray, *plan: Any) -> Any:
        runs.append(len(ids))
        return prefill(self, ids, *plan)

    monkeypatch.setattr(SequenceState, "prefill", watched)
    assert tokens(tiny_model, longer, cache=cache) == fresh
    assert runs == [len(longer) - len(PROMPT) - 5]


def test_a_cache_forgets_what_differs(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    tokens(tiny_model, PROMPT, cache=cache)
    other = [*PROMPT[:7], 99, 98, 97]
    assert tokens(tiny_model, other, cache=cache) == tokens(tiny_model, other)


def test_the_same_prompt_again_gives_the_same_text(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    assert tokens(tiny_model, PROMPT, cache=cache) == tokens(tiny_model, PROMPT, cache=cache)


def test_an_abandoned_generation_leaves_its_cache_usable(tiny_model: Model) -> None:
    cache = tiny_model.new_cache()
    running = tiny_model.generate_step(PROMPT, cache=cache, ignore_eos=True)
    next(running)
    next(running)
    with pytest.raises(dash_onnx.DashError, match="in use"):
        next(tiny_model.generate_step(PROMPT, cache=cache))
    running.close()
    assert tokens(tiny_model, PROMPT, cache=cache) == tokens(tiny_model, PROMPT)


def test_generations_of_one_model_do_not_share_state(tiny_model: Model) -> None:
    other = [*PROMPT[::-1]]
    alone = [tokens(tiny_model, ids) for ids in (PROMPT, other)]
    pair = [
        tiny_model.generate_step(ids, ignore_eos=True, max_new_tokens=12) for ids in (PROMPT, other)
    ]
    mixed: list[list[int]] = [[], []]
    for a, b in zip(*pair, strict=True):
        mixed[0].append(a.token)
        mixed[1].append(b.token)
    assert mixed == alone


def test_threads_may_generate_at_once(tiny_bundle: Path) -> None:
    model = dash_onnx.load(tiny_bundle)  # sessions load lazily, from both threads
    policies = ["full", "int4", "random:1", "int8"]
    alone = {p: tokens(dash_onnx.load(tiny_bundle), PROMPT, policy=p) for p in policies}
    results: dict[str, list[list[int]]] = {p: [] for p in policies}

    def work(policy: str) -> None:
        for _ in range(5):
            results[policy].append(tokens(model, PROMPT, policy=policy))

    threads = [threading.Thread(target=work, args=(p,)) for p in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {p: [alone[p]] * 5 for p in policies}


def test_each_session_exists_once(tiny_bundle: Path) -> None:
    created: list[Path] = []

    class Counting(Backend):
        def session(self, graph: Path | bytes, *, scorer: bool = False, **options: Any) -> Any:
            if isinstance(graph, Path):
                created.append(graph)
            return super().session(graph, scorer=scorer, **options)

    model = Model(Bundle(tiny_bundle), Counting())
    tokens(model, PROMPT, policy="int8", prefill="int8")
    names = {path.relative_to(tiny_bundle).as_posix() for path in created}
    # Lazily: nothing of another precision was loaded.
    layers = {f"layers/{i:02d}/int8.onnx" for i in range(4)}  # which run as one graph
    assert names == {"embed.onnx", "head/int8.onnx"} and model.loaded == names | layers
    model.preload()
    tokens(model, PROMPT, policy="random")
    assert len(created) == len(set(created)) == 1 + 3 + 4 * 4


def test_a_policy_with_budgets_has_that_of_the_model(scored_folder: Path) -> None:
    with dash_onnx.load(scored_folder, budget="fast") as model:
        fast = model.policy("dash", "fast")
        assert model.policy().budget == model.policy("dash").budget == fast.budget
        assert model.policy("dash", "quality").budget != fast.budget
        assert model.policy("int8").budget is None


def test_a_policy_of_another_bundle_needs_its_graphs(
    tiny_model: Model, tiny_with: Callable[..., Path]
) -> None:
    with dash_onnx.load(tiny_with(variants=("int8", "int4"))) as model:
        assert tokens(model, PROMPT, policy=tiny_model.policy("int8"))
        with pytest.raises(PolicyError, match="full"):
            tokens(model, PROMPT, policy=tiny_model.policy("full"))


def test_random_policies_differ_by_seed_only(tiny_model: Model) -> None:
    assert tokens(tiny_model, PROMPT, policy="random:1") == tokens(
        tiny_model, PROMPT, policy="random:1"
    )
    paths = [
        [s.path for s in islice(tiny_model.generate_step(PROMPT, policy=f"random:{seed}"), 6)]
        for seed in (1, 2)
    ]
    assert paths[0] != paths[1]


def test_text_and_chat(tiny_model: Model) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 5}
    chunks = list(tiny_model.stream("the keeper", **options))
    assert "".join(chunk.text for chunk in chunks) == tiny_model.generate("the keeper", **options)
    assert chunks[-1].generated_tokens == len(chunks)
    assert chunks[0].prompt_tokens == len(tiny_model.text.encode("the keeper"))
    messages = [{"role": "user", "content": "the ships"}]
    rendered = tiny_model.text.render_chat(messages)
    assert rendered == "<s>user\nthe ships</s>\n<s>assistant\n"
    assert tiny_model.chat(messages, **options) == tiny_model.generate(rendered, **options)


def test_sampling_with_a_seed_repeats(tiny_model: Model) -> None:
    draw = [
        tokens(tiny_model, PROMPT, temperature=1.5, seed=seed, max_new_tokens=20)
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_a_bundle_for_another_device_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    manifest = copy / "dash.json"
    manifest.write_text(manifest.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(DeviceError, match="exported for device 'cuda'"):
        dash_onnx.load(copy)


def test_logits_are_rows_of_float32(tiny_model: Model) -> None:
    for policy in ("full", "random:2"):
        logits = tiny_model.logits(PROMPT, policy=policy)
        assert logits.shape == (len(PROMPT), 384)
        assert logits.dtype == np.float32
