"""Execution modes compared while chunks come late: success, seams and jerk, a row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meanflow_ros.core.contract import RobotSpec
from meanflow_ros.evaluation.episodes import EpisodeResult, summarize
from meanflow_ros.evaluation.execution import Execution
from meanflow_ros.evaluation.smoothness import pooled


@dataclass(frozen=True)
class Cell:
    """One way to follow chunks, and how many steps late they come."""

    execution: str
    delay_steps: int


def cells_of(executions: Sequence[str], delays: Sequence[int], robot: RobotSpec,
             max_prefix: int) -> list[Cell]:
    """Return every pair; ValueError for a mode that is not known or not trained for."""
    for delay in delays:
        if not 0 <= delay < robot.horizon:
            raise ValueError(f'a delay must be 0 to {robot.horizon - 1} steps, less than the '
                             f'horizon, got {delay}')
    for kind in executions:
        for delay in delays:
            mode = Execution(robot, kind, delay_steps=delay, picture_ns=1).timeline.mode
            asked = getattr(mode, 'delay_steps', 0)
            if asked > max_prefix:
                raise ValueError(f'execution {kind!r} gives {asked} steps as a prefix at a delay '
                                 f'of {delay}, but the checkpoint was trained for at most '
                                 f'{max_prefix} (train --max-prefix)')
    return [Cell(kind, delay) for delay in delays for kind in executions]


def rows_of(results: Sequence[EpisodeResult]) -> list[dict]:
    """Return what the episodes of each cell say, as plain values."""
    cells: dict[Cell, list[EpisodeResult]] = {}
    for result in results:
        cells.setdefault(Cell(result.execution, result.delay_steps), []).append(result)
    return [{
        'execution': cell.execution, 'delay_steps': cell.delay_steps,
        'episodes': len(own), 'successes': sum(result.success for result in own),
        'steps': sum(result.steps for result in own),
        'starved_steps': sum(result.starved_steps for result in own),
        'chunks': sum(result.chunks for result in own),
        'smoothness': pooled([result.smoothness for result in own]),
        'tasks': {task: [row['successes'], row['episodes']]
                  for task, row in summarize(list(own)).items()},
    } for cell, own in cells.items()]


def table(rows: Sequence[dict]) -> str:
    """Return the rows as a Markdown table: p50 / p90 / p99 / max of changes in % of the range."""
    def numbers(values: Mapping[str, float]) -> str:
        return ' / '.join(f'{value:.1f}' for value in values.values())

    lines = ['| delay | execution | success | position at seams | command at seams '
             '| command inside chunks | jerk, m/s³ |', '|---|---|---|---|---|---|---|']
    for row in rows:
        smooth = row['smoothness']
        lines.append(
            f'| {row["delay_steps"]} | `{row["execution"]}` | {row["successes"]}/'
            f'{row["episodes"]} ({row["successes"] / row["episodes"]:.1%}) | '
            f'{numbers(smooth["positions"])} | {numbers(smooth["seams"])} | '
            f'{numbers(smooth["inside"])} | {smooth["jerk_rms"]:.0f} |')
    return '\n'.join(lines) + '\n'
