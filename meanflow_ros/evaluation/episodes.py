"""The result of an episode, and what many of them say."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from meanflow_ros.evaluation.smoothness import Smoothness


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How one episode went.

    starved_steps: control steps without a due action. Latencies are those of the network, ms;
    nan where no chunk was made. mode: how a success was done, where the task leaves it open.
    execution, delay_steps: how chunks were followed and how late they came. smoothness: of the
    commands, where that was asked for.
    """

    task: str
    seed: int
    instruction: str
    success: bool
    steps: int
    starved_steps: int
    chunks: int
    latency_p50_ms: float
    latency_p99_ms: float
    mode: str = ''
    execution: str = 'receding_horizon'
    delay_steps: int = 0
    smoothness: Smoothness | None = None


def success_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate (Wilson 1927)."""
    z, share = 1.96, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total ** 2)) / (
        1 + z * z / total)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def summarize(results: list[EpisodeResult]) -> dict[str, dict[str, object]]:
    """Return per task the success rate, its interval, median steps and network latency.

    Where successes have modes, `modes` counts them.
    """
    summary = {}
    for task in dict.fromkeys(result.task for result in results):
        own = [result for result in results if result.task == task]
        successes = sum(result.success for result in own)
        low, high = success_interval(successes, len(own))
        summary[task] = {
            'episodes': len(own), 'successes': successes, 'rate': successes / len(own),
            'low': low, 'high': high, 'steps': float(np.median([r.steps for r in own])),
            'latency_p50_ms': float(np.median([r.latency_p50_ms for r in own]))}
        modes = Counter(result.mode for result in own if result.mode)
        if modes:
            summary[task]['modes'] = dict(sorted(modes.items()))
    return summary


def print_summary(summary: dict[str, dict[str, object]]) -> None:
    """Print a table of what `summarize` returned."""
    print(f'{"task":22} {"success":>9} {"rate":>6}  {"95 % interval":15} {"steps":>6} '
          f'{"p50 ms":>7}')
    for task, row in summary.items():
        modes = ', '.join(f'{mode} {count / row["successes"]:.0%}'
                          for mode, count in row.get('modes', {}).items())
        print(f'{task:22} {row["successes"]:>4}/{row["episodes"]:<4} {row["rate"]:6.1%}  '
              f'{row["low"]:6.1%} - {row["high"]:6.1%} {row["steps"]:6.0f} '
              f'{row["latency_p50_ms"]:7.1f}  {modes}'.rstrip())
