"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dash_onnx.report import charts
from dash_onnx.report.facts import CurvePoint
from dash_onnx.report.picture import picture
from dash_onnx.report.report import Report
from dash_onnx.report.sample import Measured
from dash_onnx.report.stats import Analysis
from dash_onnx.report.style import STYLE
from dash_onnx.report.svg import number

_TIMES = "\u00d7"
_NAMES = {
    "full": "full",
    "int8": "INT8",
    "int4": "INT4",
    "skip": "skip",
}


def render(report: Report) -> str:
    """The page."""
    sections = (
        _curve(report),
        _sample(report),
        _section(
            "Training",
            "How the scorer learned: means over each tenth of the steps. The multiplier of time is "
            "drawn anew for every sequence, so that cost and KL are those of the whole range.",
            charts.learning(report.training),
        ),
        _layers(report),
        _section("Provenance", "", _facts(report.provenance)),
    )
    style = STYLE + _tab_rules(len(report.sample.runs))
    name = escape(report.model)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DASH report: {name}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{name}</h1>\n"
        '<div class="soft">What the trained policy does with each token and layer, what that '
        "costs, and how well it knows.</div>\n"
        f"{_tiles(report)}</header>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _tiles(report: Report) -> str:
    tiles = "".join(
        f'<div class="tile"><span class="soft">{escape(preset.name)}</span>'
        f"<b>{1 / preset.cost:.2f}{_TIMES}</b>"
        f'<span class="soft">as fast · KL {number(preset.kl)} · {preset.cost:.1%} of '
        f"{report.full_ms:.1f} ms</span></div>"
        for preset in report.curve.presets
    )
    return f'<div class="tiles">{tiles}</div>'


def _section(heading: str, intro: str, body: str) -> str:
    text = f"<p class=soft>{intro}</p>" if intro else ""
    return f"<section>\n<h2>{heading}</h2>\n{text}\n{body}\n</section>"


def _curve(report: Report) -> str:
    curve = report.curve
    legend = _legend(
        ("k-dash", "dash: decided per token and layer"),
        ("k-static", "best static assignments"),
        *([("k-uniform", "one precision for all layers")] if curve.uniform else []),
        ("k-preset", "presets"),
    )
    intro = (
        "KL(reference ‖ policy) of the next token over the mean cost of a token, on tokens held "
        "out of the training; both axes logarithmic, a hollow point lost nothing. Lower and "
        "further left is better. Costs are profiled milliseconds "
        "through the runtime's own dispatch, the scorer's included."
    )
    rows = [_curve_row(report, "dash", point) for point in curve.dash]
    rows += [_curve_row(report, "static", point) for point in curve.static]
    rows += [_curve_row(report, f"all {_NAMES[a]}", point) for a, point in curve.uniform.items()]
    presets = [
        [
            p.name,
            f"{p.cost:.1%}",
            f"{1 / p.cost:.2f}{_TIMES}",
            number(p.kl),
            "",
            *[""] * _width(report),
        ]
        for p in curve.presets
    ]
    head = ["policy", "cost", "speed", "KL (nats)", "head"]
    head += [*(_NAMES[action] for action in report.actions), "path"]
    table = _table(head, presets + rows, bold=len(presets))
    return _section(
        "Speed against quality",
        intro,
        legend
        + charts.speed_quality(curve)
        + f"<details><summary>the same numbers as a table</summary>{table}</details>",
    )


def _width(report: Report) -> int:
    return len(report.actions) + 1


def _curve_row(report: Report, name: str, point: CurvePoint) -> list[str]:
    shares = [f"{point.shares.get(action, 0.0):.0%}" for action in report.actions]
    numbers = [f"{point.cost:.1%}", f"{1 / point.cost:.2f}{_TIMES}", number(point.kl)]
    return [name, *numbers, point.head, *shares, point.path]


def _sample(report: Report) -> str:
    sample = report.sample
    text = "".join(token.text for token in sample.tokens)
    tabs, panels = [], []
    for index, run in enumerate(sample.runs):
        checked = " checked" if index == _first_tab(sample.runs) else ""
        tabs.append(
            f'<input type="radio" name="tab" id="t{index}"{checked}>'
            f'<label for="t{index}">{escape(_tab_name(run))}</label>'
        )
        panels.append(
            f'<div class="tab" id="p{index}">{_run(report, run, report.analyses[index])}</div>'
        )
    intro = (
        f"{len(sample.tokens)} tokens ({escape(sample.source)}), fed to the model one by one under "
        "the policy; the reference runs the same tokens at the highest precision."
    )
    return _section(
        "One text, token by token",
        intro,
        f"<blockquote>{escape(text)}</blockquote>"
        + _comparison(report)
        + f'<div class="tabs">{"".join(tabs)}{"".join(panels)}</div>',
    )


def _comparison(report: Report) -> str:
    sample = report.sample
    rows = []
    for run in (*sample.runs, *sample.baselines):
        within = f" within {run.budget:.1%}" if not run.predicted and run.budget else ""
        cost, kl = sum(run.cost) / len(run.cost), sum(run.kl) / len(run.kl)
        rows.append([run.name + within, f"{cost:.1%}", number(kl), f"{run.top1:.1%}", run.head])
    return _table(["on this text", "mean cost", "mean KL", "same top-1", "head"], rows)


def _run(report: Report, run: Measured, analysis: Analysis) -> str:
    actions = report.actions
    legend = _legend(*((f"a-{action}", _NAMES[action]) for action in actions))
    kept = analysis.calibration.rank_correlation
    total = (sum(run.predicted) / len(run.kl), sum(run.kl) / len(run.kl))
    return (
        "<h3>Which layer does what for which token</h3>"
        '<p class="soft">A column is a token with its text below, a row a layer, layer 0 on top. '
        "The line above is the token's cost, dashed where the budget lies. A dot is a space.</p>"
        f"{legend}{picture(run, report.sample.tokens, actions)}"
        "<h3>How often each layer does what</h3>"
        f"{legend}{charts.layer_bars(analysis.layers)}"
        "<h3>Which tokens are cheap</h3>"
        f"{_kinds(analysis)}"
        "<h3>Does the scorer know what it costs?</h3>"
        '<p class="soft">Predicted KL of the actions taken, summed over the layers, against the '
        "KL that the token really lost. Large dots: means of a tenth of the tokens each, with the "
        "middle half; small dots: tokens; dashed: a perfect prediction. Mean predicted "
        f"{number(total[0])}, realised {number(total[1])} nats; rank correlation {kept:.2f}. The "
        "prediction is of the layers alone; the realised KL holds the rounding of the LM head "
        f"({escape(run.head)}) and of earlier tokens' K/V as well.</p>"
        f"{charts.calibration(analysis.calibration, run.predicted, run.kl)}"
    )


def _kinds(analysis: Analysis) -> str:
    most = max(facts.skipped for facts in analysis.kinds) or 1.0
    dearest = max(facts.cost for facts in analysis.kinds)
    rows = [
        [
            facts.kind,
            str(facts.tokens),
            _bar(facts.cost / dearest, "a-int8") + f"{facts.cost:.1%}",
            _bar(facts.skipped / most, "a-skip") + f"{facts.skipped:.1%}",
            number(facts.kl),
        ]
        for facts in analysis.kinds
    ]
    return _table(["class", "tokens", "mean cost", "skipped", "mean KL"], rows, raw=(2, 3))


def _bar(share: float, style: str) -> str:
    return f'<span class="bar {style}" style="width:{80 * share:.0f}px"></span>'


def _layers(report: Report) -> str:
    rows = []
    lossy = report.actions[1:]
    for index, (facts, costs) in enumerate(zip(report.layers, report.costs.layers_ms, strict=True)):
        errors = [number(facts.relative_error.get(action, 0.0)) for action in lossy]
        times = [f"{costs[action]:.3f}" for action in report.actions]
        rows.append([str(index), f"{facts.cosine:.3f}", f"{facts.scale:.3g}", *errors, *times])
    head = ["layer", "cosine", "scale", *(f"error {_NAMES[action]}" for action in lossy)]
    head += [f"{_NAMES[action]} ms" for action in report.actions]
    heads = ", ".join(f"{head} {ms:.2f} ms" for head, ms in report.costs.heads_ms.items())
    intro = (
        "Cosine: of a layer's input and output. Scale: what a skipped layer multiplies its input "
        "by. Error: of the output, relative to full precision. Besides the layers a token costs "
        f"{report.costs.embed_ms:.2f} ms for the embedding, {report.costs.scorer_ms:.2f} ms for "
        f"the scorer and the LM head ({heads})."
    )
    table = f"<details><summary>{len(rows)} layers</summary>{_table(head, rows)}</details>"
    return _section("Layers", intro, table)


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def _legend(*entries: tuple[str, str]) -> str:
    shown = "".join(f'<span><i class="{key}"></i>{escape(name)}</span>' for key, name in entries)
    return f'<div class="legend">{shown}</div>'


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], raw: Sequence[int] = (), bold: int = 0
) -> str:
    """A table; cells of the columns `raw` are HTML, the first `bold` rows stand out."""
    lines = []
    for count, row in enumerate(rows):
        cells = "".join(
            f"<td{_cell_class(head[at])}>{cell if at in raw else escape(cell)}</td>"
            for at, cell in enumerate(row)
        )
        lines.append(f"<tr{' class=preset-row' if count < bold else ''}>{cells}</tr>")
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="scroll"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell_class(name: str) -> str:
    return " class=path" if name == "path" else ""


def _tab_name(run: Measured) -> str:
    return f"{run.name.partition(':')[2] or 'balanced'} ({run.budget:.1%})"


def _first_tab(runs: Sequence[Measured]) -> int:
    names = [run.name for run in runs]
    return names.index("dash:balanced") if "dash:balanced" in names else 0


def _tab_rules(count: int) -> str:
    return "".join(f"#t{i}:checked ~ #p{i} {{ display: block; }}\n" for i in range(count))
