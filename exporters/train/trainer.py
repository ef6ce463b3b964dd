"""A training in progress: the environment, the scorer that learns in it, and the text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dash_onnx.core.actions import LOSSY, SKIP, Action
from dash_onnx.core.bundle import Bundle
from dash_onnx.core.errors import UnsupportedError
from dash_onnx.core.facts import FileFacts
from dash_onnx.core.progress import Loop
from dash_onnx.core.text import TextCodec
from dash_onnx.core.version import __version__
from dash_onnx.exporters.train import static
from dash_onnx.exporters.train.augmentation import augmented
from dash_onnx.exporters.train.checkpoint import Checkpoint
from dash_onnx.exporters.train.dequantized import DequantizedModel, Tensor
from dash_onnx.exporters.train.environment import Environment
from dash_onnx.exporters.train.options import TrainOptions
from dash_onnx.exporters.train.scorer import Scorer, decision_points_of
from dash_onnx.exporters.train.text import training_ids
from dash_onnx.exporters.train.transfer import load_scorer, scorer_to_start_from

MIN_LAYERS = 2
"""The first layer always runs, and nothing precedes it that a decision could be based on."""


class Trainer:
    """State shared by the phases of a training; its tensors are on torch's default device.

    Attributes:
        bundle: the bundle to train; it is not changed.
        options: the user's options.
        plan: the plan that follows from the options.
        checkpoint: state saved by an earlier run of the same training.
        actions: trained actions, most expensive first.
        lossy: index of the first action whose losses the static search measures.
        extra: more expensive actions that the exported scorer has in addition.
        dtype: type of matrix products.
        model: the bundle's layers.
        env: the environment in which they run.
        costs: `[L, A]` in `Costs.unit_ms`, infinite where forbidden.
        compensation: the maps that are trained, see `DequantizedModel.compensation`.
        scorer: the scorer in training.
        generator: source of all randomness except the text and the scorer's initial weights.
        ids: training tokens `[B, T]`, once `prepare_text` has run.
        held_out: tokens `[B, T]` that only the tables use, once `prepare_text` has run.
        downgrades: result of the static search, once the values are regressed.
        history: Lagrangian, KL in nats and cost in `Costs.unit_ms` of each improvement step.
    """

    ids: Tensor
    held_out: Tensor

    def __init__(
        self,
        bundle: Bundle,
        options: TrainOptions,
        *,
        checkpoint: Callable[[Path, str], Checkpoint] = Checkpoint,
    ):
        """Opens the model; nothing is written.

        Args:
            bundle: bundle to train.
            options: the user's options.
            checkpoint: opens the saved state, given the bundle's folder and a fingerprint.

        Raises:
            DashError: the bundle, the calibration text or the scorer to start from cannot be used.
        """
        self.bundle, self.options, began = bundle, options, time.monotonic()
        self.plan = plan = options.plan_for(bundle.manifest.model)
        manifest = bundle.manifest
        facts, variants = manifest.model, manifest.variants
        if facts.num_layers < MIN_LAYERS:
            told = "a model of one layer has nothing to decide: use --policy"
            raise UnsupportedError(f"{told} {variants[-1]}")
        # `full` costs far more than it gains over INT8, so training leaves it out.
        self.extra: tuple[Action, ...] = ("full",) if variants[:2] == ("full", "int8") else ()
        self.actions: tuple[Action, ...] = (*variants[len(self.extra) :], SKIP)
        self.lossy = min(self.actions.index(action) for action in LOSSY if action in self.actions)
        self.dtype = getattr(torch, plan.dtype) if plan.dtype else fast_dtype()
        self.model = DequantizedModel(bundle, self.actions, self.dtype)
        points = plan.decision_points
        if isinstance(points, int):
            points = decision_points_of(facts.num_layers, points)
        prompt = min(plan.prompt_tokens, facts.max_length // 2)
        self.env = Environment(self.model, self.actions, prompt, points)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.scorer = Scorer(facts.num_layers, facts.hidden_size, len(self.actions), points)
        self.costs = torch.tensor(manifest.costs.in_units(self.actions))
        self.costs[0, self.actions.index(SKIP)] = math.inf
        self.compensation = [weight.requires_grad_() for weight in self.model.compensation()]
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(options.seed)
        if options.start is not None:
            load_scorer(self.scorer, self.actions, Bundle(options.start))
        self.checkpoint = checkpoint(bundle.folder, self._fingerprint())
        self.checkpoint.started -= time.monotonic() - began  # loading counts
        self.downgrades: list[static.Downgrade] = []
        self.history: list[tuple[float, float, float]] = []
        self._references: dict[int, Tensor] = {}

    def _fingerprint(self) -> str:
        """Hash of everything that determines the course of the training."""
        files = {name: facts.sha256 for name, facts in self.graphs().items()}
        shapes = {name: list(weight.shape) for name, weight in self.scorer.state_dict().items()}
        costs = self.bundle.manifest.costs.in_units(self.actions)
        plan, seed, dtype = dataclasses.asdict(self.plan), self.options.seed, str(self.dtype)
        device = torch.get_default_device().type  # which its random numbers depend on
        known = [__version__, torch.__version__, files, shapes, costs, plan, seed, dtype, device]
        digest = hashlib.sha256(json.dumps(known).encode())
        for source in self.options.texts:
            digest.update(source.sha256().encode())
        if self.options.start is not None:
            digest.update(scorer_to_start_from(Bundle(self.options.start)).file.encode())
        return digest.hexdigest()

    def graphs(self) -> dict[str, FileFacts]:
        """Every file of the bundle except an earlier scorer."""
        manifest = self.bundle.manifest
        earlier = manifest.scorer.file if manifest.scorer else None
        return {name: facts for name, facts in manifest.files.items() if name != earlier}

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which matrix products run in lower precision, if that is faster."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(torch.get_default_device().type, self.dtype)

    def prepare_text(self) -> None:
        """Reads or generates the training and the held-out tokens."""
        ids, plan = self.checkpoint.state.get("ids"), self.plan
        codec, texts, seed = TextCodec(self.bundle), self.options.texts, self.options.seed
        if ids is None:
            count, length = plan.sequences + plan.held_out, plan.length
            ids = training_ids(self.bundle, codec, texts, count, length, seed)
            self.checkpoint.save(ids=ids)
        held_out = min(plan.held_out, len(ids) // 4)
        self.held_out, self.ids = ids[:held_out], ids[held_out:]
        if plan.augment and not texts:  # held-out text stays as the model wrote it
            self.ids = augmented(self.ids, codec.tokenizer, seed)

    def cost(self, decisions: Tensor) -> Tensor:
        """Cost of `[..., L, A]` decisions in `Costs.unit_ms`, `[...]`; forbidden ones are free."""
        return (decisions * self.costs.nan_to_num(posinf=0.0)).sum((-1, -2))

    @property
    def log_multiplier_range(self) -> tuple[float, float]:
        """Range of the log multiplier, the log of nats per `Costs.unit_ms`."""
        low, high = self.plan.multipliers
        return math.log(low), math.log(high)

    def log_multipliers(self, count: int) -> Tensor:
        """Log multipliers `[count, 1]`, drawn log-uniformly."""
        low, high = self.log_multiplier_range
        return low + torch.rand(count, 1, generator=self.generator) * (high - low)

    def batch(self, number: int) -> Tensor:
        """Training tokens `[B, T]` of a pass; batches repeat after `batches` passes."""
        start = number % self.batches * self.plan.batch
        return self.ids[start : start + self.plan.batch]

    @property
    def batches(self) -> int:
        """Number of passes after which the text repeats."""
        return max(len(self.ids) // self.plan.batch, 1)

    def reference(self, number: int) -> Tensor:
        """Input of the LM head on the reference path of a batch, cached for when it repeats."""
        key = number % self.batches
        if key not in self._references:
            self.keep_reference(number, self.env.reference(self.batch(number)))
        return self._references[key].float()

    def keep_reference(self, number: int, final: Tensor) -> None:
        """Caches what `reference` would compute."""
        self._references[number % self.batches] = final.to(self.dtype)

    def static_search(
        self,
        ids: Tensor,
        reference: Tensor,
        values: Tensor,
        candidates: int,
        start: tuple[int, ...] | None = None,
    ) -> list[static.Downgrade]:
        """`static.search`, measured on `[B, T]` tokens against their reference `[B, T, D]`."""

        def measure(path: tuple[int, ...]) -> float:
            final = self.env.run_path(ids, path)
            return self.env.mean_kl(reference, [final], [self.model.head])[0][0]

        found = static.search(self.costs, values, measure, candidates, self.lossy, start)
        return list(Loop("static search", found))


def fast_dtype() -> torch.dtype:
    """BF16 where the processor multiplies it natively, twice as fast as FP32."""
    if torch.get_default_device().type == "cuda":
        return torch.bfloat16
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32
