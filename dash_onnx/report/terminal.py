"""Generated tokens with the cost of each, in a terminal or as plain lines."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from dash_onnx.core.actions import SKIP, path_letters
from dash_onnx.core.budget import reference_ms
from dash_onnx.core.manifest import Manifest
from dash_onnx.core.policy import Policy, ScoredPolicy
from dash_onnx.core.text import TextCodec
from dash_onnx.report.tokens import visible

if TYPE_CHECKING:
    from dash_onnx.runtime.results import Chunk

_RAMP = (114, 150, 186, 222, 216, 210, 203)
"""256-colour backgrounds from green over yellow to red, all light enough for black letters."""

_BLACK = 16
_REACH = 0.15  # ends of the ramp for a scored policy, as a fraction of the budget to either side
_WIDTH = 16  # of a token in the plain table


class PathView:
    """Shows the tokens of one generation.

    The first token has no cost of its own: it comes from the prompt's pass.
    """

    def __init__(
        self, codec: TextCodec, manifest: Manifest, policy: Policy, colour: bool | None = None
    ):
        """Prepares one generation.

        Args:
            codec: decodes single tokens.
            manifest: provides the profiled costs.
            policy: policy of the generation.
            colour: False keeps the text plain; None detects a terminal.
        """
        self.colour = wants_colour(sys.stdout) if colour is None else colour
        self._codec, self._costs, self._policy = codec, manifest.costs, policy
        self._low, self._high = _ends(manifest, policy)
        self._lines: list[str] = []
        self._count = 0

    def show(self, chunk: Chunk) -> str:
        """The text to print for a chunk. Text that was held back takes its last token's colour."""
        self._count += 1
        if self._count == 1:
            return chunk.reasoning + chunk.text if self.colour else self._noted(chunk, "prompt")
        ms = self._policy.cost_ms(chunk.path, self._costs)
        if not self.colour:
            return self._noted(chunk, f"{ms:.2f}")
        return paint(chunk.reasoning + chunk.text, self._shade(ms))

    def finish(self) -> None:
        """Prints what belongs below the text: the legend on stderr, or the table on stdout."""
        if self.colour:
            print(self._legend(), file=sys.stderr)
        elif self._lines:
            print("\n".join(self._lines))

    def _noted(self, chunk: Chunk, cost: str) -> str:
        text = visible(self._codec.piece(chunk.token), _WIDTH)
        self._lines.append(f"{text:<{_WIDTH}} {cost:>7} {path_letters(chunk.path)}")
        return chunk.text

    def _shade(self, ms: float) -> int:
        share = (ms - self._low) / (self._high - self._low)
        return _RAMP[min(max(int(share * len(_RAMP)), 0), len(_RAMP) - 1)]

    def _legend(self) -> str:
        ramp = "green to red"
        if wants_colour(sys.stderr):
            ramp = "".join(paint("  ", shade) for shade in _RAMP)
        middle = ""
        if self._policy.scored:
            middle = f", the middle is the budget of {(self._low + self._high) / 2:.2f} ms"
        elif self._policy.uniform is not None:
            middle = ", and all tokens run on one path"
        return f"[cost per token: {self._low:.2f} ms {ramp} {self._high:.2f} ms{middle}]"


def _ends(manifest: Manifest, policy: Policy) -> tuple[float, float]:
    """Milliseconds at both ends of the ramp.

    For a scored policy, a range around the budget, since tokens differ by less than the actions
    allow; else everything from skipping all layers but the first up to the reference.
    """
    full = reference_ms(manifest)
    if isinstance(policy, ScoredPolicy):
        middle = policy.budget * full
        return (1 - _REACH) * middle, (1 + _REACH) * middle
    layers = manifest.model.num_layers
    path = (manifest.variants[-1], *(SKIP for _ in range(layers - 1)))
    low = policy.cost_ms(path, manifest.costs)
    return min(low, 0.99 * full), full


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal and the user has not disabled colours."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, shade: int) -> str:
    """Text with a background colour; not across line breaks, which would colour the whole line."""
    start, end = f"\x1b[48;5;{shade};38;5;{_BLACK}m", "\x1b[0m"
    return "\n".join(f"{start}{line}{end}" if line else "" for line in text.split("\n"))
