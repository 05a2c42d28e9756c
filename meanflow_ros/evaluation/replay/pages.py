"""What report.html of a replay shows: timelines, pictures and the worst moments, all bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from meanflow_ros.evaluation.replay.accuracy import executed_difference, first_rows
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.report import Media, write_page

MOST_EPISODES, MOST_POINTS = 12, 1200      # timelines, and control steps of each
MOST_FRAMES, MOST_PICTURES = 40, 600       # of an episode and camera, and of all timelines
MOST_MOMENTS, MOST_OF_ONE, APART_S = 8, 2, 1.0
STRIP = 5                                  # pictures before, at and after a worst moment
BINS = 40
Load = Callable[[int], EpisodeReplay]


def write_report(path: Path, document: dict, episodes: Sequence[EpisodeReplay],
                 load: Load) -> None:
    """Write report.html; load: an episode by its place in `episodes`, with its pictures."""
    media = Media()
    data = {'kind': 'replay', 'document': document, 'episodes': [], 'worst': [],
            'histograms': {}, 'media': media.held}
    if 'executed' in document:
        scale = np.array(list(document['scale'].values()))
        shown = _shown(document)
        cameras = max(1, len(document['policy']['cameras']))
        frames = max(4, min(MOST_FRAMES, MOST_PICTURES // (len(shown) * cameras)))
        data['episodes'] = [_timeline(load(index), document['episodes'][index], scale, frames,
                                      media) for index in shown]
        data['worst'] = [_moment(load(index), row, scale, shown, index, media)
                         for index, row in _worst(episodes, scale)]
        data['histograms'] = _histograms(episodes)
    write_page(path, 'Replay report', data)


def _shown(document: dict) -> list[int]:
    """Return which episodes have a timeline: those with the largest errors, in their order."""
    errors = [each['relative_error'] for each in document['episodes']]
    order = sorted(range(len(errors)), key=lambda row: -(errors[row] or 0.0))
    return sorted(order[:MOST_EPISODES])


def _relative(episode: EpisodeReplay, scale: np.ndarray) -> np.ndarray:
    """Return the error of each control step (M,) in units of the spread, NaN without one."""
    moving = scale > 0
    if not moving.any():
        return np.full(len(episode.tick_ns), np.nan)
    return np.abs(executed_difference(episode)[:, moving] / scale[moving]).mean(1)


def _seconds(episode: EpisodeReplay, stamps_ns: np.ndarray) -> list[float]:
    return _plain((np.asarray(stamps_ns) - episode.tick_ns[0]) / 1e9, 3)


def _plain(values: np.ndarray, decimals: int | None = None) -> list:
    """Return nested lists with few digits, None for what is not finite."""
    values = np.asarray(values, np.float64)
    if values.ndim > 1:
        return [_plain(row, decimals) for row in values]
    return [None if not np.isfinite(value) else round(float(value), decimals)
            if decimals is not None else float(f'{value:.5g}') for value in values]


def _timeline(episode: EpisodeReplay, account: dict, scale: np.ndarray, most: int,
              media: Media) -> dict:
    every = -(-len(episode.tick_ns) // MOST_POINTS)
    rows = np.arange(0, len(episode.tick_ns), every)
    expected = np.where(episode.tick_recorded[:, None], episode.expected, np.nan)
    relative = np.nan_to_num(_relative(episode, scale)[rows], nan=-1.0)
    marks = np.full(len(rows), '.')
    marks[episode.source[rows] < 0] = '-'
    marks[episode.stale[rows]] = 's'
    marks[episode.missed[rows]] = 'm'
    kept = episode.pictures.rows
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int))
    of_chunks = [kept[index] for index in chosen]
    return {'name': episode.name, 'instruction': ' / '.join(episode.instructions),
            'relative_error': account['relative_error'], 'worst': int(relative.argmax()),
            't': _seconds(episode, episode.tick_ns[rows]), 'marks': ''.join(marks),
            'executed': _plain(episode.executed[rows].T), 'expected': _plain(expected[rows].T),
            'frames': {
                't': _seconds(episode, episode.stamp_ns[of_chunks]),
                'cameras': {camera: [media.add(jpegs[index]) for index in chosen]
                            for camera, jpegs in episode.pictures.cameras.items()},
                'chunks': _plain(episode.actions[of_chunks])}}


def _worst(episodes: Sequence[EpisodeReplay], scale: np.ndarray) -> list[tuple[int, int]]:
    """Return (episode, control step) of the largest errors, apart from one another."""
    found = []
    for index, episode in enumerate(episodes):
        rows = first_rows(episode)
        relative = _relative(episode, scale)[rows]
        found += [(float(error), index, int(row)) for error, row in zip(relative, rows)
                  if error > 1e-9]
    chosen: list[tuple[int, int]] = []
    for _, index, row in sorted(found, reverse=True):
        near = [other for own, other in chosen if own == index]
        ticks = episodes[index].tick_ns
        if len(near) < MOST_OF_ONE and all(
                abs(int(ticks[row]) - int(ticks[other])) >= APART_S * 1e9 for other in near):
            chosen.append((index, row))
        if len(chosen) == MOST_MOMENTS:
            break
    return chosen


def _moment(episode: EpisodeReplay, row: int, scale: np.ndarray, shown: Sequence[int],
            index: int, media: Media) -> dict:
    difference = np.abs(executed_difference(episode)[row]) / np.where(scale > 0, scale, np.inf)
    dimension = int(difference.argmax())
    stamps = episode.stamp_ns[episode.pictures.rows]
    here = int(np.abs(stamps - episode.stamp_ns[episode.source[row]]).argmin())
    first = max(0, min(here - STRIP // 2, len(stamps) - STRIP))
    strip = range(first, min(first + STRIP, len(stamps)))
    return {'episode': shown.index(index) if index in shown else None, 'name': episode.name,
            'instruction': ' / '.join(episode.instructions),
            't': _seconds(episode, episode.tick_ns[[row]])[0],
            'dimension': episode.dimensions[dimension],
            'executed': float(episode.executed[row, dimension]),
            'recorded': float(episode.expected[row, dimension]), 'here': here - first,
            'times': _seconds(episode, stamps[strip.start:strip.stop]),
            'cameras': {camera: [media.add(jpegs[each]) for each in strip]
                        for camera, jpegs in episode.pictures.cameras.items()}}


def _histograms(episodes: Sequence[EpisodeReplay]) -> dict:
    values = {'latency_ms': [(each.done_ns - each.taken_ns) / 1e6 for each in episodes],
              'observation_age_s': [each.age_s for each in episodes]}
    found = {}
    for name, parts in values.items():
        all_of_them = np.concatenate(parts)
        all_of_them = all_of_them[np.isfinite(all_of_them)]
        if len(all_of_them):
            high = max(float(all_of_them.max()) * 1.02, 1e-3)
            counts, edges = np.histogram(all_of_them, BINS, (0.0, high))
            found[name] = {'edges': _plain(edges), 'counts': counts.tolist()}
    return found
