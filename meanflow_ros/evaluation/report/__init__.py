"""report.html: one file that opens offline; `page` puts data, style and script into it."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path

_PARTS = ('report.css', 'charts.js', 'timeline.js', 'report.js')


class Media:
    """Pictures and videos of a page, each held once; `add` returns what the page calls them."""

    def __init__(self):
        self.held: list[str] = []
        self._known: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        """Return the number of a JPEG or MP4."""
        if data not in self._known:
            self._known[data] = len(self.held)
            self.held.append(base64.b64encode(data).decode())
        return self._known[data]


def write_page(path: Path, title: str, data: dict) -> None:
    """Write report.html; the file is whole or as it was before.

    data: what report.js draws, see docs/replay.md. NaN is refused: it is not JSON.
    """
    folder = files(__package__)
    page = (folder / 'report.html').read_text(encoding='utf-8')
    for name in _PARTS:
        page = page.replace(f'/*{name}*/', (folder / name).read_text(encoding='utf-8'))
    content = json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
    page = page.replace('<!--title-->', _escaped(title)).replace('<!--data-->', content)
    partial = path.with_name(path.name + '.partial')
    partial.write_text(page, encoding='utf-8')
    partial.replace(path)


def _escaped(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
