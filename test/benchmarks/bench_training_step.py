"""What a full training step costs: each loss, eagerly, as a CUDA graph, and compiled.

One step is gradient, clipping, AdamW and the averaging of the weights. Losses take turns, so that
a slow minute hits all of them. Under torchrun the batch is per process, and the samples per second
are those of all processes together:

    python test/benchmarks/bench_training_step.py --preset large --modes eager graph
    torchrun --nproc-per-node 2 test/benchmarks/bench_training_step.py --modes eager
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from meanflow_ros.core.contract import ActionSpace, CameraSpec, RobotSpec
from meanflow_ros.core.dit import dit_preset
from meanflow_ros.core.encoder import encoder_preset, train_tokenizer
from meanflow_ros.core.meanflow import LOSSES
from meanflow_ros.core.normalize import Normalizer
from meanflow_ros.core.policy import PolicyConfig, PolicyNetwork
from meanflow_ros.training.config import TrainConfig
from meanflow_ros.training.distributed import join_group, leave_group, wrap
from meanflow_ros.training.draws import draw
from meanflow_ros.training.gradients import Gradients
from meanflow_ros.training.objective import TrainingLoss
from meanflow_ros.training.optimizer import AveragedWeights, make_optimizer

INSTRUCTIONS = ('put the carrot on the plate', 'open the top drawer and take the cup out')
HORIZON, ACTIONS, STATES = 10, 7, 8


def make_step(preset: str, loss: str, mode: str, batch_size: int, group, strategy: str):
    """Return a function that runs one full training step on made-up data."""
    torch.manual_seed(0)
    size = encoder_preset(preset).image_size
    robot = RobotSpec(
        robot='bench', horizon=HORIZON, period_s=0.05,
        cameras=tuple(CameraSpec(name=name, width=size, height=size) for name in 'ab'),
        state_names=tuple(f'joint{i}' for i in range(STATES)),
        action_space=ActionSpace(
            name='eef_delta', dimensions=tuple(f'd{i}' for i in range(ACTIONS)),
            units=('1',) * ACTIONS, lower=-np.ones(ACTIONS), upper=np.ones(ACTIONS)))
    config = TrainConfig(robot=robot, preset=preset, image_size=size, loss=loss, noise_samples=1,
                         batch_size=batch_size * group.size, compile=mode.startswith('compile'))
    tokenizer = train_tokenizer(INSTRUCTIONS)
    dit = dit_preset(preset, {'eef_delta': ACTIONS}, {'eef_delta': STATES})
    policy = PolicyConfig(
        robot=robot, encoder=encoder_preset(preset), dit=type(dit)(**{
            **vars(dit), 'h_in': 'none' if loss in ('rf', 'l1') else 'adaln', 'dropout': 0.0}),
        action_normalizer=Normalizer(low=-np.ones(ACTIONS), high=np.ones(ACTIONS)),
        state_normalizer=Normalizer(low=-np.ones(STATES), high=np.ones(STATES)))
    with group.device:
        network = PolicyNetwork(policy, tokenizer).train()
    objective = TrainingLoss(network, config, policy, INSTRUCTIONS).to(group.device)
    captured = mode.endswith('graph')
    model = wrap(objective, group, strategy, captured=captured)
    parameters = list(model.parameters())
    optimizer = make_optimizer(network, config)
    average = AveragedWeights(parameters, 0.999)
    gradients = Gradients(model, parameters, captured=captured, group=group)
    draws = draw(config, 0, group.share)
    batch = {
        'pictures': torch.randint(0, 256, (batch_size, 2, size, size, 3), dtype=torch.uint8),
        'state': torch.rand(batch_size, STATES) * 2 - 1,
        'chunk': torch.rand(batch_size, HORIZON, ACTIONS) * 2 - 1,
        'mask': torch.ones(batch_size, HORIZON),
        'instruction': torch.arange(batch_size) % 2, **draws.tensors()}
    batch = {name: value.to(group.device) for name, value in batch.items()}

    def step() -> None:
        gradients.zero()
        gradients.add(batch, draws.moving)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(100)

    return step


def measure(step, device: torch.device, steps: int) -> list[float]:
    """Return the milliseconds of each of `steps` steps."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--preset', choices=('large', 'tiny'), default='large')
    parser.add_argument('--batch-size', type=int, default=32, help='of each process')
    parser.add_argument('--losses', nargs='+', choices=LOSSES, default=['rf', 'meanflow'])
    parser.add_argument('--modes', nargs='+', default=['eager'],
                        choices=('eager', 'graph', 'compile', 'compile_graph'))
    parser.add_argument('--steps', type=int, default=20, help='measured in each round')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--strategy', default='ddp', help='ddp or fsdp, under torchrun')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--out', type=Path, help='JSON file')
    arguments = parser.parse_args()
    group = join_group(arguments.device)
    torch.set_float32_matmul_precision('high')
    rows = {}
    for mode in arguments.modes:
        for _ in range(arguments.rounds):
            for loss in arguments.losses:
                if group.device.type == 'cuda':
                    torch.cuda.reset_peak_memory_stats()
                step = make_step(arguments.preset, loss, mode, arguments.batch_size, group,
                                 arguments.strategy)
                start = time.perf_counter()
                measure(step, group.device, 5)
                row = rows.setdefault((mode, loss), {'mode': mode, 'loss': loss, 'ms': [],
                                                     'start_s': time.perf_counter() - start})
                row['ms'] += measure(step, group.device, arguments.steps)
                if group.device.type == 'cuda':
                    row['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
                del step
                gc.collect()
                if group.device.type == 'cuda':
                    torch.cuda.empty_cache()
    for (mode, _), row in rows.items():
        reference = rows.get((mode, 'rf'))
        times = sorted(row.pop('ms'))
        row['p50_ms'] = statistics.median(times)
        row['p10_ms'], row['p90_ms'] = times[len(times) // 10], times[-1 - len(times) // 10]
        row['samples_per_s'] = arguments.batch_size * group.size / row['p50_ms'] * 1e3
        if reference:
            row['time_over_rf'] = row['p50_ms'] / reference['p50_ms']
            if 'peak_gib' in row:
                row['memory_over_rf'] = row['peak_gib'] / reference['peak_gib']
        if group.first:
            print('  '.join(f'{key} {value:.4g}' if isinstance(value, float) else str(value)
                            for key, value in row.items()), flush=True)
    if group.first and arguments.out:
        device = (torch.cuda.get_device_name() if group.device.type == 'cuda' else 'cpu')
        arguments.out.write_text(json.dumps({
            'device': device, 'processes': group.size, 'strategy': arguments.strategy,
            'preset': arguments.preset, 'batch_size': arguments.batch_size,
            'torch': torch.__version__, 'rows': list(rows.values())}, indent=1) + '\n')
    leave_group(group)
    return 0


if __name__ == '__main__':
    sys.exit(main())
