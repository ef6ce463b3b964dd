"""What the user of dash-run sees of a generation: its text, its figures, its trace."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from dash_onnx.core.policy import Policy
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.sampling import Sampling
from dash_onnx.runtime.stream import Completion

if TYPE_CHECKING:
    from dash_onnx.report.terminal import PathView
    from dash_onnx.runtime.model import Model
    from dash_onnx.runtime.results import Chunk


@dataclass
class Record:
    """What happened during one generation."""

    policy: Policy
    sampling: Sampling
    load_ms: float | None = None  # to load the model, if this is its first generation
    chunks: list[Chunk] = field(default_factory=list)  # even if interrupted

    def watch(self, chunks: Iterable[Chunk], trace: TextIO | None) -> Iterator[Chunk]:
        """Passes chunks on, and records them."""
        for chunk in chunks:
            self.chunks.append(chunk)
            if trace is not None:
                facts = {
                    "token": chunk.token,
                    "text": chunk.text,
                    "ms": round(chunk.ms, 3),
                    "path": chunk.path,
                }
                if chunk.thinking:
                    facts["reasoning"] = chunk.reasoning
                if chunk.draft is not None:
                    facts["draft"] = chunk.draft._asdict()
                # A terminal may not support every character.
                print(json.dumps(facts, ensure_ascii=trace is sys.stdout), file=trace)
            yield chunk

    @property
    def only_thoughts(self) -> bool:
        """Whether the answer reached its limit before its text began."""
        cut = bool(self.chunks) and self.chunks[-1].finish_reason == "length"
        return cut and self.chunks[-1].thinking

    def figures(self) -> dict[str, Any]:
        """The figures of `--json`."""
        done = Completion.of(self.chunks)
        first, *decode = done.ms
        spent = sum(decode)  # empty if a grammar forces all tokens
        return {
            "load_ms": None if self.load_ms is None else round(self.load_ms, 3),
            "finish_reason": done.finish_reason,
            "prompt_tokens": done.prompt_tokens,
            "generated_tokens": done.generated_tokens,
            "ttft_ms": round(first, 3),
            "ms_per_token": round(statistics.median(decode), 3) if spent else None,
            "draft_tokens": done.draft_tokens,
            "accepted_tokens": done.accepted_tokens,
            "tokens_per_s": round(1e3 * len(decode) / spent, 2) if spent else None,
            "policy": self.policy.name,
            "budget": self.policy.budget,
            "sampling": dataclasses.asdict(self.sampling),
            "actions": {action: round(share, 4) for action, share in done.actions.items()},
            "head": self.policy.head,
        }

    def line(self) -> str:
        """The summary after the text."""
        facts = self.figures()
        speed = facts["tokens_per_s"]
        accepted, drafted = facts["accepted_tokens"], facts["draft_tokens"]
        shares = ", ".join(f"{a} {share:.0%}" for a, share in facts["actions"].items())
        return (
            "["
            + (f"loaded in {self.load_ms / 1e3:.1f} s | " if self.load_ms is not None else "")
            + f"{facts['generated_tokens']} tokens"
            + (f", {speed:.1f} tokens/s" if speed else "")
            + f", first token after {facts['ttft_ms']:.0f} ms"
            + (f" | {shares}, {facts['head']} head" if shares else "")
            + (f" | {accepted} of {drafted} draft tokens accepted" if drafted else "")
            + f" | {self._drawn()} | {facts['finish_reason']}]"
        )

    def _drawn(self) -> str:
        """How tokens are sampled, as far as it differs from the default."""
        usual = Sampling()
        if self.sampling.temperature == 0:
            usual = dataclasses.replace(self.sampling, repetition_penalty=1.0)
        changed = [
            f"{field.name.replace('_', ' ')} {value:g}"
            for field in dataclasses.fields(Sampling)
            if field.name != "seed"
            and (value := getattr(self.sampling, field.name)) != getattr(usual, field.name)
        ]
        return ", ".join([*(["greedy"] if self.sampling.temperature == 0 else []), *changed])


def show(chunks: Iterable[Chunk], view: PathView | None) -> None:
    """Prints an answer as it arrives; on a terminal also its reasoning, dimmed unless coloured.

    Args:
        chunks: chunks of the answer.
        view: colours each token by its cost.
    """
    from dash_onnx.report.terminal import wants_colour

    dimmed = "\x1b[2m{}\x1b[0m" if wants_colour(sys.stdout) else "{}"
    thoughts = False  # whether reasoning was printed last
    for chunk in chunks:
        text = view.show(chunk) if view else chunk.text
        if chunk.reasoning:
            if sys.stdout.isatty() and not view:
                text = dimmed.format(chunk.reasoning)
            thoughts = bool(text)
        elif chunk.text and thoughts:
            text, thoughts = f"\n\n{text}", False
        print(text, end="", flush=True)
    print()
    if view:
        view.finish()


def path_view(model: Model, options: GenerationOptions, wanted: bool) -> PathView | None:
    """The view requested by `--show-path`."""
    if not wanted:
        return None
    from dash_onnx.report.terminal import PathView

    policy = model.policy_of(options)
    return PathView(model.text, model.manifest, policy)
