"""The facts of a bundle, part by part: what the exporter measured and what it decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from dash_onnx.core.actions import PRECISIONS, Action, ActionPath, Form, groups_of
from dash_onnx.core.block import Attention, AttentionForms
from dash_onnx.core.statistics import linear

_LARGE = 200_000_000  # weights of the layers

KVCacheType = Literal["float", "int8", "int4"]
"""Element type of the K/V cache; float is that of the activations."""


@dataclass(frozen=True)
class ModelFacts:
    """Shape of the source model.

    Attributes:
        name: its folder, file or hub id.
        architecture: its `model_type`.
        num_layers: L.
        hidden_size: D, the width of the residual stream.
        intermediate_size: width inside the MLP.
        num_heads: number of query heads.
        num_kv_heads: number of key/value heads.
        head_dim: d, the width of one head.
        vocab_size: V, the number of logits.
        max_length: tokens of context that prompt and answer share.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int

    def heads_of(self, attention: Attention) -> tuple[int, int]:
        """Key/value heads of a layer, and the width of a head."""
        return attention.kv_heads or self.num_kv_heads, attention.head_dim or self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Number of weights in the matrix products of a layer with a gated MLP."""
        attention = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def large(self) -> bool:
        """Whether it is trained on fewer tokens, and quantized in larger blocks."""
        return self.num_layers * self.layer_parameters > _LARGE


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: angle of dimension pair j at position p is `p * inv_freq[j]`.

    Attributes:
        inv_freq: one inverse frequency (radians per token) per rotated dimension pair.
        attention_scaling: factor on cos and sin (1.0 unless the RoPE type requires another).
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float


INT8_INPUTS = 4
"""`accuracy_level` of products that round their input to INT8, with a scale for each block."""


@dataclass(frozen=True)
class Target:
    """What the graphs were built for.

    Attributes:
        device: ORT device the operators were chosen for.
        dtype: element type of activations and logits.
        block_size: weights that share one quantization scale.
        accuracy_level: MatMulNBits' accuracy_level (`INT8_INPUTS`; 0: unset).
        kv_cache: element type of the KV cache.
        attention: which attention implementations the layers have.
        ragged: whether they run several tokens per sequence, and different numbers of them.
        ternary: whether the source's weights of all layers are -s, 0 and s in each block. INT2 then
            holds them exactly, including those of attention.
    """

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "float16"]
    block_size: int
    accuracy_level: int
    kv_cache: KVCacheType = "float"
    attention: AttentionForms = "grouped"
    ragged: bool = False
    ternary: bool = False


@dataclass(frozen=True)
class LayerFacts:
    """Statistics of one layer on some of the calibration tokens (x: its input, y: its full output).

    Attributes:
        scale: mean of ||y|| / ||x||; a skipped layer returns `scale * x`.
        cosine: mean cosine similarity of x and y.
        relative_error: per form, ||y_form - y|| / ||y|| over all those tokens.
        bytes: per form, size of graph and weights on disk.
    """

    scale: float
    cosine: float
    relative_error: dict[Form, float]
    bytes: dict[Form, int]


@dataclass(frozen=True)
class WideFacts:
    """The loss of the wide form of all layers.

    Attributes:
        kl: KL(full precision || all layers wide) in nats, with the LM head in full precision.
        tokens: number of calibration tokens that it was measured on.
    """

    kl: float
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Where the calibration tokens came from.

    Attributes:
        source: `self-generated`, or the texts as they were given, without folders.
        sequences: number of sequences.
        tokens: number of tokens in all of them.
        sink_tokens: first tokens of each sequence, excluded from all statistics.
        seed: seed of the sampling.
        sha256: checksum of the token ids (int64, little endian).
    """

    source: str
    sequences: int
    tokens: int
    sink_tokens: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class PassCosts:
    """Milliseconds of a layer and of the LM head by the rows of a pass, all of one sequence.

    Attributes:
        rows: tokens of a pass, ascending.
        contexts: tokens in the KV cache before the pass, ascending.
        layers_ms: by form, for each context, for each number of rows: the mean of some layers, with
            grouped attention.
        plain_rows: rows that attention from plain operators was timed for, ascending: the first of
            `rows`, as its memory grows with them.
        plain_ms: what it adds to a layer's time, by context and rows; negative if it is faster.
        head_rows: rows that the LM head was timed for, ascending.
        heads_ms: by form, for each of `head_rows`.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    layers_ms: dict[Form, tuple[tuple[float, ...], ...]]
    plain_rows: tuple[int, ...]
    plain_ms: tuple[tuple[float, ...], ...]
    head_rows: tuple[int, ...]
    heads_ms: dict[Form, tuple[float, ...]]

    def layer_ms(self, form: Form, rows: int, context: int) -> float:
        """Time of a layer; linear between and beyond the measured rows and contexts."""
        each = [linear(rows, self.rows, ms) for ms in self.layers_ms[form]]
        return linear(context, self.contexts, each)

    def attends_plainly(self, rows: int, context: int, capacity: int) -> bool:
        """Whether attention from plain operators is faster for rows of one sequence.

        Args:
            rows: rows of the pass.
            context: tokens in the K/V cache, which the other attention reads.
            capacity: tokens of the whole cache, which attention from plain operators reads.
        """
        if not self.plain_rows or rows > self.plain_rows[-1]:
            return False
        each = [linear(rows, self.plain_rows, ms) for ms in self.plain_ms]
        form = next(iter(self.layers_ms))
        unused = self.layer_ms(form, rows, capacity) - self.layer_ms(form, rows, context)
        return linear(capacity, self.contexts, each) + unused < 0

    def head_ms(self, form: Form, rows: int) -> float:
        """Time of the LM head on all rows; linear like `layer_ms`."""
        return linear(rows, self.head_rows, self.heads_ms[form])


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts of one decoded token, profiled through the real dispatch.

    Attributes:
        machine: what they were measured on.
        threads: size of ORT's thread pool.
        embed_ms: the token embedding.
        scorer_ms: all decisions of one token.
        heads_ms: the LM head, by precision.
        layers_ms: by layer and action.
        spread: how much longer a typical run took, as a fraction; large if other work disturbed it.
        passes: times by rows and contexts; None if there is nothing to choose from.
        join_ms: time that dispatching one layer less saves: fixed layers run as one graph.
        whole: by what factor a token takes longer than the sum of its parts, relative to the
            reference's token: with all layers in a precision, `decided` by the scorer, and on the
            plans that presets chose between, by `plans.whole_key`.
    """

    machine: str
    threads: int
    embed_ms: float
    scorer_ms: float
    heads_ms: dict[Action, float]
    layers_ms: tuple[dict[Action, float], ...]
    spread: float = 0.0
    passes: PassCosts | None = None
    join_ms: float = 0.0
    whole: dict[str, float] = field(default_factory=dict)

    @property
    def unit_ms(self) -> float:
        """Mean milliseconds of a layer in INT4, or in the cheapest precision if there is no INT4.

        Multipliers are nats per this, so that a policy table holds on another machine, as far as
        the ratios of costs do.
        """
        known = [action for action in PRECISIONS if action in self.layers_ms[0]]
        cheapest = "int4" if "int4" in known else known[-1]
        return sum(costs[cheapest] for costs in self.layers_ms) / len(self.layers_ms)

    def in_units(self, actions: Sequence[Action]) -> list[list[float]]:
        """Costs of actions per layer, `[L, A]`, as multiples of `unit_ms`."""
        unit = self.unit_ms
        return [[layer[action] / unit for action in actions] for layer in self.layers_ms]

    def mixed_ms(self, layers_ms: float, head: Action, scored: bool, graphs: int) -> float:
        """The cost of a token whose layers take `layers_ms` when each is dispatched alone.

        Args:
            head: precision of the LM head.
            scored: whether the scorer decided.
            graphs: number of graphs that the layers run as; those fixed alike share one.
        """
        joined_ms = (len(self.layers_ms) - graphs) * self.join_ms
        return self.embed_ms + self.heads_ms[head] + layers_ms + self.scorer_ms * scored - joined_ms

    def token_ms(
        self, path: ActionPath, head: Action, scored: bool = False, *, graphs: int | None = None
    ) -> float:
        """The same for a token on a path; without `graphs`, as if every token took this path."""
        layers_ms = sum(costs[action] for costs, action in zip(self.layers_ms, path, strict=True))
        return self.mixed_ms(layers_ms, head, scored, graphs or len(groups_of(path)))


@dataclass(frozen=True)
class BudgetPoint:
    """One row of the policy table, measured on held-out tokens.

    Attributes:
        budget: mean cost of a token as a fraction of the reference's.
        multiplier: Lagrange multiplier of the cost that leads to it, in nats per `Costs.unit_ms`.
        head: precision of the LM head.
        kl: mean KL(reference || policy) in nats.
        shares: share of each action among the decisions.
        fixed: by layer, the action that it takes for all tokens, or None; empty: none is fixed.
    """

    budget: float
    multiplier: float
    head: Action
    kl: float
    shares: dict[Action, float]
    fixed: tuple[Action | None, ...] = ()


@dataclass(frozen=True)
class StaticPoint:
    """The best static assignment found for a cost: a path in the notation of `static:`.

    Attributes:
        budget: its cost as a fraction of the reference's.
        head: precision of the LM head.
        kl: mean KL in nats, on the same held-out tokens as the policy table.
        path: the action of each layer.
    """

    budget: float
    head: Action
    kl: float
    path: tuple[Action, ...]


@dataclass(frozen=True)
class Training:
    """How the scorer was trained.

    Attributes:
        effort: quick, normal or thorough.
        source: source of the training text, as in `calibration.source`.
        tokens: tokens of training text.
        held_out_tokens: tokens that the tables were measured on.
        seed: seed of everything random.
        seconds: wall time.
        loss: training loss after each tenth of the steps.
        kl: mean KL of the training decisions, at the same steps.
        cost: their mean cost at the same steps, as a fraction of the reference's.
    """

    effort: str
    source: str
    tokens: int
    held_out_tokens: int
    seed: int
    seconds: float
    loss: tuple[float, ...]
    kl: tuple[float, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True)
class ScorerFacts:
    """The trained scorer.

    Attributes:
        file: its graph.
        actions: the actions of its indices, in order.
        decision_points: layers before which the scorer decides, for these layers and those that
            follow; for the layers before the first, the multiplier alone decides.
        points: the policy table, by ascending budget.
        presets: named budgets.
        static: the best static assignments, by ascending budget.
        training: facts about its training.
        margin: allowance for other text, which may lose this many times as much as the held-out
            tokens; the presets include it.
    """

    file: str
    actions: tuple[Action, ...]
    decision_points: tuple[int, ...]
    points: tuple[BudgetPoint, ...]
    presets: dict[str, float]
    static: tuple[StaticPoint, ...]
    training: Training
    margin: float = 1.0

    def segments(self, layers: int) -> tuple[tuple[int, int], ...]:
        """First layer, and the one after the last, of each segment that is decided at once."""
        return tuple(pairwise((0, *self.decision_points, layers)))


@dataclass(frozen=True)
class FileFacts:
    """Size and checksum of one file of the bundle.

    Attributes:
        bytes: its size.
        sha256: checksum of its content.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ExportFacts:
    """How the export went.

    Attributes:
        source: the MODEL argument's kind and name.
        tools: version of each tool that took part.
        seconds: wall time until all graphs were written, before they were timed.
        peak_rss_bytes: highest resident memory of the exporting process until then.
        fp32_kept: weights whose values do not fit FP16 and were stored as FP32.
        license: license of the source model, as its metadata state it; None if they state none.
    """

    source: str
    tools: dict[str, str]
    seconds: float
    peak_rss_bytes: int
    fp32_kept: tuple[str, ...]
    license: str | None = None
