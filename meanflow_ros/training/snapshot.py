"""Everything that a training run needs to go on, written so that a kill loses nothing.

A snapshot is a directory `step_00001000` of torch.distributed.checkpoint: sharded where the
weights are, each process writing its part, and readable by another number of processes. It gets
its name only when it is complete. The newest two are kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from meanflow_ros.core.storage import PARTIAL, flush_tree
from meanflow_ros.training.distributed import Group
from meanflow_ros.training.optimizer import AveragedWeights

KEEP = 2
RUN_FILE = 'run.json'


class Snapshots:
    """The snapshots of one run, below `directory`."""

    def __init__(self, directory: Path, group: Group):
        self._directory, self._group = directory, group

    def _complete(self) -> list[Path]:
        return sorted(path for path in self._directory.glob('step_*')
                      if path.is_dir() and path.suffix != PARTIAL)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer,
             average: AveragedWeights, run: dict) -> None:
        """Write the state after `step` steps; run: plain values that `restore` compares."""
        final = self._directory / f'step_{step:08d}'
        partial = final.with_name(final.name + PARTIAL)
        if self._group.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._group.wait()
        with _quietly():
            dcp.save(_state(model, optimizer, average), checkpoint_id=partial,
                     no_dist=self._group.size == 1)
        if self._group.first:
            (partial / RUN_FILE).write_text(json.dumps({'step': step, 'run': run}, indent=1))
            flush_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._complete()[:-KEEP]:
                shutil.rmtree(old)
        self._group.wait()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                average: AveragedWeights, run: dict) -> int:
        """Fill model, optimiser and averages from the newest snapshot; return its steps, or 0.

        ValueError if the snapshot is of another run, with the fields that differ.
        """
        complete = self._complete()
        if not complete:
            return 0
        newest = complete[-1]
        document = json.loads((newest / RUN_FILE).read_text())
        different = [f'{key}: {document["run"].get(key)!r} then, {run.get(key)!r} now'
                     for key in sorted({*run, *document['run']})
                     if document['run'].get(key) != run.get(key)]
        if different:
            raise ValueError(f'{newest} is of a run with another configuration '
                             f'({"; ".join(different)}); use another --out, or remove '
                             f'{self._directory} to start again')
        state = _state(model, optimizer, average)
        with _quietly():
            dcp.load(state, checkpoint_id=newest, no_dist=self._group.size == 1)
        set_state_dict(model, optimizer, model_state_dict=state['model'],
                       optim_state_dict=state['optimizer'])
        return document['step']


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Leave out the remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedWeights) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {'model': weights, 'optimizer': moments,
            'average': {str(i): value for i, value in enumerate(average.values)}}
