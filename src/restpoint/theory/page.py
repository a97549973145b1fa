"""One page of all studies: pictures, what they come to, and where the questions are from. It needs no network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from restpoint.files import write
from restpoint.theory.study import Study

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #767676; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
padding-top: 1.2rem; }
img { display: block; width: 100%; height: auto; background: white; border-radius: 6px; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.papers { color: var(--faint); font-size: .85rem; }
nav a { margin-right: 1rem; }
"""


def write_page(studies: Sequence[Study], folder: Path) -> Path:
    """Write ``index.html`` beside the pictures that :func:`draw` has written there, complete or not at all.

    The pictures are inside the page, so it can be sent by itself.

    Args:
        studies: at least one, whose pictures are in the folder.
        folder: where to write.

    Returns:
        The page.

    Raises:
        RestpointError: the page cannot be written.
    """
    links = " ".join(f'<a href="#{escape(study.name)}">{escape(study.name)}</a>' for study in studies)
    sections = "\n".join(_section(study, folder / f"{study.name}.png") for study in studies)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tokens as interacting particles</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Tokens as interacting particles</h1>
<nav>{links}</nav>
{sections}
</body>
</html>
"""
    path = folder / "index.html"
    write(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def _section(study: Study, picture: Path) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value if isinstance(value, str) else f'{value:.4g}')}</td></tr>"
        for name, value in study.facts.items()
    )
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    papers = "<br>".join(escape(paper) for paper in study.papers)
    return f"""<section id="{escape(study.name)}">
<h2>{escape(study.title)}</h2>
<img src="data:image/png;base64,{image}" alt="{escape(study.title)}">
<table>{rows}</table>
<p>All numbers: <a href="{escape(study.name)}.csv">{escape(study.name)}.csv</a></p>
<p class="papers">{papers}</p>
</section>"""
