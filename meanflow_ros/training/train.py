"""Train a policy on recordings: one linear loop, then a checkpoint for the node.

A run is a directory: `policy/` is the checkpoint that policy_node loads, `snapshots/` is what a
run goes on from after an interruption, and the rest says how it went.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meanflow_ros.core.policy import DTYPES
from meanflow_ros.core.schema import to_plain
from meanflow_ros.training.cache import PairDataset, build_cache, open_cache
from meanflow_ros.training.config import TrainConfig, add_overrides, options, read_train_config
from meanflow_ros.training.distributed import (
    STRATEGIES, Group, full_weights, join_group, leave_group, wrap)
from meanflow_ros.training.draws import Share, draw, draw_rows
from meanflow_ros.training.gradients import Gradients
from meanflow_ros.training.loader import Loader
from meanflow_ros.training.objective import TrainingLoss
from meanflow_ros.training.optimizer import (
    AveragedWeights, freeze, learning_rate, make_optimizer, set_rate)
from meanflow_ros.training.policy import make_policy
from meanflow_ros.training.record import Record
from meanflow_ros.training.recordings import find_recordings
from meanflow_ros.training.snapshot import Snapshots
from meanflow_ros.training.validation import Validator

log = logging.getLogger('meanflow_ros.training')
LOG_EVERY = 50


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says where its batch is described."""


def train(config: TrainConfig, data: PairDataset, out: Path, group: Group, *,
          strategy: str = 'ddp', weights_dtype: torch.dtype = torch.bfloat16,
          wandb_project: str = '') -> Path:
    """Run the loop from the newest snapshot in `out`, or from the start, and save the policy.

    Returns the checkpoint directory. Raises ValueError for a configuration that does not fit,
    NonFiniteLoss, and what device, disk or data set raise.
    """
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')
    train_rows, validation_rows = data.split(config.validation)
    policy = make_policy(config, data)
    network = policy.network.to(group.device).train()
    freeze(network, config.freeze)
    loss = TrainingLoss(network, config, policy.config, data.instructions).to(group.device)
    captured = can_capture(config, group, strategy)
    model = wrap(loss, group, strategy, captured=captured)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(network, config)
    average = AveragedWeights(parameters, config.ema)
    gradients = Gradients(model, parameters, scale=1 / config.accumulate, captured=captured,
                          group=group)
    snapshots = Snapshots(out / 'snapshots', group)
    run = describe_run(config, data)
    start = snapshots.restore(model, optimizer, average, run)
    if start and group.first:
        log.info('going on from step %d', start)
    loader = Loader(data, lambda step: draw_rows(config, step, train_rows, group.share),
                    group.device, start_step=start)
    record = Record(out, start, wandb_project=wandb_project, config=run) if group.first else None
    validator = Validator(policy, data, validation_rows, out, record, group)
    unwritten: list[Tensor] = []
    progress = tqdm(range(start, config.steps), 'training', config.steps, initial=start,
                    file=sys.stderr, mininterval=1.0, disable=not group.first)
    try:
        for step in progress:
            torch.manual_seed((config.seed << 32) + step * group.size + group.rank)   # dropout
            rate = learning_rate(step, config)
            set_rate(optimizer, rate)
            gradients.zero()
            parts = parts_of(next(loader).tensors(), config, step, group)
            losses = [gradients.add(batch, moving, synchronize=index + 1 == config.accumulate)
                      for index, (batch, moving) in enumerate(parts)]
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            average.update(step)
            unwritten.append(group.mean(sum(losses)))
            done = step + 1
            due = done == config.steps
            saving = due or done % config.save_every == 0
            if saving or len(unwritten) == LOG_EVERY or step == start:
                values = torch.stack(unwritten).tolist()
                unwritten.clear()
                _require_finite(values, done - len(values), out, config, data, train_rows)
                if record:
                    record.losses(done - len(values), values, rate)
                progress.set_postfix(loss=f'{sum(values) / len(values):.4f}', rate=f'{rate:.1e}')
            if saving:
                snapshots.save(done, model, optimizer, average, run)
            if due or done % config.validate_every == 0:
                with average.applied():
                    validator.run(done, full_weights(model, group))
        with average.applied():
            weights = full_weights(model, group)   # not a copy: it changes back with the block
            if group.first:
                validator.filled(weights).save(out / 'policy', dtype=weights_dtype)
        group.wait()
        return out / 'policy'
    finally:
        progress.close()
        loader.close()
        if record:
            record.close()


def parts_of(batch: dict[str, Tensor], config: TrainConfig, step: int,
             group: Group) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Split this process's batch of `step` into `accumulate` parts, each with its random numbers.

    Yields each part on the device, and how many of its samples have r < t.
    """
    for index in range(config.accumulate):
        draws = draw(config, step, Share(index=group.rank + group.size * index,
                                         count=group.size * config.accumulate))
        part = {name: value[index::config.accumulate] for name, value in batch.items()}
        yield {name: value.to(group.device, non_blocking=True)
               for name, value in {**part, **draws.tensors()}.items()}, draws.moving


def can_capture(config: TrainConfig, group: Group, strategy: str) -> bool:
    """Whether the gradient can be a CUDA graph: whole weights, no random state to restore."""
    sharded = group.size > 1 and strategy == 'fsdp'
    return (group.device.type == 'cuda' and not sharded
            and not config.repeats_dropout and not config.activation_checkpointing)


def describe_run(config: TrainConfig, data: PairDataset) -> dict:
    """Return what must stay the same for a run to go on: options that change numbers, and data."""
    silent = ('save_every', 'validate_every', 'activation_checkpointing')
    chosen = {option.name: to_plain(getattr(config, option.name)) for option in options()
              if option.name not in silent}
    return {**chosen, 'robot': to_plain(config.robot), 'data': data.fingerprint}


def _require_finite(losses: Sequence[float], first: int, out: Path, config: TrainConfig,
                    data: PairDataset, rows: np.ndarray) -> None:
    """NonFiniteLoss, with a file on the batch, if a loss is NaN or infinite."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is None:
        return
    step = first + bad
    batch = draw_rows(config, step, rows, Share())
    path = out / f'nonfinite_step_{step}.json'
    path.write_text(json.dumps({
        'step': step, 'loss': str(losses[bad]), 'seed': config.seed, 'rows': batch.tolist(),
        'episodes': sorted({data.episode_names[data.episode_of_row[row]] for row in batch})},
        indent=1) + '\n', encoding='utf-8')
    raise NonFiniteLoss(f'the loss of step {step} is {losses[bad]}; its rows and episodes are in '
                        f'{path}. The last snapshot is intact: look at these episodes, or lower '
                        f'--learning-rate')


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='train', description='Train a policy on recordings (rosbag2 or LeRobot) and write a '
        'checkpoint that policy_node runs. Started again with the same --out, a run goes on where '
        'it was interrupted. Several GPUs: torchrun --nproc-per-node N -m '
        'meanflow_ros.training.train ...')
    parser.add_argument('config', type=Path, help='training YAML, see config/train_metaworld.yaml')
    parser.add_argument('--data', type=Path, required=True,
                        help='a rosbag2 or LeRobot data set, or a folder of them')
    parser.add_argument('--out', type=Path, required=True,
                        help='directory of the run; the checkpoint is written to OUT/policy')
    parser.add_argument('--cache', type=Path,
                        help='where decoded recordings are kept (default OUT/cache)')
    parser.add_argument('--device', default='auto', help='auto, cuda, cuda:N or cpu')
    parser.add_argument('--strategy', choices=STRATEGIES, default='ddp',
                        help='how several processes share the work (default ddp)')
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='processes that read recordings')
    parser.add_argument('--weights', choices=DTYPES, default='bfloat16',
                        help='how the weights of the checkpoint are stored (default bfloat16)')
    parser.add_argument('--wandb', metavar='PROJECT', default='',
                        help='log to this Weights & Biases project too')
    add_overrides(parser)
    return parser.parse_args(argv)


def decode(recordings: Path, config: TrainConfig, cache: Path, workers: int) -> PairDataset:
    """Decode what is below `recordings` into `cache`, unless it holds just that, and open it."""
    with tqdm(unit='episode', desc='decoding', file=sys.stderr) as bar:
        def told(name: str, rows: int, reason: str | None) -> None:
            bar.update()
            if reason:
                bar.write(f'skipped {name}: {reason}', file=sys.stderr)

        build_cache(find_recordings(recordings), config.robot, config.data, config.image_size,
                    cache, workers, told)
    data = open_cache(cache)
    log.info('%d observations of %d episodes, %d instructions, %d episodes skipped', len(data),
             len(data.episode_names), len(data.instructions), len(data.skipped))
    return data


def decode_once(config: TrainConfig, arguments: argparse.Namespace, group: Group) -> PairDataset:
    """Let the first process decode the recordings; the others wait and open the cache."""
    cache = arguments.cache or arguments.out / 'cache'
    data = decode(arguments.data, config, cache, arguments.workers) if group.first else None
    group.wait()
    return data or open_cache(cache)


def main(argv=None) -> int:
    """Run the `train` command."""
    logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # a batch system's end, as Ctrl-C
    group = None
    try:
        config = read_train_config(arguments.config, arguments)
        group = join_group(arguments.device)
        data = decode_once(config, arguments, group)
        policy = train(config, data, arguments.out, group, strategy=arguments.strategy,
                       weights_dtype=DTYPES[arguments.weights], wandb_project=arguments.wandb)
    except KeyboardInterrupt:
        print(f'train: interrupted; the same command goes on from the last snapshot in '
              f'{arguments.out}', file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f'train: the device has too little memory ({str(error).splitlines()[0]}); use a '
              f'larger --accumulate, --activation-checkpointing true, or a smaller --batch-size',
              file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f'train: {error}' + (f'; free some space below {arguments.out}, then run the same '
                                   'command again' if full else ''), file=sys.stderr)
        return 2 if isinstance(error, ValueError) or isinstance(error, OSError) and not full else 1
    finally:
        if group:
            leave_group(group)
    print(f'checkpoint written to {policy}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
