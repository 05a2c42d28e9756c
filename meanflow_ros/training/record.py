"""What a run says while it goes: a file of every loss, TensorBoard, Weights & Biases.

`losses.jsonl` has one line per step, `validation.jsonl` one per validation. After an interruption
both are cut back to the snapshot that the run goes on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

log = logging.getLogger('meanflow_ros.training')

LOSSES, VALIDATION = 'losses.jsonl', 'validation.jsonl'


class Record:
    """The record of one run below `directory`; closing it flushes everything."""

    def __init__(self, directory: Path, start_step: int, *, wandb_project: str = '',
                 config: dict | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self.history = _cut(directory / VALIDATION, start_step)
        _cut(directory / LOSSES, start_step)
        self._losses = open(directory / LOSSES, 'a', encoding='utf-8')
        self._validation = open(directory / VALIDATION, 'a', encoding='utf-8')
        self._board = _tensorboard(directory / 'tensorboard', start_step)
        self._wandb = _wandb(wandb_project, directory, config)

    def losses(self, first_step: int, losses: list[float], rate: float) -> None:
        """Note the losses of consecutive steps, the first after `first_step` steps."""
        for offset, loss in enumerate(losses):
            self._losses.write(json.dumps({'step': first_step + offset, 'loss': loss}) + '\n')
        self._losses.flush()
        last = first_step + len(losses) - 1
        self._scalars({'loss': sum(losses) / len(losses), 'learning_rate': rate}, last)

    def validation(self, record: dict, names: tuple[str, ...]) -> None:
        """Note a validation: step and NFE -> error per action dimension."""
        self.history.append(record)
        self._validation.write(json.dumps(record) + '\n')
        self._validation.flush()
        self._scalars({f'error_nfe{steps}/{name}': value for steps, values in
                       record['error'].items() for name, value in zip(names, values)},
                      record['step'])

    def _scalars(self, values: dict[str, float], step: int) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Close every file."""
        self._losses.close()
        self._validation.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _cut(path: Path, steps: int) -> list[dict]:
    """Drop the lines of `steps` and later, and a half-written last one; return the others."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding='utf-8').splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                if entry['step'] < steps or (path.name == VALIDATION and entry['step'] == steps):
                    kept.append(entry)
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in kept), encoding='utf-8')
    return kept


def _tensorboard(directory: Path, start_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info('no TensorBoard log: pip install tensorboard')
        return None
    return SummaryWriter(str(directory), purge_step=start_step)


def _wandb(project: str, directory: Path, config: dict | None):
    if not project:
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError('--wandb needs the package wandb: pip install wandb') from None
    return wandb.init(project=project, dir=str(directory), config=config, resume='allow',
                      id=directory.resolve().name)
