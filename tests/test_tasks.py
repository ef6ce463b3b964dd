"""Tasks of lm-evaluation-harness on a bundle, scored token by token under a policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tool import Capture, Tool
from lm_eval import tasks as harness
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from dash_onnx.cli.eval import main
from dash_onnx.core.errors import ContextLengthError, DashError, SourceError
from dash_onnx.core.statistics import log_softmax
from dash_onnx.eval.model import DashLM
from dash_onnx.eval.tasks import evaluate_task, json_lines_task
from dash_onnx.runtime.drafts import DraftStats
from dash_onnx.runtime.model import Model

TOOL = Tool("dash-eval", main)
CONTEXT = "the keeper of the lighthouse counts"
CHOICES = (" ships", " the ships that pass", " 42")
LAMBADA = {"text": "the keeper of the lighthouse counts ships"}
HELLASWAG = {
    "activity_label": "Rowing",
    "ctx": "A man [title] sits. he",
    "ctx_a": "A man [title] sits.",
    "ctx_b": "he",
    "endings": ["rows  on", "o[x] ff"],
    "label": "1",
}
ARC = {
    "question": "What passes?",
    "choices": {"text": ["ships", "light"], "label": ["A", "B"]},
    "answerKey": "B",
}


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def requests(task: ConfigurableTask) -> list[tuple[Any, ...]]:
    """What a task asks a model."""
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Requests as the harness makes them."""
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def figures(model: DashLM, path: Path) -> dict[str, Any]:
    """Of the only task of a file."""
    (found,) = evaluate_task(model, str(path))["results"].values()
    return found


# Files


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"context": "a b ", "continuation": "c d"}, [("a b", " c d")]),
        ({"text": "a b c"}, [("a b", " c")]),
        ({"text": "a b c \n"}, [("a b", " c")]),
        ({"text": "one line\u2028still"}, [("one", " line\u2028still")]),
        (ARC, [("Question: What passes?\nAnswer:", x) for x in (" ships", " light")]),
        (HELLASWAG, [("Rowing: A man. sits. He", x) for x in (" rows on", " o ff")]),
        (
            {key: HELLASWAG[key] for key in ("activity_label", "ctx", "endings", "label")},
            [("Rowing: A man. sits. he", x) for x in (" rows on", " o ff")],
        ),
        ({"prompt": "2 + 2 =", "answer": 4}, [("2 + 2 =", {"until": [], "max_gen_toks": 9})]),
    ],
)
def test_every_form_becomes_requests(
    record: dict[str, Any], wanted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    assert requests(json_lines_task(written(tmp_path / "t.jsonl", record))) == wanted


@pytest.mark.parametrize(
    ("yaml", "split", "record"),
    [
        ("lambada/lambada_openai.yaml", "test", LAMBADA),
        ("hellaswag/hellaswag.yaml", "validation", HELLASWAG),
        ("arc/arc_easy.yaml", "test", ARC),
    ],
)
def test_prompts_answers_and_figures_are_those_of_the_harness(
    yaml: str, split: str, record: dict[str, Any], tiny_model: Model, tmp_path: Path
) -> None:
    path = written(tmp_path / "t.jsonl", record, record)
    splits = ("training", "validation", "test")
    config = {
        "include": str(Path(harness.__file__).parent / yaml),
        "task": "theirs",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path)}, "cache_dir": str(tmp_path)},
        **{f"{name}_split": name if name == split else None for name in splits},
    }
    theirs = written(tmp_path / "theirs.yaml", config)  # JSON is YAML
    task = TaskManager(include_defaults=False).load([str(theirs)])["tasks"]["theirs"]
    assert requests(json_lines_task(path)) == requests(task)
    model = DashLM(tiny_model, "int8")
    found, wanted = figures(model, path), figures(model, theirs)
    assert found.keys() == wanted.keys()
    for metric in found.keys() - {"name", "alias"}:
        # The second run finds the context in the cache: other sums, rounded otherwise.
        assert found[metric] == pytest.approx(wanted[metric], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\n",
        "{",
        "[]",
        '{"text": "word"}',
        '{"text": "\\ud800 word"}',
        '{"prompt": "a"}',
        '{"prompt": 3, "answer": "a"}',
        '{"endings": []}',
        '{"activity_label": "a", "ctx": "b", "endings": [], "label": 0}',
        '{"activity_label": "a", "ctx": "b", "endings": ["c"], "label": 1}',
        '{"activity_label": "a", "ctx": "b", "endings": ["c", ""], "label": 0}',
        '{"context": "", "continuation": "x"}',
        '{"context": "a", "continuation": " \\n"}',
        '{"text": "word "}',
        '{"prompt": "a", "answer": " "}',
        '{"text": "a b"}\n{"prompt": "a", "answer": "b"}',
    ],
)
def test_a_line_of_another_form_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError) as caught:
        json_lines_task(path)
    assert "\n" not in str(caught.value)


def test_lines_beyond_the_first_so_many_are_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", LAMBADA, LAMBADA, {})
    assert len(requests(json_lines_task(path, 2))) == 2


# The model


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> HFLM:
    """The tiny model in the harness's own class."""
    return HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def full(tiny_model: Model) -> DashLM:
    """The tiny bundle in the highest precision."""
    return DashLM(tiny_model, "full")


LONG = "the ships that pass in the night " * 60  # longer than the context


def test_log_likelihoods_are_those_of_the_harness_own_model(full: DashLM, theirs: HFLM) -> None:
    pairs = [
        *((CONTEXT, choice) for choice in CHOICES),
        (CONTEXT + "  ", "ships"),  # spaces go to the choice
        ("the li", "ghthouse counts the ships that pass"),  # a token across the border
        ("", "the ships"),
        ("<s>the keeper", " counts"),
        (LONG, " the ships"),
    ]
    before = full.truncated
    found = full.loglikelihood(asked("loglikelihood", *pairs))
    wanted = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], rel=1e-4)
    assert full.truncated == before + 1


def test_what_the_model_would_say_is_greedy(full: DashLM, theirs: HFLM) -> None:
    pairs = []
    for end in range(1, len(CONTEXT)):
        context = (CONTEXT[:end], {"max_gen_toks": 1})
        pairs.append((CONTEXT[:end], full.generate_until(asked("generate_until", context))[0]))
    # As text, most of what a random model says becomes other tokens.
    same = [(a, b) for a, b in pairs if len(full.tok_encode(a + b)) == len(full.tok_encode(a)) + 1]
    for model in (full, theirs):
        assert any(greedy for _, greedy in model.loglikelihood(asked("loglikelihood", *same)))


def test_whole_texts_are_those_of_the_harness_own_model(full: DashLM, theirs: HFLM) -> None:
    texts = [(CONTEXT,), (LONG,)]
    found = full.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    wanted = theirs.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_answers_are_those_of_the_harness_own_model(full: DashLM, theirs: HFLM) -> None:
    (free,) = full.generate_until(asked("generate_until", (CONTEXT, {"max_gen_toks": 20})))
    options = [
        {"max_gen_toks": 20},
        {"max_gen_toks": 20, "until": [free[5:8], "never"]},
        {"max_new_tokens": 3, "until": [], "do_sample": False, "temperature": 1.0},
    ]
    given = asked("generate_until", *((CONTEXT, each) for each in options), (LONG, options[0]))
    found = full.generate_until(given)
    assert found == theirs.generate_until(given, disable_tqdm=True)
    assert found[0] == free and free.startswith(found[1]) and len(found[1]) <= 5


def test_drafted_answers_are_the_same(full: DashLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked("generate_until", (CONTEXT, {"max_gen_toks": 150}))
    drafting = DashLM(full.model, "full", speculate=True)
    drafts, steps = [], Model.generate_step

    def noting(*arguments: Any, **options: Any) -> Any:
        for step in steps(*arguments, **options):
            drafts.append(step.draft)
            yield step

    monkeypatch.setattr(Model, "generate_step", noting)
    monkeypatch.setattr(DraftStats, "cost", lambda *_: 1.0)  # what drafts cost here is not asked
    assert drafting.generate_until(given) == full.generate_until(given)
    assert any(drafts)


def test_sampling_is_passed_on(full: DashLM) -> None:
    options = {"max_gen_toks": 20, "do_sample": True, "temperature": 5.0, "seed": 1}
    given = asked("generate_until", (CONTEXT, options), (CONTEXT, {**options, "top_k": 1}))
    hot, greedy = full.generate_until(given)
    (wanted,) = full.generate_until(asked("generate_until", (CONTEXT, {"max_gen_toks": 20})))
    assert greedy == wanted != hot


def test_an_answer_longer_than_the_context_is_refused(full: DashLM) -> None:
    with pytest.raises(ContextLengthError, match="max_gen_toks=256 leaves no room"):
        full.generate_until(asked("generate_until", (CONTEXT, {})))


def test_a_chat_is_rendered_by_the_bundle(full: DashLM, theirs: HFLM) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    for history, answer_next in ((chat[:1], True), (chat, False)):
        text = full.apply_chat_template(history, answer_next)
        assert text == theirs.apply_chat_template(history, answer_next)
        assert full.tok_encode(text) == theirs.tok_encode(text)
    assert full.chat_template(True) == theirs.chat_template(True)


def test_the_context_is_prefilled_and_the_rest_decoded_under_the_policy(tiny_model: Model) -> None:
    policy = tiny_model.policy("static:full,int4,skip,full")
    model = DashLM(tiny_model, policy)
    ((found, _),) = model.loglikelihood(asked("loglikelihood", (CONTEXT, CHOICES[1])))
    context = tiny_model.text.encode(CONTEXT).tolist()
    ids = tiny_model.text.encode(CONTEXT + CHOICES[1]).tolist()
    total = 0.0
    for end in range(len(context), len(ids)):  # each token from a run of its own
        steps = tiny_model.score(ids[:end], prompt_tokens=len(context) - 1, policy=policy)
        *_, last = (log_softmax(step.logits)[ids[end]] for step in steps)
        total += last
    assert found == pytest.approx(total, rel=1e-6)
    path = ("full", "int4", "skip", "full")
    assert model.get_model_info() == {
        "policy": "static",
        "cost_ms": pytest.approx(policy.cost_ms(path, tiny_model.manifest.costs)),
        "truncated": 0,
    }


def test_the_choices_share_the_cache_of_their_context(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches, score = [], Model.score

    def noting(*arguments: Any, cache: Any, **options: Any) -> Any:
        caches.append(cache)
        return score(*arguments, cache=cache, **options)

    monkeypatch.setattr(Model, "score", noting)
    pairs = [(CONTEXT, choice) for choice in CHOICES]
    DashLM(tiny_model, "int8").loglikelihood(asked("loglikelihood", *pairs))
    assert len(caches) == 3 and all(cache is caches[0] for cache in caches)
    assert len(caches[0]) == len(tiny_model.text.encode(CONTEXT)) - 1


def test_the_harness_finds_the_model_by_its_name(tiny_bundle: Path) -> None:
    arguments = {"bundle": str(tiny_bundle), "policy": "random:3"}
    model = get_model("dash").create_from_arg_obj(arguments, {"device": "cuda:0", "batch_size": 1})
    assert isinstance(model, DashLM) and model.policy.name == "random:3"
    with pytest.raises(DashError, match="polcy"):
        get_model("dash").create_from_arg_obj({"bundle": str(tiny_bundle), "polcy": "int8"})


@pytest.mark.slow
def test_the_command_of_the_harness_runs_it(tiny_bundle: Path, tmp_path: Path) -> None:
    files = {"test": str(written(tmp_path / "arc.jsonl", ARC, ARC))}
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
    }
    (tmp_path / "ours.yaml").write_text(json.dumps(task))

    def lm_eval(policy: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "dash_onnx.eval",
            "--model",
            "dash",
            "--tasks",
            "ours.yaml",
        ]
        arguments = ["--model_args", f"bundle={tiny_bundle},policy={policy}"]
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    done = lm_eval("int8")
    assert done.returncode == 0, done.stderr
    assert "|acc " in done.stdout and "policy" in done.stdout
    done = lm_eval("nine")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lm_eval: error: unknown policy 'nine'")


@pytest.mark.parametrize(("given", "told"), [({}, "bundle=FOLDER is missing"), ({"foo": 1}, "foo")])
def test_wrong_model_arguments_are_told(given: Any, told: str, tiny_model: Model) -> None:
    with pytest.raises(DashError, match=f"{told}.*known are bundle, policy"):
        DashLM(**given, **({"bundle": tiny_model} if given else {}))


# Scores


@pytest.mark.parametrize("policy", ["full", "int8"])
def test_the_most_likely_choice_is_right(policy: str, tiny_model: Model, tmp_path: Path) -> None:
    model = DashLM(tiny_model, policy)
    context = "Question: What passes?\nAnswer:"
    texts = ["ships", "the ships that pass", "42"]
    pairs = [(context, " " + text) for text in texts]
    totals = [total for total, _ in model.loglikelihood(asked("loglikelihood", *pairs))]
    best = int(np.argmax(totals))
    by_length = int(np.argmax(np.divide(totals, [len(text) for text in texts])))
    choices = {"text": texts, "label": ["A", "B", "C"]}
    items = [{**ARC, "choices": choices, "answerKey": key} for key in "ABC"]
    for answer, item in enumerate(items):
        found = figures(model, written(tmp_path / "t.jsonl", item))
        assert found["acc,none"] == (answer == best)
        assert found["acc_norm,none"] == (answer == by_length)
    found = figures(model, written(tmp_path / "t.jsonl", *items))
    for metric in ("acc", "acc_norm"):
        assert found[f"{metric},none"] == pytest.approx(1 / 3)
        assert found[f"{metric}_stderr,none"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert found["sample_len"] == 3


def test_free_answers_are_compared_exactly(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "t.jsonl", *[{"prompt": CONTEXT, "answer": 4}] * 5)
    answers = ["4.", " 4", "42", "44 and 4", "no such answer"]
    monkeypatch.setattr(DashLM, "generate_until", lambda *_: answers)
    assert figures(DashLM(tiny_model), path)["exact_match,none"] == pytest.approx(0.4)


@pytest.mark.parametrize("total", [-400.0, -800.0])
def test_a_perplexity_that_is_no_finite_number_is_left_out(
    total: float,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    path = written(tmp_path / "t.jsonl", *[LAMBADA] * 4)
    scores = [(-2.0, True), (-4.0, False), (-2.0, True), (-4.0, True)]
    monkeypatch.setattr(DashLM, "loglikelihood", lambda *_: scores)
    found = TOOL.json_of(capsys, tiny_bundle, "--task", path)["results"]["t"]
    assert found["perplexity,none"] == pytest.approx(np.exp(3))
    assert found["perplexity_stderr,none"] > 0
    scores[1:3] = [(total, False), (total * 3, True)]
    found = TOOL.json_of(capsys, tiny_bundle, "--task", path)["results"]["t"]
    assert found["acc,none"] == 0.75 and found["acc_stderr,none"] > 0
    assert not {"perplexity,none", "perplexity_stderr,none"} & found.keys()
    assert TOOL.run(tiny_bundle, "--task", path) == 0
    assert "perplexity" not in capsys.readouterr().out


def described(data: Path, name: str, output_type: str, **fields: str) -> Path:
    """A task of the harness about a file of JSON lines, in a YAML file beside it."""
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent)},
        "test_split": "test",
        "output_type": output_type,
        **fields,
    }
    return written(data.with_name(f"{name}.yaml"), config)  # JSON is YAML


def test_a_figure_that_overflows_is_left_out_alone(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The perplexity per word of a text without spaces."""
    data = written(tmp_path / "t.jsonl", {"text": "\u5b57" * 400})
    task = described(
        data, "rolling", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"
    )
    monkeypatch.setattr(DashLM, "loglikelihood_rolling", lambda *_: [-900.0])
    found = TOOL.json_of(capsys, tiny_bundle, "--task", task)["results"]["rolling"]
    assert found["bits_per_byte,none"] == pytest.approx(900 / 1200 / np.log(2))
    assert "byte_perplexity,none" in found and "word_perplexity,none" not in found


def test_a_record_that_a_task_cannot_use_is_one_line(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    records = [{"country": "France", "capital": "Paris", "cities": ["Paris", "Rome"]}] * 2
    records[1] = {**records[1], "capital": "Lyon"}
    data = written(tmp_path / "data.jsonl", *records)
    task = described(
        data,
        "capitals",
        "multiple_choice",
        doc_to_text="{{country}}:",
        doc_to_choice="{{cities}}",
        doc_to_target="{{cities.index(capital)}}",
    )
    assert "fails on its data" in TOOL.refused(capsys, tiny_bundle, "--task", task)


# The command


def test_the_command_scores_a_file(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "arc.jsonl", ARC, ARC, ARC)
    found = TOOL.json_of(capsys, tiny_bundle, "--task", path, "--limit", 2, "--policy", "int4")
    assert found["policy"] == "int4" and found["cost_ms"] > 0 and found["truncated"] == 0
    assert found["results"]["arc"]["sample_len"] == 2
    assert found["results"]["arc"].keys() >= {"acc,none", "acc_stderr,none", "acc_norm,none"}
    assert TOOL.run(tiny_bundle, "--task", path, "--policy", "full") == 0
    shown = capsys.readouterr()
    assert "acc_norm" in shown.out and "ms per decoded token" in shown.out
    begun, *others = shown.err.splitlines()
    assert begun == "dash-eval: requests: starts, 6 steps"  # three questions of two choices
    assert others and all(line.startswith("dash-eval: requests: ") for line in others)
    path.write_text("{}")
    assert "is not an item of" in TOOL.refused(capsys, tiny_bundle, "--task", path)


def test_the_command_generates(tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path / "exact.jsonl", {"prompt": LONG, "answer": "ships"})
    found = TOOL.json_of(capsys, tiny_bundle, "--task", path, "--policy", "int4")
    assert found["results"]["exact"]["exact_match,none"] in (0, 1)
    assert found["cost_ms"] > 0 and found["truncated"] == 1


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("nowhere.yaml", "cannot load task 'nowhere.yaml': "),
        ("broken.yaml", "cannot load task"),
        ("unsafe.yaml", "runs the model's code"),
    ],
)
def test_a_task_that_cannot_run_is_refused(
    task: str,
    message: str,
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = {"task": "a", "dataset_path": "json", "test_split": "test", "doc_to_text": "text"}
    files = {"test": str(written(tmp_path / "t.jsonl", LAMBADA))}
    kwargs = {"data_files": files, "cache_dir": str(tmp_path)}
    unsafe = {**broken, "doc_to_target": "text", "unsafe_code": True, "dataset_kwargs": kwargs}
    written(tmp_path / "broken.yaml", broken)
    written(tmp_path / "unsafe.yaml", unsafe)
    assert message in TOOL.refused(capsys, tiny_bundle, "--task", task)


@pytest.mark.slow
def test_a_name_that_the_harness_does_not_know_is_refused(
    tiny_bundle: Path, capsys: Capture
) -> None:
    assert "'no-such-task'" in TOOL.refused(capsys, tiny_bundle, "--task", "no-such-task")


def test_a_missing_harness_is_told_with_the_extra_to_install(
    tiny_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "dash_onnx.eval.model")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    message = TOOL.refused(capsys, tiny_bundle, "--task", "arc_easy")
    assert "`pip install '.[eval]'`" in message
