"""One process or many (torchrun): who this process is, and how the network is wrapped.

ddp: every process holds all weights, gradients are averaged. fsdp: weights, gradients and
optimiser state are sharded. What is wrapped is the whole loss, so that the weights that the
derivatives use are those that the wrapper sees.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from meanflow_ros.training.draws import Share
from meanflow_ros.training.objective import TrainingLoss

STRATEGIES = ('ddp', 'fsdp')


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of this run and the place of this one among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Return which part of each batch is this process's."""
        return Share(index=self.rank, count=self.size)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def average(self, value: Tensor) -> None:
        """Replace `value` by its mean over the processes."""
        if self.size == 1:
            return
        if value.is_cuda:
            dist.all_reduce(value, op=dist.ReduceOp.AVG)
        else:   # gloo only adds
            dist.all_reduce(value)
            value /= self.size

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over the processes."""
        value = value.clone()
        self.average(value)
        return value


def join_group(device: str) -> Group:
    """Return this process's group; started by torchrun it waits for the others.

    device: auto, cpu, cuda or cuda:N. Under torchrun each process takes the GPU of its number.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    size = int(os.environ.get('WORLD_SIZE', 1))
    if device == 'cuda':
        device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    place = torch.device(device)
    if place.type == 'cuda':
        torch.cuda.set_device(place)
    if size > 1:
        dist.init_process_group('nccl' if place.type == 'cuda' else 'gloo',
                                device_id=place if place.type == 'cuda' else None)
    return Group(rank=int(os.environ.get('RANK', 0)), size=size, device=place)


def leave_group(group: Group) -> None:
    """End the communication with the other processes."""
    if group.size > 1:
        dist.destroy_process_group()


def wrap(loss: TrainingLoss, group: Group, strategy: str, *, captured: bool = False) -> nn.Module:
    """Return the loss as the processes of the group share it; alone, the loss itself.

    captured: gradients are replayed from a CUDA graph, which `Gradients` averages itself.

    fsdp shards the layers of the encoder one by one. The rest, the action network, is gathered
    as a whole for the length of `forward`: a forward derivative cannot pass through the hooks
    that gather a layer.
    """
    if group.size == 1 or captured:
        return loss
    if strategy == 'ddp':
        device_ids = [group.device] if group.device.type == 'cuda' else None
        return DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True,
                                       broadcast_buffers=False)
    for layer in loss.network.encoder.language_model['encoder'].layers:
        fully_shard(layer)
    fully_shard(loss, reshard_after_forward=False)
    return loss


def full_weights(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the weights of the network inside `model`, gathered; only the first has them all."""
    weights = get_model_state_dict(model, options=StateDictOptions(
        full_state_dict=group.size > 1, cpu_offload=group.size > 1))
    prefix = 'network.'
    return {name.removeprefix(prefix): value for name, value in weights.items()
            if name.startswith(prefix)}
