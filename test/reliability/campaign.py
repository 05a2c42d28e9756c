"""Every fault, one after another, on a real graph of processes; a table of what came of each.

python test/reliability/campaign.py --out docs/data/reliability.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from reliability.faults import CYCLES, Fault, all_faults  # noqa: E402
from reliability.graph import Graph  # noqa: E402
from reliability.trial import Outcome, attempt  # noqa: E402


def run(graph: Graph, faults: list[Fault], told=print) -> list[Outcome]:
    """Try the faults in turn; `told` gets a line about each."""
    outcomes = []
    for number, fault in enumerate(faults, 1):
        outcomes.append(attempt(graph, fault))
        told(f'{number:3}/{len(faults)} {line(outcomes[-1])}')
    return outcomes


def line(outcome: Outcome) -> str:
    """Return an outcome in one line, with its problems below it."""
    def seconds(value):
        return '  -   ' if value is None else f'{value:5.2f}s'

    growth = '-' if outcome.growth_mib is None else f'{outcome.growth_mib:+.1f}'
    text = (f'{"ok  " if not outcome.problems else "FAIL"} {outcome.name:48} '
            f'{outcome.expected:8} rest {seconds(outcome.rest_s)} told {seconds(outcome.told_s)} '
            f'again {seconds(outcome.recovered_s)} outside {outcome.outside_limits} '
            f'of {outcome.commands}, memory {growth} MiB')
    return '\n'.join([text, *(f'        {problem}' for problem in outcome.problems)])


def document(outcomes: list[Outcome], worst: dict[str, float], refused: dict[str, int],
             seconds: float) -> dict:
    """Return what is written as JSON; refused: messages by the controllers, and those lost."""
    return {'seconds': round(seconds), 'lifecycle_cycles': CYCLES,
            'commands': sum(outcome.commands for outcome in outcomes),
            'outside_limits': sum(outcome.outside_limits for outcome in outcomes),
            'failed': sum(bool(outcome.problems) for outcome in outcomes),
            'largest_share_of_limit': {name: round(value, 4)
                                       for name, value in sorted(worst.items())},
            'refused': dict(sorted(refused.items())),
            'faults': [{key: round(value, 3) if isinstance(value, float) else value
                        for key, value in dataclasses.asdict(outcome).items()}
                       for outcome in outcomes]}


def main(argv=None) -> int:
    """Run the campaign; the exit status is 1 if a fault had another outcome than declared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, help='write the outcomes as JSON')
    parser.add_argument('--only', action='append', metavar='NAME',
                        help='only faults whose name contains this; may be repeated')
    parser.add_argument('--short', action='store_true', help='only those that make test runs')
    parser.add_argument('--list', action='store_true', help='list the faults and end')
    arguments = parser.parse_args(argv)
    faults = [fault for fault in all_faults()
              if (not arguments.only or any(part in fault.name for part in arguments.only))
              and (fault.short or not arguments.short)]
    if arguments.list:
        print('\n'.join(fault.name for fault in faults))
        return 0
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as out, Graph(Path(out)) as graph:
        outcomes = run(graph, faults, lambda text: print(text, flush=True))
        worst = dict(graph.checker.worst)
        refused = dict(graph.checker.refused)
    result = document(outcomes, worst, refused, time.monotonic() - begin_s)
    print(f'{len(outcomes)} faults, {result["failed"]} with another outcome than declared; '
          f'{result["outside_limits"]} of {result["commands"]} commands outside the limits; '
          f'refused by the controllers: {refused or "none"}; {result["seconds"]} s')
    print('largest share of a limit: ' + ', '.join(
        f'{name} {value:.3f}' for name, value in sorted(worst.items())))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + '\n')
    return int(result['failed'] > 0)


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
