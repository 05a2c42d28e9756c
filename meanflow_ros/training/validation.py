"""How far the sampled chunks are from the recorded ones, on episodes that are held out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core import meanflow
from meanflow_ros.core.policy import Policy
from meanflow_ros.training.cache import PairDataset
from meanflow_ros.training.distributed import Group
from meanflow_ros.training.record import Record

log = logging.getLogger('meanflow_ros.training')
NFE = (1, 2, 4)
MOST_ROWS, BATCH = 512, 64


class Validator:
    """Measures a run's policy now and then; the first process does it, the others wait."""

    def __init__(self, policy: Policy, data: PairDataset, rows: np.ndarray, out: Path,
                 record: Record | None, group: Group):
        self._config, self._tokenizer = policy.config, policy.network.encoder.tokenizer
        self._data, self._rows, self._out, self._record = data, rows, out, record
        self._group = group
        self._policy: Policy | None = None

    def filled(self, weights: Mapping[str, Tensor]) -> Policy:
        """Return a policy of its own with these weights, on the device."""
        if self._policy is None:
            with torch.random.fork_rng(devices=[]):
                self._policy = Policy.create(self._config, self._tokenizer)
            self._policy.network.to(self._group.device)
        self._policy.network.load_state_dict(weights)
        return self._policy

    def run(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Measure these weights, reached after `step` steps; nothing is held out: do nothing."""
        if self._record and len(self._rows):
            policy = self.filled(weights)
            error = {str(steps): action_error(policy, self._data, self._rows, steps=steps).tolist()
                     for steps in NFE}
            space = self._config.robot.action_space
            self._record.validation({'step': step, 'error': error}, space.dimensions)
            for steps, values in error.items():
                log.info('step %d, NFE %s: mean absolute error on held-out episodes: %s', step,
                         steps, ', '.join(f'{name} {value:.4f} {unit}' for name, value, unit in
                                    zip(space.dimensions, values, space.units)))
            plot_errors(self._record.history, policy, self._out / 'validation.png')
        self._group.wait()


@torch.inference_mode()
def action_error(policy: Policy, data: PairDataset, rows: np.ndarray, *, steps: int) -> np.ndarray:
    """Return the mean absolute error (A,) of chunks sampled with `steps`, in physical units.

    At most MOST_ROWS of `rows`, evenly spread; the noise is the same in every call.
    """
    rows = rows[np.linspace(0, len(rows) - 1, min(MOST_ROWS, len(rows))).astype(int)]
    network, config, device = policy.network, policy.config, policy.device
    generator = torch.Generator().manual_seed(0)
    total, count = np.zeros(policy.robot.action_space.size), 0
    for start in range(0, len(rows), BATCH):
        batch = data.gather(rows[start:start + BATCH])
        ids, mask = network.encoder.tokenize([config.prompt.format(
            instruction=data.instructions[index]) for index in batch.instruction.tolist()])
        states = None
        if config.state_normalizer:
            states = torch.tensor(config.state_normalizer.apply(batch.state.double().numpy()),
                                  dtype=torch.float32, device=device)
        noise = torch.randn(len(batch.state), policy.robot.horizon, network.dit.action_size,
                            generator=generator).to(device)
        conditioning = network.condition(
            batch.pictures.to(device).movedim(-1, -3).float(), ids, mask, states)
        sampled = meanflow.SAMPLERS[config.sampler](
            network.velocity(conditioning), noise, steps=steps).double().cpu().numpy()
        predicted = config.action_normalizer.invert(sampled[..., :total.size])
        error = np.abs(predicted - batch.chunk.double().numpy())[batch.mask.bool().numpy()]
        total, count = total + error.sum(0), count + len(error)
    return total / max(count, 1)


def plot_errors(history: Sequence[Mapping], policy: Policy, path: Path) -> None:
    """Draw the validation errors of a run: one panel per action dimension, one line per NFE.

    Nothing is drawn where matplotlib is not installed.

    history: records with 'step' and 'error', NFE -> error of each dimension.
    """
    try:
        import matplotlib
    except ImportError:
        log.info('no plot of the validation: pip install matplotlib')
        return
    matplotlib.use('Agg')
    from matplotlib import pyplot
    space = policy.robot.action_space
    figure, panels = pyplot.subplots(1, space.size, figsize=(3.2 * space.size, 3), squeeze=False)
    for index, panel in enumerate(panels[0]):
        for steps in NFE:
            panel.plot([record['step'] for record in history],
                       [record['error'][str(steps)][index] for record in history],
                       marker='.', label=f'NFE {steps}')
        panel.set(title=space.dimensions[index], xlabel='step',
                  ylabel=f'mean absolute error ({space.units[index]})')
        panel.set_ylim(bottom=0)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
