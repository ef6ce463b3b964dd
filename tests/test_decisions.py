"""docs/decisions: every decision has the same form, and the index lists it."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs/decisions"
FILES = sorted(FOLDER.glob("[0-9]*.md"))
FORM = re.compile(
    r"# (?P<number>\d{4})\. (?P<title>[^\n]+)\n\n"
    r"- Status: (?P<status>accepted|rejected \([^\n]+\)|superseded by \d{4})\n"
    r"- Date: \d{4}-\d{2}-\d{2}\n\n"
    r"\*\*Context\.\*\* .+\n\n\*\*Decision\.\*\* .+\n\n\*\*Evidence\.\*\* .+",
    re.DOTALL,
)


def test_the_index_lists_every_decision_as_its_file_states_it() -> None:
    rows = []
    for number, file in enumerate(FILES, 1):
        found = FORM.fullmatch(file.read_text("utf-8"))
        assert found and int(found["number"]) == number == int(file.name[:4]), file.name
        rows.append(f"| [{found['number']}]({file.name}) | {found['title']} | {found['status']} |")
    listed = (FOLDER / "index.md").read_text("utf-8").splitlines()
    assert [line for line in listed if line.startswith("| [")] == rows
