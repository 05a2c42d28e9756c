"""A plot of latency by technique, from what `bench --out` has written.

python -m meanflow_ros.evaluation.bench.plot latency.png bench.json [another.json ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

COLOURS = {'flower': '#b0b0b0', 'policy': '#7aa6d8', 'fast': '#1f5fa8'}


def draw(path: Path, documents: list[dict]) -> None:
    """Draw the median of every row as a bar, up to its 99th percentile a line; milliseconds.

    Of a row that several documents have, that of the first is drawn.
    """
    from matplotlib.figure import Figure
    rows = {(row['technique'], row['nfe']): row
            for document in reversed(documents) for row in document['rows']}
    rows = sorted(rows.values(), key=lambda row: -row['host_ms']['p50'])
    figure = Figure(figsize=(8, 0.7 + 0.32 * len(rows)), layout='constrained')
    axes = figure.subplots()
    for place, row in enumerate(rows):
        times = row['host_ms']
        axes.barh(place, times['p50'], color=COLOURS[row['technique'].split()[0]])
        axes.plot([times['p50'], times['p99']], [place, place], color='black', linewidth=1)
        axes.text(times['p99'] * 1.06, place, f'{times["p50"]:.2f} ms', va='center', fontsize=8)
    axes.set_yticks(range(len(rows)), [f'{row["technique"]}, NFE {row["nfe"]}' for row in rows],
                    fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale('log')
    axes.set_xlim(left=1.0, right=2.2 * max(row['host_ms']['p99'] for row in rows))
    axes.set_xlabel('pictures in memory to chunk, ms: median, and a line to the 99th percentile')
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=140)


def main(argv=None) -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('picture', type=Path)
    parser.add_argument('results', type=Path, nargs='+')
    arguments = parser.parse_args(argv)
    draw(arguments.picture, [json.loads(path.read_text()) for path in arguments.results])
    return 0


if __name__ == '__main__':
    sys.exit(main())
