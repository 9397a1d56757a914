"""A report as one HTML file that needs nothing else: style and drawings inside, no network, no script needed to read it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from v4sdk.errors import V4Error
from v4sdk_bench.report.charts import WIDE
from v4sdk_bench.report.numbers import ABSENT
from v4sdk_bench.report.page import Block, Figures, Page, Table, Text

GENERATOR = "v4sdk bench report"
_FOLDER = Path(__file__).parent
# paper shows what a screen folds away; everything else works without it
_SCRIPT = "addEventListener('beforeprint',()=>document.querySelectorAll('details.folded').forEach(d=>{d.open=true}))"


def render(page: Page) -> str:
    """The whole file. Every value is escaped: a record is somebody else's text.

    Raises:
        V4Error: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as exc:
        raise V4Error(
            f"an HTML report needs {exc.name}, which is not installed",
            hint="pip install 'v4sdk[bench]', or --markdown",
        ) from exc
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        page=page,
        generator=GENERATOR,
        # drawn by ElementTree, which escapes; style and script are this package's own
        drawing=Markup,
        style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(_SCRIPT),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        kind=kind,
        absent=ABSENT,
        wide=WIDE,
    )


def kind(block: Block) -> str:
    """What a template calls a block."""
    if isinstance(block, Table):
        return "table"
    return "figures" if isinstance(block, Figures) else "text" if isinstance(block, Text) else "unknown"
