"""Policies: which action each layer takes for each token."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
from conftest import VARIANTS

from dash_onnx.core.actions import SKIP, Action, ActionPath, check_action, parse_variants
from dash_onnx.core.errors import PolicyError
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import Policy, RandomPolicy, StaticPolicy, make_policy


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    """Of 4 layers with all actions; mixed paths use the INT8 head."""
    return Manifest.from_text((tiny_bundle / "dash.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def int4_only(manifest: Manifest) -> Manifest:
    """A bundle without `full` and `int8`."""
    return dataclasses.replace(manifest, variants=("int4",), heads={"int4": "int4", "skip": "int4"})


def drawn(policy: Policy, count: int) -> list[ActionPath]:
    return list(islice(policy.paths(), count))


@pytest.mark.parametrize("name", ["full", "int8", "int4"])
def test_a_precision_runs_every_layer_of_every_token_in_it(manifest: Manifest, name: str) -> None:
    policy = make_policy(name, manifest)
    assert policy.name == name
    assert policy.head == manifest.heads[name] == name
    assert policy.uniform == (name,) * 4
    assert drawn(policy, 3) == [(name,) * 4] * 3


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("full,int8,int4,skip", ("full", "int8", "int4", "skip")),
        ("full,int4*2,int8", ("full", "int4", "int4", "int8")),
        ("int4*4", ("int4",) * 4),
        ("int8*1,skip*3", ("int8", "skip", "skip", "skip")),
        (" full , skip*2 ,int8,", ("full", "skip", "skip", "int8")),
    ],
)
def test_a_static_policy_is_a_list_with_repeats(
    manifest: Manifest, text: str, path: ActionPath
) -> None:
    policy = make_policy(f"static:{text}", manifest)
    assert policy.uniform == path
    assert drawn(policy, 2) == [path] * 2


@pytest.mark.parametrize(
    ("text", "head"),
    [("int4*4", "int4"), ("full*4", "full"), ("full,int4*3", "int4"), ("full*3,skip", "int4")],
)
def test_the_head_follows_one_precision_and_is_that_of_mixed_paths_otherwise(
    manifest: Manifest, text: str, head: Action
) -> None:
    assert make_policy(f"static:{text}", manifest).head == head


@pytest.mark.parametrize(
    "content", ["full,int4*2\nskip\n", "full\nint4\nint4\nskip", "full, int4*2,skip"]
)
def test_a_static_policy_is_read_from_a_file(
    manifest: Manifest, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "path.txt"
    file.write_text(content)
    assert make_policy(f"static:@{file}", manifest).uniform == ("full", "int4", "int4", "skip")


@pytest.mark.parametrize(
    ("text", "seed"), [("random", 0), ("random:0", 0), ("random:7", 7), ("random:-3", -3)]
)
def test_a_random_policy_takes_a_seed(manifest: Manifest, text: str, seed: int) -> None:
    policy = make_policy(text, manifest)
    assert policy.uniform is None
    assert policy.head == "int4"
    assert policy.name == f"random:{seed}"
    assert drawn(policy, 20) == drawn(RandomPolicy(manifest, seed), 20)


def test_a_policy_object_is_taken_as_it_is(manifest: Manifest) -> None:
    class Alternating(Policy):
        name = "alternating"
        head: Action = "int8"

        def paths(self) -> Iterator[ActionPath]:
            while True:
                yield ("full", "skip", "full", "full")
                yield ("int4", "int4", "int4", "int4")

    policy = Alternating()
    assert make_policy(policy, manifest) is policy
    assert policy.uniform is None


@pytest.mark.parametrize(
    "text",
    ["fp16", "FULL", "skip", "full:1", "static:", "dynamic:1", "int4*4", "dash:0.3", "even:2"],
)
def test_an_unknown_policy_is_refused_and_the_known_forms_are_told(
    manifest: Manifest, text: str
) -> None:
    with pytest.raises(
        PolicyError, match=r"unknown policy .*; choose dash, full.*random.*static:@FILE"
    ):
        make_policy(text, manifest)


@pytest.mark.parametrize("text", ["full", "int8", "static:int4,int8,int4*2", "static:full*4"])
def test_an_action_that_was_not_exported_is_refused(int4_only: Manifest, text: str) -> None:
    with pytest.raises(PolicyError, match="is not in this bundle; it has int4, skip"):
        make_policy(text, int4_only)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full*3", "the path has 3 actions, the model has 4 layers"),
        ("full*5", "the path has 5 actions"),
        ("int8,full*28,int8", "the path has 30 actions"),
        ("full*99999999999", "the path has 999999999 actions"),
        (",", "the path has 0 actions"),
        ("full*4,int8*0,int4", "the path has 5 actions"),
        ("full*3,int3", "action 'int3' is not in this bundle"),
        ("full*3,", "the path has 3 actions"),
        ("skip,full*3", "the first layer must run"),
        ("skip*4", "the first layer must run"),
        ("full,int4*", r"'int4\*': expected ACTION\*COUNT"),
        ("full*-1", r"expected ACTION\*COUNT"),
        ("full*1.5", r"expected ACTION\*COUNT"),
        ("full**4", r"expected ACTION\*COUNT"),
        ("full*\u00b2", r"expected ACTION\*COUNT"),  # a superscript two: isdigit, but no int
        ("@", "cannot read the path file"),
    ],
)
def test_a_bad_static_path_is_refused_with_the_reason(
    manifest: Manifest, text: str, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        make_policy(f"static:{text}", manifest)


def test_a_missing_path_file_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=f"cannot read the path file {tmp_path}/none"):
        make_policy(f"static:@{tmp_path}/none", manifest)


def test_a_path_file_that_is_not_text_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "path").write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="cannot read the path file"):
        make_policy(f"static:@{tmp_path}/path", manifest)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_path_file_without_an_end_is_refused(manifest: Manifest) -> None:
    with pytest.raises(PolicyError, match="/dev/zero is not a path file"):
        make_policy("static:@/dev/zero", manifest)


@pytest.mark.parametrize("seed", ["x", "1.5", "0x10", "1,2"])
def test_a_seed_that_is_no_integer_is_refused(manifest: Manifest, seed: str) -> None:
    with pytest.raises(PolicyError, match=f"random:{seed}: the seed must be an integer"):
        make_policy(f"random:{seed}", manifest)


def test_static_policies_built_directly_are_checked_too(manifest: Manifest) -> None:
    with pytest.raises(PolicyError, match="first layer"):
        StaticPolicy(("skip", "full", "full", "full"), manifest)
    with pytest.raises(PolicyError, match="4 layers"):
        StaticPolicy((), manifest)


def test_random_paths_repeat_per_seed_and_per_generation(manifest: Manifest) -> None:
    policy = RandomPolicy(manifest, 5)
    first = drawn(policy, 50)
    assert drawn(policy, 50) == first
    assert drawn(RandomPolicy(manifest, 5), 50) == first
    assert drawn(RandomPolicy(manifest, 6), 50) != first


def test_two_random_generations_at_once_do_not_disturb_each_other(manifest: Manifest) -> None:
    policy = RandomPolicy(manifest, 5)
    left, right = policy.paths(), policy.paths()
    pairs = [(next(left), next(right)) for _ in range(50)]
    assert all(a == b for a, b in pairs)


def test_random_paths_draw_every_action_equally_often_and_layers_independently(
    manifest: Manifest,
) -> None:
    count = 8000
    paths = drawn(RandomPolicy(manifest, 1), count)
    for layer in (1, 2):
        shares = Counter(path[layer] for path in paths)
        assert set(shares) == {*VARIANTS, SKIP}
        assert all(abs(n / count - 1 / 4) < 0.02 for n in shares.values())
    pairs = Counter(path[1:3] for path in paths)
    assert len(pairs) == 16
    assert all(abs(n / count - 1 / 16) < 0.012 for n in pairs.values())
    following = Counter((a[1], b[1]) for a, b in pairwise(paths))
    assert all(abs(n / count - 1 / 16) < 0.012 for n in following.values())


def test_random_paths_never_skip_the_ends_and_draw_their_precisions_equally(
    manifest: Manifest,
) -> None:
    count = 8000
    paths = drawn(RandomPolicy(manifest, 2), count)
    for layer in (0, 3):
        shares = Counter(path[layer] for path in paths)
        assert set(shares) == {"full", "int8", "int4"}
        assert all(abs(n / count - 1 / 3) < 0.02 for n in shares.values())


def test_random_paths_use_only_what_the_bundle_has(int4_only: Manifest) -> None:
    paths = drawn(RandomPolicy(int4_only, 0), 200)
    assert {action for path in paths for action in path} == {"int4", "skip"}
    assert {path[0] for path in paths} == {path[3] for path in paths} == {"int4"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full,int8,int4", (("full", "int8", "int4"), False)),
        ("int4, full,int4,", (("full", "int4"), False)),
        ("wide,int4", (("int4",), True)),
    ],
)
def test_precisions_are_parsed_highest_first_without_duplicates(
    text: str, expected: tuple[tuple[Action, ...], bool]
) -> None:
    assert parse_variants(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full,fp8", "unknown variant 'fp8'"),
        ("skip", "unknown variant 'skip'"),
        ("", "no precision"),
        ("wide", "no precision"),
        ("wide,int8", "wide is a copy"),
    ],
)
def test_bad_precisions_are_refused(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_variants(text)


def test_an_action_must_be_exported_and_exist() -> None:
    assert check_action("int8", ["full", "int8"]) == "int8"
    for name, exported in [("int4", ["full", "int8"]), ("int3", ["int3", "full"])]:
        with pytest.raises(PolicyError, match=f"action '{name}' is not in this bundle"):
            check_action(name, exported)
