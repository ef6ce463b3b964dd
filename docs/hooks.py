"""What the site takes from elsewhere: pages at the root of the repository, and the tools' help."""

from __future__ import annotations

import contextlib
import io
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

_HELP = re.compile(r"^<!-- (dash-\w+) --help -->$", re.M)
_LOADED = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(?:https?:)?//[^>]*>')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, their links as seen from docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        for source, target in {**PAGES, "docs/": ""}.items():
            text = text.replace(f"]({source}", f"]({target}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the help of a tool where a page asks for it."""
    return _HELP.sub(lambda match: f"```text\n{help_of(match[1])}```", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuses a page that would load something from elsewhere."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    return output


def help_of(tool: str) -> str:
    """What `tool --help` prints."""
    os.environ |= {"COLUMNS": "80", "PYTHON_COLORS": "0"}
    (entry,) = entry_points(group="console_scripts", name=tool)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        entry.load()(["--help"])
    return text.getvalue()
