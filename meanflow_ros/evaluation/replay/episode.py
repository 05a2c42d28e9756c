"""One replayed episode as arrays: what was taken, predicted, executed, and what was missing."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np


ACCEPTED, DISCARDED, UNFINISHED = 'accepted', 'discarded', 'unfinished'


@dataclass
class Pictures:
    """Small JPEGs of some observations, to look at. rows: which observations they belong to."""

    rows: list[int] = field(default_factory=list)
    cameras: dict[str, list[bytes]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(kw_only=True)
class EpisodeReplay:
    """N observations that the policy took, with chunks of T steps, and M steps of control.

    Times are ns. outcome: per observation ACCEPTED, DISCARDED (an instruction or a clock jump came
    while it was being inferred), UNFINISHED (the episode ended before), or the guard's kind of
    rejection. reference: what the recording commanded when each step was due; recorded tells
    where it did. last_action: the command in force before the observation, NaN if there was none.

    Control: `executed` is NaN where nothing was due. `expected` is the recording brought through
    the same timeline as the chunk of the policy. source, step: which observation and which step
    of its chunk; source is -1 where nothing was due. missed: nothing was due although a chunk had
    come since the start or the last change of the instruction. stale: a newer observation had been
    taken.

    missing: 'stream: kind' -> [times it began, seconds]. probes: variant -> chunks (Q, T, A) of
    the observations `probed` (Q,).
    """

    bag: str
    name: str
    number: int
    start_ns: int
    dimensions: tuple[str, ...]
    instructions: tuple[str, ...]
    notes: tuple[str, ...]
    length_s: float
    first_step: int
    period_s: float
    stamp_ns: np.ndarray
    taken_ns: np.ndarray
    done_ns: np.ndarray
    actions: np.ndarray
    reference: np.ndarray
    recorded: np.ndarray
    last_action: np.ndarray
    states: np.ndarray
    outcome: np.ndarray
    expired: np.ndarray
    tick_ns: np.ndarray
    executed: np.ndarray
    expected: np.ndarray
    tick_recorded: np.ndarray
    source: np.ndarray
    step: np.ndarray
    age_s: np.ndarray
    missed: np.ndarray
    stale: np.ndarray
    missing: dict[str, list[float]]
    interventions: dict[str, int]
    probed: np.ndarray
    probes: dict[str, np.ndarray]
    pictures: Pictures

    def save(self, path: Path) -> None:
        """Write the episode as one npz; it is whole or absent."""
        arrays, plain = {}, {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, np.ndarray):
                arrays[each.name] = value
            elif each.name not in ('probes', 'pictures'):
                plain[each.name] = value
        plain['variants'] = list(self.probes)
        plain['pictures'] = {'rows': self.pictures.rows, 'sizes': self.pictures.sizes,
                             'cameras': list(self.pictures.cameras)}
        for number, chunks in enumerate(self.probes.values()):
            arrays[f'probe_{number}'] = chunks
        for number, jpegs in enumerate(self.pictures.cameras.values()):
            arrays[f'jpeg_{number}'] = np.frombuffer(b''.join(jpegs), np.uint8)
            arrays[f'jpeg_ends_{number}'] = np.cumsum([len(jpeg) for jpeg in jpegs])
        arrays['plain'] = np.frombuffer(json.dumps(plain).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        partial = path.with_suffix('.partial')
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, *, pictures: bool = False) -> 'EpisodeReplay':
        """Read what `save` wrote; the pictures only if they are asked for."""
        with np.load(path, allow_pickle=False) as file:
            plain = json.loads(bytes(file['plain']))
            variants, seen = plain.pop('variants'), plain.pop('pictures')
            for name in ('dimensions', 'instructions', 'notes'):
                plain[name] = tuple(plain[name])
            jpegs = {}
            for number, camera in enumerate(seen['cameras'] if pictures else ()):
                data, ends = bytes(file[f'jpeg_{number}']), file[f'jpeg_ends_{number}'].tolist()
                jpegs[camera] = [data[start:end] for start, end in zip([0, *ends], ends)]
            return cls(**plain, probes={variant: file[f'probe_{number}']
                                        for number, variant in enumerate(variants)},
                       pictures=Pictures(rows=seen['rows'], cameras=jpegs, sizes={
                           camera: tuple(size) for camera, size in seen['sizes'].items()}),
                       **{each.name: file[each.name] for each in fields(cls)
                          if each.name in file})
