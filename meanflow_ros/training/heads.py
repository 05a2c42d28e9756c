"""Many action networks on one frozen encoder: what compares objectives at a bearable price.

Every observation is encoded once per view (a random shift and colour), and each action network is
then trained on the stored context. Networks that differ only in their objective see the same rows,
views, noise and times.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meanflow_ros.core.dit import Conditioning
from meanflow_ros.core.policy import Policy
from meanflow_ros.training.augment import augment
from meanflow_ros.training.config import TrainConfig
from meanflow_ros.training.draws import CHANGES, Share, draw, draw_changes, draw_rows
from meanflow_ros.training.gradients import Gradients
from meanflow_ros.training.objective import TrainingLoss
from meanflow_ros.training.optimizer import (
    AveragedWeights, freeze, learning_rate, make_optimizer, set_rate)
from meanflow_ros.training.pairs import PairDataset
from meanflow_ros.training.policy import make_policy

ENCODE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the encoder says about each of N rows, in V views; and the rest of the pairs.

    context: (V, N, S, D), bfloat16 on a GPU. mask: (I, S) of each instruction's context, or None.
    """

    context: Tensor
    mask: Tensor | None
    state: Tensor
    chunk: Tensor
    executed: Tensor
    chunk_mask: Tensor
    instruction: Tensor

    def batch(self, rows: Tensor, views: Tensor) -> dict[str, Tensor]:
        """Return the batch of rows (B,) as seen in views (B,)."""
        return {'context': self.context[views, rows], 'state': self.state[rows],
                'chunk': self.chunk[rows], 'executed': self.executed[rows],
                'mask': self.chunk_mask[rows], 'instruction': self.instruction[rows]}


@torch.no_grad()
def encode(policy: Policy, data: PairDataset, rows: np.ndarray, views: int, config: TrainConfig,
           device: torch.device) -> Features:
    """Encode `rows` of the data set with the policy's encoder, each `views` times."""
    encoder = policy.network.encoder.to(device).eval()
    ids, prompt_mask = encoder.tokenize([policy.config.prompt.format(instruction=text)
                                         for text in data.instructions])
    generator = torch.Generator(device).manual_seed(config.seed)
    stored, mask = None, None
    reduced = torch.bfloat16 if device.type == 'cuda' else torch.float32
    rest = {name: [] for name in ('state', 'chunk', 'executed', 'mask', 'instruction')}

    for start in tqdm(range(0, len(rows), ENCODE_ROWS), 'encoding', file=sys.stderr):
        batch = data.gather(rows[start:start + ENCODE_ROWS]).tensors()
        for name, values in rest.items():
            values.append(batch[name])
        pixels = batch['pictures'].to(device).movedim(-1, -3).float()
        which = batch['instruction'].to(device)
        for view in range(views):
            count = len(pixels)
            seen = augment(pixels, **draw_changes(config, count, generator))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                context, own_mask = encoder(seen, ids[which], None if prompt_mask is None
                                            else prompt_mask[which])
            if stored is None:
                stored = torch.empty(views, len(rows), *context.shape[1:], dtype=reduced,
                                     device=device)
                if prompt_mask is not None:
                    visual = context.shape[1] - prompt_mask.shape[1]
                    mask = torch.nn.functional.pad(prompt_mask, (visual, 0), value=True)
            stored[view, start:start + count] = context.to(reduced)
    rest = {name: torch.cat(values).to(device) for name, values in rest.items()}
    return Features(context=stored, mask=mask, state=rest['state'], chunk=rest['chunk'],
                    executed=rest['executed'], chunk_mask=rest['mask'],
                    instruction=rest['instruction'])


class _HeadLoss(TrainingLoss):
    """The loss of an action network on stored context."""

    def __init__(self, policy: Policy, config: TrainConfig, data: PairDataset, features: Features):
        super().__init__(policy.network, config, policy.config, data.instructions)
        self._context_mask = features.mask

    def condition(self, batch: dict[str, Tensor]) -> Conditioning:
        mask = None if self._context_mask is None else self._context_mask[batch['instruction']]
        return self._conditioned_on(batch['context'], mask, batch)


class _Head:
    """One action network in training, on a stream of its own."""

    def __init__(self, config: TrainConfig, encoder: Policy, data: PairDataset,
                 features: Features, device: torch.device):
        self.config = config
        torch.manual_seed(config.seed)
        with device:
            self.policy = make_policy(config, data)
        network = self.policy.network.to(device).train()
        network.encoder = encoder.network.encoder
        freeze(network, 'encoder')
        loss = _HeadLoss(self.policy, config, data, features).to(device)
        self._parameters = [p for p in loss.parameters() if p.requires_grad]
        self._optimizer = make_optimizer(network, config)
        self._average = AveragedWeights(self._parameters, config.ema)
        cuda = device.type == 'cuda'
        self._gradients = Gradients(loss, self._parameters, captured=cuda)
        self._stream = torch.cuda.Stream() if cuda else None
        self.loss = torch.zeros((), device=device)

    def draw_key(self) -> tuple:
        """Return what decides this network's random numbers."""
        c = self.config
        return (c.seed, c.loss in ('rf', 'l1'), c.time_sampling, c.data_proportion,
                c.one_step_proportion, c.noise_samples, c.batch_size, c.condition_dropout,
                c.max_prefix)

    def step(self, step: int, batch: Mapping[str, Tensor], moving: int) -> None:
        """Take one optimiser step; on a GPU it only begins."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            set_rate(self._optimizer, learning_rate(step, self.config))
            self._gradients.zero()
            self.loss = self._gradients.add(batch, moving)
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
            self._optimizer.step()
            self._average.update(step)

    def join(self) -> None:
        """Let what follows wait for this network's step."""
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)

    def finished(self) -> Policy:
        """Return the policy with the averaged weights."""
        with self._average.applied():
            kept = {name: value.detach().clone()
                    for name, value in self.policy.network.dit.state_dict().items()}
        self.policy.network.dit.load_state_dict(kept)
        return Policy(self.policy.config, self.policy.network)


def train_heads(configs: Mapping[str, TrainConfig], encoder: Policy, data: PairDataset,
                features: Features, device: torch.device) -> dict[str, Policy]:
    """Train one action network per configuration, all in step with each other.

    All configurations have the same number of steps. Returns a policy under each name; they share
    the encoder. FloatingPointError names a network whose loss is no longer finite.
    """
    torch.set_float32_matmul_precision('high')     # as `train`, wherever the encoder comes from
    heads = {name: _Head(config, encoder, data, features, device)
             for name, config in configs.items()}
    steps = next(iter(configs.values())).steps
    rows = np.arange(len(features.state))
    for step in tqdm(range(steps), f'training {len(heads)} networks', file=sys.stderr):
        batches = {}
        for head in heads.values():
            key = head.draw_key()
            if key not in batches:
                batches[key] = _batch(head.config, features, rows, step, device)
            head.step(step, *batches[key])
        for head in heads.values():
            head.join()
        if step % 250 == 249 or step == steps - 1:
            bad = [name for name, head in heads.items() if not torch.isfinite(head.loss)]
            if bad:
                raise FloatingPointError(f'the loss of {", ".join(bad)} is not finite at step '
                                         f'{step}')
    return {name: head.finished() for name, head in heads.items()}


def _batch(config: TrainConfig, features: Features, rows: np.ndarray, step: int,
           device: torch.device) -> tuple[dict[str, Tensor], int]:
    draws = draw(config, step, Share())
    chosen = torch.from_numpy(draw_rows(config, step, rows, Share())).to(device)
    views = torch.randint(len(features.context), (config.batch_size,), generator=torch.Generator()
                          .manual_seed((config.seed << 32) + step)).to(device)
    batch = {**features.batch(chosen, views), **{
        name: value.to(device, non_blocking=True) for name, value in draws.tensors().items()
        if name not in CHANGES}}
    return batch, draws.moving
