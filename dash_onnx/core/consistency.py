"""Whether the parts of a manifest agree with each other: what the runtime takes for granted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dash_onnx.core.actions import DECIDED, LETTERS, PRECISIONS, SKIP, WIDE, Form
from dash_onnx.core.block import ATTENTIONS
from dash_onnx.core.contract import EMBED_PATH, head_path, layer_path

if TYPE_CHECKING:
    from dash_onnx.core.block import Attention
    from dash_onnx.core.facts import ModelFacts, ScorerFacts, StaticPoint
    from dash_onnx.core.manifest import Manifest

_MAX = 2**31 - 1  # of any size: ONNX Runtime counts tokens in int32
_LARGE = 1e6  # of a frequency or factor of ropes
_MIN_MS, _MAX_MS = 1e-6, 1e9  # of a part of a token: times are rounded to 1e-5
_MAX_STATE = 1 << 20  # of a size of states
_SCORER = re.compile(r"scorer-\w+\.onnx")
_NOISE = 0.01  # of a KL that was measured in FP32, and of rounded shares
_MAX_WEIGHTS = 4  # in a byte: INT2
_MAX_RATIO = 100  # of two times of a token


def first_problem(manifest: Manifest) -> str | None:
    """What is wrong with a manifest, and the remedy; None where its parts agree.

    Each check relies on those before it.
    """
    for problem in _problems(manifest):
        return f"{problem}; export again"
    if manifest.scorer is not None:
        for problem in _scorer_problems(manifest, manifest.scorer):
            return f"{problem}; train again with `dash-train`"
    return None


def _problems(manifest: Manifest) -> Iterator[str]:
    ordered = tuple(a for a in PRECISIONS if a in manifest.variants)
    if not ordered or ordered != manifest.variants:
        yield f"variants must be some of {', '.join(PRECISIONS)}, in order"
    yield from _size_problems(manifest)
    yield from _rope_problems(manifest)
    if set(manifest.heads) != set(manifest.actions):
        yield f"heads must name one for each of {', '.join(manifest.actions)}"
    wide: list[Form] = [] if manifest.wide is None else [WIDE]
    graphs = [EMBED_PATH, *(head_path(head) for head in [*manifest.heads.values(), *wide])]
    graphs += [
        layer_path(layer, form)
        for layer in range(manifest.model.num_layers)
        for form in [*manifest.actions, *wide]
    ]
    for graph in graphs:
        if graph not in manifest.files:
            yield f"files lacks {graph}"
    if any(facts.bytes < 0 for facts in manifest.files.values()):
        yield "a file has a negative size"
    yield from _claim_problems(manifest)
    yield from _cost_problems(manifest)
    yield from _static_problems(manifest, "static", manifest.static)


def model_problems(model: ModelFacts) -> Iterator[str]:
    """What is impossible in the sizes of a model."""
    for name, value in vars(model).items():
        if name not in ("name", "architecture") and not (type(value) is int and 0 < value <= _MAX):
            yield f"{name} is {value!r}, not in 1..{_MAX}"
    if model.num_heads % model.num_kv_heads:
        yield f"{model.num_heads} heads do not share {model.num_kv_heads} key/value heads"


def _size_problems(manifest: Manifest) -> Iterator[str]:
    model, target = manifest.model, manifest.target
    yield from model_problems(model)
    for name, described in (("layers", manifest.layers), ("attention", manifest.attention)):
        if len(described) != model.num_layers:
            yield f"{name} describes {len(described)} layers of {model.num_layers}"
    yield from _recurrence_problems(manifest)
    experts = manifest.block.experts
    if experts is not None and not 1 <= experts.per_token <= experts.count <= _MAX:
        yield f"{experts.per_token} of {experts.count} experts cannot compute for a token"
    if not 0 <= manifest.compensation_rank <= model.hidden_size:
        yield f"compensation_rank is {manifest.compensation_rank}"
    if not 1 <= target.block_size <= _MAX or not 0 <= target.accuracy_level <= 4:
        yield "target has a block size or an accuracy level that does not exist"
    if target.kv_cache == "int4" and model.head_dim % 2:
        yield f"target.kv_cache is int4, which needs an even head_dim, not {model.head_dim}"
    for attention in manifest.attention:
        if attention.window is not None and not 1 <= attention.window <= _MAX:
            yield f"an attention window is {attention.window}"
    for layer in manifest.layers:
        lacking = [a for a in manifest.actions if a not in layer.bytes]
        if lacking or any(a not in layer.relative_error for a in manifest.actions if a != "full"):
            yield "layers must describe every action of each layer"


def _recurrence_problems(manifest: Manifest) -> Iterator[str]:
    mixers, sizes = manifest.mixers, manifest.recurrence
    if mixers and len(mixers) != manifest.model.num_layers:
        yield f"mixers describes {len(mixers)} layers of {manifest.model.num_layers}"
    if mixers and "attention" not in mixers:
        yield "mixers has no attention, which ropes and K/V belong to"
    if bool({*mixers} - {*ATTENTIONS}) != (sizes is not None):
        yield "recurrence must be there exactly where a layer does not attend"
    for layer, attention in enumerate(manifest.attention):
        yield from _source_problems(manifest, layer, attention)
    if sizes is None:
        return
    delta = "gated_delta" in mixers
    for name, value in vars(sizes).items():
        needed = delta or name in ("kernel", "channels")
        if not (0 < value <= _MAX_STATE if needed else value == 0):
            yield f"recurrence.{name} is {value}"
    if sizes.kernel < 2:
        yield f"recurrence.kernel is {sizes.kernel}"
    if delta:
        if sizes.value_heads % sizes.key_heads:
            yield "the value heads of recurrence do not share its key heads"
        if sizes.channels != 2 * sizes.key_width + sizes.value_width:
            yield "recurrence.channels must be those of all queries, keys and values"
    if manifest.state_bytes > _MAX_WEIGHTS * sum(f.bytes for f in manifest.files.values()):
        yield f"the files are too small for states of {manifest.state_bytes} bytes"


def _source_problems(manifest: Manifest, layer: int, attention: Attention) -> Iterator[str]:
    source, heads = attention.source, manifest.model.heads_of(attention)
    for value in heads:
        if not 0 < value <= _MAX:
            yield f"layer {layer} has heads of {value}"
    if manifest.model.num_heads % heads[0]:
        yield f"the heads of layer {layer} do not share its {heads[0]} key/value heads"
    if (manifest.mixer_of(layer) == "shared_attention") != (source is not None):
        yield f"layer {layer} must name whose K/V it reads exactly where it has shared attention"
    if source is None:
        return
    if not 0 <= source < layer or manifest.mixer_of(source) != "attention":
        yield f"layer {layer} reads K/V of layer {source}, which writes none before it"
    elif manifest.model.heads_of(manifest.attention[source]) != heads:
        yield f"layer {layer} reads K/V of layer {source}, which has other heads"


def _rope_problems(manifest: Manifest) -> Iterator[str]:
    if not manifest.ropes or not all(rope.inv_freq for rope in manifest.ropes):
        yield "ropes must have frequencies"
    factors = (x for rope in manifest.ropes for x in (*rope.inv_freq, rope.attention_scaling))
    if not all(abs(x) <= _LARGE for x in factors):
        yield f"ropes has a number beyond {_LARGE:.0e}"
    if len(manifest.ropes) > max(2, manifest.model.num_layers):
        yield f"ropes has {len(manifest.ropes)} entries, which is more than the layers can use"
    if not 0 <= manifest.block.per_layer_width <= _MAX_STATE:
        yield f"block.per_layer_width is {manifest.block.per_layer_width}"
    for layer in range(manifest.model.num_layers):
        if not 0 <= manifest.rope_of(layer) < len(manifest.ropes):
            yield "attention names a rope that ropes does not have"
        dims = manifest.dims_of(layer)
        if dims.rotary_dim > dims.head_dim:
            yield f"ropes rotate more than the {dims.head_dim} dimensions of a head"


def _claim_problems(manifest: Manifest) -> Iterator[str]:
    """Sizes that the files cannot hold: a reader that trusted them would run out of memory."""
    model = manifest.model
    held = _MAX_WEIGHTS * sum(facts.bytes for facts in manifest.files.values())
    rows = model.vocab_size + 2 * model.num_layers * model.intermediate_size
    per_layer = model.vocab_size * model.num_layers * manifest.block.per_layer_width
    for attention in manifest.attention:
        kv_heads, head_dim = model.heads_of(attention)
        heads = model.num_heads + (kv_heads if attention.source is None else 0)
        rows += 2 * head_dim * heads
    if rows * model.hidden_size + per_layer > held:
        yield f"the files are too small for the sizes of model: {held / _MAX_WEIGHTS:.0f} bytes"


def _cost_problems(manifest: Manifest) -> Iterator[str]:
    costs = manifest.costs
    if len(costs.layers_ms) != manifest.model.num_layers:
        yield "costs must list every layer"
    if any(action not in layer for layer in costs.layers_ms for action in manifest.actions):
        yield "costs must list every action of each layer"
    if any(head not in costs.heads_ms for head in manifest.exported_heads):
        yield "costs must list every LM head"
    measured = (costs.heads_ms.values(), *(layer.values() for layer in costs.layers_ms))
    if not _all_in(_MIN_MS, _MAX_MS, (ms for part in measured for ms in part)):
        yield f"costs must lie between {_MIN_MS:.0e} and {_MAX_MS:.0e} ms"
    cheapest = min(layer[action] for layer in costs.layers_ms for action in manifest.variants)
    if not 0 <= costs.join_ms < cheapest:
        yield "costs.join_ms must be less than a layer takes, and none less than 0"
    if not all(_names_plan(key, len(manifest.layers)) for key in costs.whole):
        yield "costs.whole names an unknown plan of the layers"
    if not _all_in(1 / _MAX_RATIO, _MAX_RATIO, costs.whole.values()):
        yield f"costs.whole must lie between 1/{_MAX_RATIO} and {_MAX_RATIO}"
    yield from _pass_problems(manifest)
    others = (costs.embed_ms, costs.scorer_ms)
    if not all(0 <= ms < _MAX_MS for ms in others) or costs.threads < 1:
        yield "costs must be those of at least one thread, and none less than 0"


def _names_plan(key: str, layers: int) -> bool:
    """Whether `Costs.whole` may have a key, see `plans.whole_key`."""
    kind, *rest = key.split(" ")
    if not rest:
        return kind in (*PRECISIONS, DECIDED)
    head, *budget = rest
    letters = len(kind) == layers and {*kind} <= {*LETTERS.values()} and not budget
    decided = kind == DECIDED and re.fullmatch(r"(\d+\.\d\d)?", " ".join(budget)) is not None
    return (letters or decided) and head in PRECISIONS


def _pass_problems(manifest: Manifest) -> Iterator[str]:
    passes = manifest.costs.passes
    if manifest.wide is not None:
        if not 0 <= manifest.wide.kl <= _LARGE:
            yield "wide has a KL below 0"
        if passes is None or WIDE not in passes.layers_ms or WIDE not in passes.heads_ms:
            yield "costs.passes must list the wide form"
    if passes is None:
        return
    if passes.plain_rows != passes.rows[: len(passes.plain_rows)]:
        yield "costs.passes.plain_rows must be the first of its rows"
    plain = [len(ms) for ms in passes.plain_ms] if passes.plain_rows else []
    if passes.plain_rows and plain != [len(passes.plain_rows)] * len(passes.contexts):
        yield "costs.passes.plain_ms must have a time for each context and number of rows"
    if not all(abs(ms) < _MAX_MS for each in passes.plain_ms for ms in each):
        yield f"costs.passes.plain_ms must be less than {_MAX_MS:.0e} ms"
    for counts in (passes.rows, passes.contexts, passes.head_rows):
        if not counts or list(counts) != sorted({*counts}) or not 0 <= counts[-1] <= _MAX:
            yield "costs.passes must name rows and contexts, ascending"
    layers, heads = set(passes.layers_ms), set(passes.heads_ms)
    if not {*manifest.variants} <= layers or not {*manifest.exported_heads} <= heads:
        yield "costs.passes must list every precision of the layers and of the LM head"
    rows = [ms for each in passes.layers_ms.values() for ms in each]
    if any(len(each) != len(passes.contexts) for each in passes.layers_ms.values()) or any(
        len(ms) != len(passes.rows) for ms in rows
    ):
        yield "costs.passes must have a time for each number of rows and each context"
    if any(len(ms) != len(passes.head_rows) for ms in passes.heads_ms.values()):
        yield "costs.passes must have a time of the LM head for each number of rows"
    rows += passes.heads_ms.values()
    if not _all_in(_MIN_MS, _MAX_MS, (ms for each in rows for ms in each)):
        yield f"costs.passes must lie between {_MIN_MS:.0e} and {_MAX_MS:.0e} ms"


def _scorer_problems(manifest: Manifest, scorer: ScorerFacts) -> Iterator[str]:
    layers, actions = manifest.model.num_layers, set(manifest.actions)
    if not _SCORER.fullmatch(scorer.file):  # training removes the file of an earlier scorer
        yield f"scorer.file {scorer.file[:200]!r} is not the name of a scorer"
    if scorer.file not in manifest.files:
        yield f"scorer.file {scorer.file[:200]!r} is not in files"
    if scorer.actions != manifest.actions:
        yield "scorer.actions must be the bundle's actions"
    points = scorer.decision_points
    if not points or not 1 <= points[0] or any(a >= b for a, b in scorer.segments(layers)):
        yield "scorer.decision_points must be layers after the first, in order"
    budgets = [point.budget for point in scorer.points]
    if not budgets or budgets != sorted(set(budgets)):
        yield "scorer.points must ascend in budget"
    if not _all_in(0, 1e6, (x for row in scorer.points for x in (row.budget, row.multiplier))):
        yield "budgets and multipliers of scorer.points must be more than 0"
    for row in scorer.points:
        if not set(row.shares) <= actions or not any(row.shares.get(a, 0) > 0 for a in PRECISIONS):
            yield "every row of scorer.points needs the share of a precision"
        if row.fixed and (len(row.fixed) != layers or not {*row.fixed} <= {*actions, None}):
            yield "scorer.points fixes actions that do not fit the layers"
        if SKIP in row.fixed[:1]:
            yield "scorer.points skips the first layer"
        if row.kl < -_NOISE or not all(0 <= share <= 1 + _NOISE for share in row.shares.values()):
            yield "scorer.points has a KL below 0, or a share outside 0..1"
    if not 1 <= scorer.margin <= 1e6:
        yield "scorer.margin must be at least 1"
    if "balanced" not in scorer.presets:
        yield "scorer.presets must name balanced"
    if not all(budgets[0] <= budget <= budgets[-1] for budget in scorer.presets.values()):
        yield "scorer.presets must lie within scorer.points"
    yield from _static_problems(manifest, "scorer.static", scorer.static)
    if not {point.head for point in scorer.points} <= set(manifest.exported_heads):
        yield "a head of the policy table is not exported"


def _static_problems(manifest: Manifest, name: str, points: Sequence[StaticPoint]) -> Iterator[str]:
    layers, actions = manifest.model.num_layers, set(manifest.actions)
    for point in points:
        if len(point.path) != layers or not set(point.path) <= actions or point.path[0] == SKIP:
            yield f"{name} has a path that does not fit the layers"
        if point.kl < -_NOISE or not 0 < point.budget <= 1e6:
            yield f"{name} has a KL below 0, or a budget that is not more than 0"
        if point.head not in manifest.exported_heads:
            yield f"{name} has a head that is not exported"


def _all_in(low: float, high: float, values: Iterable[float]) -> bool:
    return all(low < value < high for value in values)
