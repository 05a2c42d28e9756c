"""The graph for an hour, with faults drawn at random: latency and memory of the node per minute.

python test/reliability/soak.py --minutes 60 --out docs/data/soak.json --plot docs/soak.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from reliability.campaign import line  # noqa: E402
from reliability.faults import all_faults  # noqa: E402
from reliability.graph import MODEL, Graph  # noqa: E402
from reliability.trial import attempt, prepare  # noqa: E402

QUIET_S = (2.0, 5.0)      # without a fault, between two
SETTLE_S = 0.5            # after a fault, before latencies count
SETTLING_MINUTES = 5      # of a long soak, before slopes count
FLAT = {'p99_ms_per_hour': 1.0, 'memory_mib_per_hour': 1.0}     # less is nothing to a user
VIOLATIONS_KEPT = 50      # the last ones; most come with a fault, and stand there too


def quiet(graph: Graph, seconds: float) -> list[float]:
    """Let the robot move; return the chunks' ages when they arrived, seconds."""
    time.sleep(SETTLE_S)
    since_s, since_ns = time.monotonic(), time.time_ns()
    time.sleep(seconds)
    offset_ns = since_ns - round(since_s * 1e9)       # of the clocks of stamps and arrivals
    return [at + (offset_ns - stamp_ns) / 1e9 for at, stamp_ns in list(graph.chunks)
            if at >= since_s]


def soak(graph: Graph, minutes: float, seed: int, told=print) -> dict:
    """Run, and return what is written as JSON."""
    draw = random.Random(seed)
    faults = [dataclasses.replace(fault, node=MODEL) for fault in all_faults() if fault.soak]
    rows, failures, counts = [], [], 0
    prepare(graph, faults[0])
    begin_s = time.monotonic()
    process = graph._processes['node']
    crashes = 0
    while time.monotonic() < begin_s + 60 * minutes:
        minute_s, ages, done = time.monotonic(), [], 0
        while time.monotonic() < min(minute_s + 60, begin_s + 60 * minutes):
            ages += quiet(graph, draw.uniform(*QUIET_S))
            outcome = attempt(graph, draw.choice(faults))
            done += 1
            if outcome.problems:
                failures.append({'minute': len(rows), 'fault': outcome.name,
                                 'problems': outcome.problems})
                told(line(outcome))
            if graph._processes.get('node') is not process:
                crashes += 1
                prepare(graph, faults[0])
                process = graph._processes['node']
        counts += done
        p50, p99 = np.percentile(ages, [50, 99]) * 1e3
        rows.append({'minute': len(rows), 'chunks': len(ages), 'p50_ms': round(p50, 2),
                     'p99_ms': round(p99, 2), 'memory_mib': round(graph.memory_mib(), 2),
                     'faults': done, 'outside_limits': graph.checker.violated})
        told(', '.join(f'{key} {value}' for key, value in rows[-1].items()))
    return {'minutes': round((time.monotonic() - begin_s) / 60, 1), 'seed': seed,
            'faults': counts, 'crashes': crashes, 'commands': graph.checker.commands,
            'outside_limits': graph.checker.violated,
            'violations': list(graph.checker.violations)[-VIOLATIONS_KEPT:], 'failures': failures,
            'p99_ms_per_hour': slope(rows, 'p99_ms'),
            'memory_mib_per_hour': slope(rows, 'memory_mib'), 'rows': rows}


def slope(rows: list[dict], key: str) -> dict | None:
    """Return the slope of a quantity per hour and its standard error; None for a short soak.

    Ordinary least squares over the minutes, the first ones left out.
    """
    rows = rows[SETTLING_MINUTES:]
    if len(rows) < 5:
        return None
    hours = np.array([row['minute'] for row in rows]) / 60
    values = np.array([row[key] for row in rows])
    centred = hours - hours.mean()
    gradient = centred @ values / (centred @ centred)
    rest = values - values.mean() - gradient * centred
    error = np.sqrt(rest @ rest / (len(rows) - 2) / (centred @ centred))
    return {'slope': round(float(gradient), 3), 'error': round(float(error), 3),
            'mean': round(float(values.mean()), 3)}


def grows(result: dict, key: str) -> bool:
    """Whether a slope is beyond twice its standard error, and more than nothing to a user."""
    trend = result[key]
    return bool(trend) and trend['slope'] > max(2 * trend['error'], FLAT[key])


def verdict(result: dict) -> str:
    """Return in words what came of it, and whether anything grew."""
    words = [f'{result["minutes"]:g} minutes, {result["faults"]} faults, {result["crashes"]} '
             f'crashes, {result["outside_limits"]} of {result["commands"]} commands outside the '
             f'limits, {len(result["failures"])} faults with another outcome than declared']
    for key, unit in (('p99_ms_per_hour', 'latency p99: {:+.2f} +- {:.2f} ms per hour around '
                       '{:.1f}'), ('memory_mib_per_hour', 'memory: {:+.2f} +- {:.2f} MiB per '
                                   'hour around {:.1f}')):
        if result[key]:
            trend = result[key]
            words.append(unit.format(trend['slope'], trend['error'], trend['mean'])
                         + (' (grows)' if grows(result, key) else ' (flat)'))
    return '; '.join(words)


def failed(result: dict) -> bool:
    """Whether there was a crash, another outcome than declared, a broken limit, or growth."""
    return bool(result['crashes'] or result['outside_limits'] or result['failures']
                or any(grows(result, key) for key in FLAT))


def plot(result: dict, path: Path) -> None:
    """Draw latency and memory over the minutes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7.0, 4.2), layout='constrained')
    above, below = figure.subplots(2, sharex=True)
    minutes = [row['minute'] for row in result['rows']]
    for key, label in (('p99_ms', 'p99'), ('p50_ms', 'p50')):
        above.plot(minutes, [row[key] for row in result['rows']], label=label)
    above.set_ylabel('picture to chunk, ms')
    above.set_ylim(0, 1.2 * max(row['p99_ms'] for row in result['rows']))
    above.legend(loc='upper right')
    below.plot(minutes, [row['memory_mib'] for row in result['rows']], color='tab:green')
    below.set_ylabel('anonymous memory, MiB')
    below.set_ylim(0, 1.2 * max(row['memory_mib'] for row in result['rows']))
    below.set_xlabel('minute')
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    """Run the soak; the exit status is 1 if it has `failed`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=60.0)
    parser.add_argument('--rate', type=float, default=30.0, help='of pictures, Hz')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--out', type=Path, help='write the figures as JSON')
    parser.add_argument('--plot', type=Path, help='draw them as PNG')
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as out, Graph(
            Path(out), rate_hz=arguments.rate) as graph:
        result = {'rate_hz': arguments.rate, **soak(
            graph, arguments.minutes, arguments.seed, lambda text: print(text, flush=True))}
    print(verdict(result))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')
    if arguments.plot:
        plot(result, arguments.plot)
    return int(failed(result))


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
