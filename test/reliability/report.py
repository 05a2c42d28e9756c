"""Write the outcomes of the campaign and of the soak into docs/reliability.md, between markers.

python test/reliability/report.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / 'docs'
PAGE = DOCS / 'reliability.md'
CAMPAIGN, SOAK = DOCS / 'data' / 'reliability.json', DOCS / 'data' / 'soak.json'


def _seconds(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


def campaign_table(result: dict) -> str:
    """Return the table of the faults."""
    faults = result['faults']
    rests = [fault['rest_s'] for fault in faults if fault['rest_s'] is not None]
    shares = result['largest_share_of_limit']
    most = max(shares, key=shares.get)
    lines = [f'{len(faults)} kinds of fault, {result["failed"]} with another outcome than '
             f'declared; {result["outside_limits"]} of {result["commands"]} commands outside the '
             f'limits; at rest after {max(rests):.2f} s at most. Largest share of a limit that '
             f'was seen: {shares[most]:.3f} ({most}).', '',
             '| fault | expected | outside the limits | at rest after, s | reason told after, s | '
             'moves again after, s | memory, MiB |', '|---|---|---|---|---|---|---|']
    for fault in faults:
        growth = 'new process' if fault['growth_mib'] is None else f'{fault["growth_mib"]:+.1f}'
        lines.append(f'| {fault["name"]}{" **(failed)**" if fault["problems"] else ""} | '
                     f'{fault["expected"]} | {fault["outside_limits"]} of {fault["commands"]} | '
                     f'{_seconds(fault["rest_s"])} | {_seconds(fault["told_s"])} | '
                     f'{_seconds(fault["recovered_s"])} | {growth} |')
    return '\n'.join(lines)


def soak_table(result: dict) -> str:
    """Return the figures of the soak."""
    from reliability.soak import verdict
    return verdict(result)


def written(text: str, marker: str, content: str) -> str:
    """Return the page with what stands between a marker's two ends replaced."""
    pattern = f'(<!-- {marker} -->\n).*?(<!-- /{marker} -->)'
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f'the page has no <!-- {marker} --> and <!-- /{marker} -->')
    return re.sub(pattern, lambda match: match[1] + content + '\n' + match[2], text,
                  flags=re.DOTALL)


def page(text: str) -> str:
    """Return the page with the tables of the data that there are."""
    for path, marker, table in ((CAMPAIGN, 'faults', campaign_table),
                                (SOAK, 'soak', soak_table)):
        if path.is_file():
            text = written(text, marker, table(json.loads(path.read_text())))
    return text


if __name__ == '__main__':
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]),
                    str(Path(__file__).resolve().parents[2])]
    PAGE.write_text(page(PAGE.read_text()))
