"""Chat templates that never end, or that fill the memory."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dash_onnx.core.template import render

LONG = "{% set s = 'x' * 9999999 %}"
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{% for a in range(9999) %}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
    "{% for a in range(99999) %}{% for b in range(999) %}{% set c = b %}{% endfor %}{% endfor %}",
    "{% set s = 'x' * 10**6 %}{% for a in range(99999) %}{% set c = s.count('a') %}{% endfor %}",
    "{% set l = range(99999) | list %}{% for a in l %}{% set c = -1 in l %}{% endfor %}",
    "{% for a in range(99999) %}{% set c = -1 in range(99999) | list %}{% endfor %}",
    "{% for a in range(99999) %}{% set c = range(99999) | select | list %}{% endfor %}",
    "{% for a in range(99999) %}{% set c = range(99999) | select('none') | first %}{% endfor %}",
    LONG + "{{ [" + "'xy' in s, " * 999 + "] | length }}",
    LONG + "{{ [" + "'xy' is in s, " * 999 + "] | length }}",
)
NESTED = (
    "{% set n = namespace(x=('x',), y=('x',)) %}{% for i in range(40) %}"
    "{% set n.x = (n.x, n.x) %}{% set n.y = (n.y, n.y) %}"
)
DOUBLING = "{% set n = namespace(x='x' * 999) %}{% for i in range(99) %}"
LARGE = (
    "{{ 2 ** 5000000 }}",
    "{{ 2 ** (-999999999) }}",
    "{% set n = namespace(x=2**50000) %}"
    "{% for i in range(9) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ ['x' * 10**7] * 10**3 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "{{ ('y' * 10**6).join('x' * 10**6) }}",
    "{{ 9 ** (9 ** 9) }}",
    DOUBLING + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    DOUBLING + "{% set n.x = n.x + n.x %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'x' * 10**6 }}{% endfor %}",
    "{{ ([5, 3] * 10**7) | sort | first }}",
    "{{ ('x ' * 10**6) | wordwrap(1, wrapstring='y' * 1000) }}",
    "{{ ('x ' * 30 * 10**6).split() | first }}",
    "{% for i in range(999) %}{% set a = ('x ' * 4 * 10**6).split() %}{% endfor %}",
    "{{ ('{0:999999}' * 900).format(1) }}",
    "{{ ('%999999d' * 900) % ((1,) * 900) }}",
    "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) }}",
    "{{ ('x' * 10**6).encode().replace('x'.encode(), ('y' * 10**6).encode()) }}",
    "{{ range(99999) | map('center', 10**6) | list | length }}",
    "{{ [1] | batch(10**9, 0) | list | length }}",
    "{{ ([[1] * 10**6] * 1000) | sum(start=[]) | length }}",
    "{% set l = ['x' * 10**6] * 10**6 %}{{ 'y' in l }}",
    LONG + "{{ [" + "s[1:], " * 999 + "] | length }}",
    LONG + "{{ s" + " ~ s" * 99 + " }}",
    "{{ [" + "1, " * 99999 + "] | length }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    *(
        NESTED + "{% endfor %}{{ " + shown + " }}"
        for shown in (
            "n.x",
            "n.x | tojson",
            "n.x | pprint",
            "n.x | string",
            "n.x | upper",
            "n.x ~ 'x'",
            "'%s' % n.x",
            "'{}'.format(n.x)",
            "n.x | join",
            "'x'.join(n.x)",
            "{'a': n.x}",
            "{n.x: 1} | length",
            "{'a': 1}[n.x]",
            "{'a': 1}.get(n.x)",
            "n.x == n.y",
            "1 if n.x is eq n.y",
            "n.x in [n.y]",
            "[n.x].count(n.y)",
            "[n.x] | unique | list | length",
            "[n.x, n.y] | sort | length",
            "[n.x] | select('eq', n.y) | list | length",
        )
    ),
)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of time is reached sooner."""
    monkeypatch.setattr("dash_onnx.core.template._MAX_SECONDS", 0.5)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("template", [*ENDLESS, *LARGE])
def test_a_template_without_measure_is_stopped(template: str) -> None:
    started = time.thread_time()
    with pytest.raises((TemplateError, RecursionError)):
        render(template, {})
    assert time.thread_time() - started < 3


@pytest.mark.usefixtures("soon")
def test_a_thread_has_a_limit_of_its_own() -> None:
    caught: list[Exception] = []

    def work() -> None:
        try:
            render(ENDLESS[0], {})
        except TemplateError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert render("{{ 1 + 1 }}", {}) == "2"
    thread.join(10)
    assert "did not end" in str(caught)


def test_a_long_conversation_is_far_from_the_limits() -> None:
    content = "the keeper counts 1234567890 ships\n" * 300
    messages = [{"role": "user", "content": content}] * 300
    template = (
        "{% for m in messages %}{% set c = m.content | trim | replace('\\n', ' ') %}"
        "{% if 'x' in c.split('</think>')[-1] %}{% endif %}"
        "{% if loop.index == messages | length and m.content.startswith('<tool_response>') %}"
        "{% endif %}{{ '<|' + m.role + '|>' ~ c ~ '%s' % c }}"
        "{{ '{}'.format(c) }}{{ 7 * 1000000 % 13 }}"
        "{% endfor %}"
    )
    assert len(render(template, {"messages": messages})) > 300 * 3 * len(content)


def test_a_loop_may_ask_for_the_length_of_all_messages() -> None:
    """As Qwen 3's does, in every turn; here with calls, as agents have them."""
    call = {"function": {"name": "count", "arguments": {"ships": 3, "ports": ["a", "b"]}}}
    turns = [{"role": "user", "content": "how many?"}, {"role": "assistant", "tool_calls": [call]}]
    template = (
        "{% for m in messages[::-1] %}{% set index = (messages|length - 1) - loop.index0 %}"
        "{{ index }}{% endfor %}"
    )
    began = time.monotonic()
    render(template, {"messages": turns * 1000})
    assert time.monotonic() - began < 1  # it took minutes to count what is in them


def test_a_debugger_sees_a_template_run() -> None:
    seen = []
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: seen.append(frame.f_code.co_filename))
    try:
        render("{% for n in range(2) %}{{ n }}{% endfor %}", {})
    finally:
        sys.settrace(before)
    assert "<template>" in seen


def test_what_is_counted_changes_no_text() -> None:
    template = (
        "{% macro m(x, y=2) %}{{ x ~ y }}{% endmacro %}{{ m('a') ~ none ~ 1.5 ~ m(3, 4) }}"
        "{% for a in [3, 1, 2] if a != 1 %}{{ loop.index }}{{ a > 2 }}{{ loop.last }}"
        "{% else %}none{% endfor %}{% for a in [] %}{% else %}none{% endfor %}"
        "{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}{{ {'a': 1}['a'] }}{{ 1 < 2 < 3 }}"
        "{{ x is defined }}{{ 7 is divisibleby 7 }}{{ 1 if 2 is not odd }}{{ 7 // 2 - 1 }}"
        "{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}"
    )
    plain = ImmutableSandboxedEnvironment().from_string(template).render()
    assert render(template, {}) == plain
