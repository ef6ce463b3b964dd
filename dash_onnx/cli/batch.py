"""dash-run --batch: answers the prompts in a file, several at once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_onnx.core.errors import PolicyError, SourceError
from dash_onnx.core.text import json_lines
from dash_onnx.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from dash_onnx.runtime.model import Model
    from dash_onnx.runtime.requests import Prompt
    from dash_onnx.runtime.stream import Completion


def read_batch(path: Path) -> list[tuple[Any, str | list[Any]]]:
    """The id of each line (by default its number), and its prompt or messages.

    Raises:
        SourceError: the file is missing, empty or not JSON lines, or a line has no prompt.
    """
    found: list[tuple[Any, str | list[Any]]] = []
    for where, record in json_lines(path):
        facts = record if isinstance(record, dict) else {"prompt": record}
        prompt = facts.get("prompt", facts.get("messages"))
        if not (isinstance(prompt, str) and prompt.strip()) and not isinstance(prompt, list):
            raise SourceError(f"{where} needs `prompt` (text) or `messages` (a list)")
        found.append((facts.get("id", len(found)), prompt))
    if not found:
        raise SourceError(f"{path} holds no prompt")
    return found


def run_batch(
    model: Model,
    lines: list[tuple[Any, str | list[Any]]],
    options: GenerationOptions,
    *,
    parallel: int,
    raw: bool,
    system: str | None,
) -> None:
    """Prints one JSON object per line for each prompt, as it is answered.

    Args:
        model: the loaded model.
        lines: result of `read_batch`.
        options: options of all generations.
        parallel: number of prompts that run at once.
        raw: whether prompts are text to continue, not messages.
        system: system message before each chat.

    Raises:
        DashError: a line cannot be answered; then no line is.
    """
    began = [{"role": "system", "content": system}] if system else []
    chat = not raw and (model.text.chat_template is not None or bool(system))
    prompts: list[Prompt] = []
    for _, prompt in lines:
        if isinstance(prompt, list):
            if raw:
                raise PolicyError("--raw continues text, but a line has `messages`")
            own = prompt and isinstance(prompt[0], dict) and prompt[0].get("role") == "system"
            prompts.append([*([] if own else began), *prompt])
        else:
            prompts.append([*began, {"role": "user", "content": prompt}] if chat else prompt)
    started, tokens = time.perf_counter(), 0

    def on_done(index: int, completion: Completion) -> None:
        nonlocal tokens
        tokens += completion.generated_tokens
        facts = {
            "id": lines[index][0],
            "text": str(completion),
            "reasoning": completion.reasoning,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "generated_tokens": completion.generated_tokens,
            "draft_tokens": completion.draft_tokens,
            "accepted_tokens": completion.accepted_tokens,
            "actions": {action: round(share, 4) for action, share in completion.actions.items()},
        }
        print(json.dumps(facts), flush=True)

    model.batch(prompts, options=options, parallel=parallel, on_done=on_done)
    seconds = time.perf_counter() - started
    print(
        f"[{len(lines)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s]",
        file=sys.stderr,
    )
