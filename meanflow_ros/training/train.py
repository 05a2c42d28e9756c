"""Train a policy on demonstration bags: one linear loop, then a checkpoint for the node."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meanflow_ros.core import meanflow
from meanflow_ros.core.dit import dit_preset
from meanflow_ros.core.encoder import encoder_preset, train_tokenizer
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import DTYPES, Policy, PolicyConfig
from meanflow_ros.training.config import TrainConfig, add_overrides, read_train_config
from meanflow_ros.training.dataset import ChunkDataset, augment, find_bags, read_bags
from meanflow_ros.training.graph import captured

log = logging.getLogger('meanflow_ros.training')
LOG_EVERY = 50


def make_policy(config: TrainConfig, data: ChunkDataset) -> Policy:
    """Build a policy with random weights, its tokenizer and statistics fitted to the data."""
    robot = config.robot
    tokenizer = train_tokenizer([config.prompt.format(instruction=text)
                                 for text in sorted(set(data.instructions))])
    encoder = dataclasses.replace(encoder_preset(config.preset), image_size=config.image_size)
    dit = dit_preset(config.preset, {robot.action_space.name: robot.action_space.size},
                     {robot.action_space.name: len(robot.state_names)})
    dit = dataclasses.replace(dit, h_in='none' if config.loss == 'rf' else config.h_in,
                              max_frequency=config.max_frequency, dropout=config.dropout)
    states = Normalizer.fit(data.states) if robot.state_names else None
    actions = Normalizer.fit(data.actions, lower=robot.action_space.lower,
                             upper=robot.action_space.upper)
    trained = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
               if field.name != 'robot'}
    return Policy.create(PolicyConfig(
        robot=robot, action_normalizer=actions, state_normalizer=states, encoder=encoder,
        dit=dit, prompt=config.prompt, instantaneous=config.loss == 'rf',
        training=trained), tokenizer)


def _batches(config: TrainConfig, data: ChunkDataset, policy: Policy, device: torch.device):
    """Return a function that draws a random, augmented batch without waiting for the device."""
    normalizers = policy.config
    chunks = torch.tensor(normalizers.action_normalizer.apply(data.actions),
                          dtype=torch.float32, device=device)[
                              torch.tensor(data.chunk_rows, device=device)]  # (N, T, A)
    mask = torch.tensor(data.mask, dtype=torch.float32, device=device)       # (N, T)
    states = None
    if normalizers.state_normalizer:
        states = torch.tensor(normalizers.state_normalizer.apply(data.states),
                              dtype=torch.float32, device=device)            # (N, P)
    prompts = sorted(set(data.instructions))
    ids, id_mask = policy.network.encoder.tokenize(
        [config.prompt.format(instruction=text) for text in prompts])
    prompt_of = torch.tensor([prompts.index(text) for text in data.instructions], device=device)

    def draw():
        pick = torch.randint(len(data), (config.batch_size,), device=device)
        pixels = data.pictures[pick].permute(0, 1, 4, 2, 3).float()          # (B, C, 3, S, S)
        pixels = augment(pixels, shift=config.shift_pixels, colour=config.colour)
        row = prompt_of[pick]
        return (pixels, ids[row], None if id_mask is None else id_mask[row],
                None if states is None else states[pick], chunks[pick], mask[pick])

    return draw


def train(config: TrainConfig, data: ChunkDataset, device: torch.device,
          checkpoint: Path, weights_dtype: torch.dtype, minutes: float | None = None) -> Policy:
    """Run the loop and save the averaged weights (EMA) to `checkpoint`.

    minutes: stop early, with the learning rate annealed over time instead of steps.
    """
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')
    policy = make_policy(config, data)
    network = policy.network.to(device).train().requires_grad_(True)
    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay,
                                  betas=(0.9, 0.95), fused=True,
                                  capturable=device.type == 'cuda')
    draw_batch = _batches(config, data, policy, device)
    repeat = torch.arange(config.batch_size, device=device).repeat_interleave(
        config.noise_samples)

    def training_step() -> Tensor:
        pixels, ids, id_mask, state, chunk, mask = draw_batch()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda',
                            cache_enabled=False):
            context, context_mask = network.encoder(pixels, ids, id_mask)
        conditioning = network.dit.condition(context.float(), context_mask, state)
        u = network.velocity(conditioning.select(repeat))
        x, m = chunk[repeat], mask[repeat]                         # (B * noise_samples, T, .)
        e = torch.randn_like(x)
        t, r = meanflow.sample_times(len(x), data_proportion=config.data_proportion, device=device,
                                     one_step_proportion=config.one_step_proportion)
        if config.loss == 'rf':
            loss = meanflow.rectified_flow_loss(u, x, e, t=t, mask=m)
        else:
            loss = meanflow.meanflow_loss(u, x, e, t=t, r=r, mask=m)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        return loss.detach()

    run_step = captured(training_step) if device.type == 'cuda' else training_step
    start, recent = time.monotonic(), torch.zeros((), device=device)
    progress = tqdm(range(config.steps), 'training', file=sys.stderr, mininterval=1.0)
    for step in progress:
        done = step / config.steps
        if minutes is not None:
            done = max(done, (time.monotonic() - start) / (60 * minutes))
            if done >= 1:
                break
        rate.fill_(config.learning_rate * min((step + 1) / config.warmup_steps,
                                              0.5 * (1 + math.cos(math.pi * done)) + 1e-3))
        recent += run_step()
        decay = min(config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, parameters, 1 - decay)
        if step % LOG_EVERY == LOG_EVERY - 1:
            mean = recent.item() / LOG_EVERY
            if not math.isfinite(mean):
                raise FloatingPointError(f'the loss is {mean} near step {step + 1}')
            progress.set_postfix(loss=f'{mean:.4f}')
            recent.zero_()
    with torch.no_grad():
        for parameter, value in zip(parameters, average):
            parameter.copy_(value)
    log.info('%d steps in %.1f min', step + 1, (time.monotonic() - start) / 60)
    policy = Policy(policy.config, network)
    policy.save(checkpoint, dtype=weights_dtype)
    log.info('checkpoint written to %s', checkpoint)
    return Policy.load(checkpoint, device=device)


@torch.inference_mode()
def action_error(policy: Policy, data: ChunkDataset, steps: int, count: int = 512) -> np.ndarray:
    """Return the mean absolute error (A,) of sampled chunks, in physical units."""
    rows = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    network, device = policy.network, policy.device
    pixels = data.pictures[torch.tensor(rows, device=data.pictures.device)].to(device)
    ids, id_mask = network.encoder.tokenize(
        [policy.config.prompt.format(instruction=data.instructions[row]) for row in rows])
    states = None
    if policy.config.state_normalizer:
        states = torch.tensor(policy.config.state_normalizer.apply(data.states[rows]),
                              dtype=torch.float32, device=device)
    noise = torch.randn(len(rows), policy.robot.horizon, network.dit.action_size,
                        generator=torch.Generator().manual_seed(0)).to(device)
    conditioning = network.condition(pixels.permute(0, 1, 4, 2, 3).float(), ids, id_mask, states)
    sampled = meanflow.sample(network.velocity(conditioning), noise, steps=steps,
                              instantaneous=policy.config.instantaneous).double().cpu().numpy()
    size = policy.robot.action_space.size
    predicted = policy.config.action_normalizer.invert(sampled[..., :size])
    error = np.abs(predicted - data.actions[data.chunk_rows[rows]])
    return error[data.mask[rows]].mean(0)


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='train', description='Train a policy on demonstration bags and write a checkpoint '
        'that policy_node runs.')
    parser.add_argument('config', type=Path, help='training YAML, see config/train_metaworld.yaml')
    parser.add_argument('--data', type=Path, required=True,
                        help='a rosbag2 directory, or a folder of them')
    parser.add_argument('--out', type=Path, required=True, help='checkpoint directory to write')
    parser.add_argument('--device', default='auto', help='auto, cuda, cuda:N or cpu')
    parser.add_argument('--minutes', type=float, help='stop after this long at the latest')
    parser.add_argument('--workers', type=int, default=2, help='processes that read bags')
    parser.add_argument('--weights', choices=DTYPES, default='bfloat16',
                        help='how the weights are stored (default bfloat16)')
    parser.add_argument('--validation', type=float, default=0.05,
                        help='share of the episodes held out (default 0.05)')
    add_overrides(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run the `train` command."""
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    arguments = _parse(argv)
    try:
        config = read_train_config(arguments.config, arguments)
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu')
                              if arguments.device == 'auto' else arguments.device)
        episodes = read_bags(find_bags(arguments.data), config.robot, config.image_size,
                             arguments.workers)
    except (OSError, ValueError) as error:
        print(f'train: {error}', file=sys.stderr)
        return 2
    every = max(2, round(1 / arguments.validation)) if arguments.validation > 0 else 0
    held_out = [e for i, e in enumerate(episodes) if every and i % every == every - 1]
    used = [e for i, e in enumerate(episodes) if not every or i % every != every - 1]
    data = ChunkDataset(used, config.robot, device)
    log.info('%d episodes, %d observations, %d instructions', len(used), len(data),
             len(set(data.instructions)))
    try:
        policy = train(config, data, device, arguments.out, DTYPES[arguments.weights],
                       arguments.minutes)
    except KeyboardInterrupt:
        print('train: interrupted, nothing was written', file=sys.stderr)
        return 130
    if held_out:
        validation = ChunkDataset(held_out, config.robot, device)
        for steps in (1, 2, 4):
            error = action_error(policy, validation, steps)
            log.info('NFE %d: mean absolute error on %d held-out episodes: %s', steps,
                     len(held_out), ', '.join(
                         f'{name} {value:.4f} {unit}' for name, value, unit in
                         zip(config.robot.action_space.dimensions, error,
                             config.robot.action_space.units)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
