"""A training run in progress: the process, the scorer that learns in it, and its text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dash_onnx.core.actions import SKIP, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.facts import FileFacts
from dash_onnx.core.text import TextCodec, read_text
from dash_onnx.exporters.train.checkpoint import Checkpoint
from dash_onnx.exporters.train.effort import EFFORTS
from dash_onnx.exporters.train.environment import Environment
from dash_onnx.exporters.train.forms import in_other_forms
from dash_onnx.exporters.train.frozen import Frozen, Tensor
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.scorer import Scorer, decision_points_of
from dash_onnx.exporters.train.static import Move
from dash_onnx.exporters.train.text import training_ids

PROMPT_TOKENS = 32
"""First tokens of a training sequence, which run at the best precision as a prompt does."""

BATCH = 4
"""Sequences of one pass."""

_MULTIPLIERS = (
    0.006,
    0.12,
)  # nats per mean layer of the cheapest precision: training draws from these
_DECISION_POINTS = (
    1  # of the scorer per token: each costs a third of an INT4 layer, see docs/decisions/0008
)


class Learning:
    """What the phases of a training share.

    Attributes:
        bundle: that is trained; it stays as it is.
        options: what the user chose.
        effort: what that means.
        checkpoint: what an earlier run of the same training reached.
        actions: of the process, from dear to cheap.
        extra: dearer actions that the process lacks and the exported scorer has.
        dtype: of matrix products.
        frozen: the model.
        env: the process.
        costs: `[L, A]` in `Costs.unit_ms`, infinite where forbidden.
        scorer: that learns.
        generator: of everything random but the text and the scorer's first weights.
        ids: training tokens `[B, T]`, once `texts` has run.
        held_out: tokens `[B, T]` that only the tables see, likewise.
        moves: of the static descent, once the values are regressed.
        history: loss, KL in nats and cost in `Costs.unit_ms` of each step of the improvement.
    """

    ids: Tensor
    held_out: Tensor

    def __init__(self, bundle: Bundle, options: TrainOptions):
        """Opens the model; nothing is written.

        Raises:
            DashError: the bundle or the calibration text cannot be used.
        """
        self.bundle, self.options, self.effort = bundle, options, EFFORTS[options.effort]
        manifest = bundle.manifest
        # `full` costs far more than it gains over INT8: the process does without it.
        variants = manifest.variants
        self.extra: tuple[Action, ...] = ("full",) if variants[:2] == ("full", "int8") else ()
        self.actions: tuple[Action, ...] = (*variants[len(self.extra) :], SKIP)
        self.dtype = _fast_dtype()
        self.frozen = Frozen(bundle, self.actions, self.dtype)
        prompt = min(PROMPT_TOKENS, manifest.model.max_length // 2)
        facts = manifest.model
        decision_points = decision_points_of(facts.num_layers, _DECISION_POINTS)
        self.env = Environment(self.frozen, self.actions, prompt, self.actions[0], decision_points)
        self.costs = torch.tensor(manifest.costs.in_units(self.actions))
        self.costs[0, self.actions.index(SKIP)] = math.inf
        self.generator = torch.Generator().manual_seed(options.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.scorer = Scorer(
                facts.num_layers, facts.hidden_size, len(self.actions), decision_points
            )
        self.checkpoint = Checkpoint(bundle.folder, self._fingerprint())
        self.moves: list[Move] = []
        self.history: list[tuple[float, float, float]] = []
        self._references: dict[int, Tensor] = {}

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        files = {name: facts.sha256 for name, facts in self.graphs().items()}
        form = {name: list(weight.shape) for name, weight in self.scorer.state_dict().items()}
        effort, decision_points = dataclasses.asdict(self.effort), self.scorer.decision_points
        costs = self.bundle.manifest.costs.in_units(self.actions)
        facts = [files, effort, form, decision_points, costs, self.options.seed, str(self.dtype)]
        digest.update(json.dumps(facts).encode())
        for path in self.options.calibration:
            digest.update(read_text(path).encode())
        return digest.hexdigest()

    def graphs(self) -> dict[str, FileFacts]:
        """Every file of the bundle but an earlier scorer."""
        manifest = self.bundle.manifest
        earlier = manifest.scorer.file if manifest.scorer else None
        return {name: facts for name, facts in manifest.files.items() if name != earlier}

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in the lower precision where that is faster."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cpu", self.dtype)

    def texts(self) -> None:
        """Training and held-out tokens."""
        ids = self.checkpoint.state.get("ids")
        codec, files, seed = TextCodec(self.bundle), self.options.calibration, self.options.seed
        if ids is None:
            wanted = self.effort.sequences + self.effort.held_out
            with self.autocast():
                ids = training_ids(self.frozen, codec, files, wanted, seed)
            self.checkpoint.save(ids=ids)
        held_out = min(self.effort.held_out, len(ids) // 4)
        self.held_out, self.ids = ids[:held_out], ids[held_out:]
        if not files:  # what is held out stays as the model writes it
            self.ids = in_other_forms(self.ids, codec.tokenizer, seed)

    def cost(self, weights: Tensor) -> Tensor:
        """Cost of decisions `[..., L, A]` in `Costs.unit_ms`; a forbidden one counts as nothing."""
        return (weights * self.costs.nan_to_num(posinf=0.0)).sum((-1, -2))

    def log_multipliers(self, count: int) -> Tensor:
        """Log multipliers `[count, 1]`, drawn log-uniformly."""
        low, high = self.log_multiplier_range
        return low + torch.rand(count, 1, generator=self.generator) * (high - low)

    @property
    def log_multiplier_range(self) -> tuple[float, float]:
        """Log of nats per `Costs.unit_ms`."""
        return math.log(_MULTIPLIERS[0]), math.log(_MULTIPLIERS[1])

    def batch(self, number: int) -> Tensor:
        """Training tokens `[BATCH, T]` of a pass; they come round again."""
        start = number % self._batches * BATCH
        return self.ids[start : start + BATCH]

    @property
    def _batches(self) -> int:
        return max(len(self.ids) // BATCH, 1)

    def reference(self, number: int) -> Tensor:
        """Input of the LM head on the reference path of a batch, kept for when it returns."""
        key = number % self._batches
        if key not in self._references:
            self.keep_reference(number, self.env.reference(self.batch(number), self.actions[0]))
        return self._references[key].float()

    def keep_reference(self, number: int, final: Tensor) -> None:
        """Keeps what `reference` would compute."""
        self._references[number % self._batches] = final.to(self.dtype)


def _fast_dtype() -> torch.dtype:
    """BF16 where the processor multiplies it natively, twice as fast as FP32."""
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
