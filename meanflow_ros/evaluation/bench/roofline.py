"""The least time that an inference can take: weights read once, operations at the best rate.

Bytes and operations are counted from the model, on the `meta` device, where nothing is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meanflow_ros.core.fused import FusedNetwork
from meanflow_ros.core.fused_encoder import Placement
from meanflow_ros.core.policy import Policy


def work_of(policy: Policy, *, steps: int, dtype: torch.dtype,
            sequence: int) -> dict[str, dict[str, float]]:
    """Return GFLOP and MB of weights of each stage of one inference.

    sequence: visual tokens and prompt, with its padding. Activations and pictures are left out:
    they stay in a GPU's caches. Each of the N network evaluations reads the DiT's weights.
    """
    meta = torch.device('meta')
    network, robot = FusedNetwork(policy, Placement(meta, dtype)), policy.robot
    side, cameras, dit = network.image_size, len(robot.cameras), network.dit
    visual = cameras * network.see.tokens
    state = torch.empty(1, len(robot.state_names), device=meta) if robot.state_names else None
    schedule = network.schedule(steps)
    context = torch.empty(1, sequence, policy.network.encoder.width, device=meta, dtype=dtype)
    once = [dit.keys_and_values]
    if schedule.modulations is None:
        once += [dit.modulation, dit.state_encoder]
    repeated = [dit.blocks, dit.encoder, dit.decode_in, dit.decode_out]
    pictures = torch.empty(1, cameras, side, side, 3, device=meta, dtype=dtype)
    noise = torch.empty(1, robot.horizon, dit.action_size, device=meta)

    def text() -> Tensor:
        return network.read(context[:, :visual], context[:, visual:], None)

    def decide() -> Tensor:
        return network.decide(context, None, dit.modulations(schedule, state), noise, schedule,
                              steps)

    return {'vision': _work(lambda: network.see(pictures), _bytes(network.see)),
            'text': _work(text, _bytes(network.read)),
            'dit': _work(decide, sum(map(_bytes, once)) + steps * sum(map(_bytes, repeated)))}


def _bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size()
               for values in (module.parameters(), module.buffers()) for value in values)


@torch.inference_mode()
def _work(run, weights: int) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {'gflop': round(counter.get_total_flops() / 1e9, 3), 'mb': round(weights / 1e6, 3)}


def bound_ms(work: dict[str, dict[str, float]], *, bandwidth_tb_s: float,
             matrix_tflop_s: float) -> dict[str, float]:
    """Return the bound of each stage, the larger of its two times, and their sum, ms."""
    bounds = {stage: round(max(of['gflop'] / matrix_tflop_s, of['mb'] / bandwidth_tb_s / 1e3), 4)
              for stage, of in work.items()}
    return {**bounds, 'total': round(sum(bounds.values()), 4)}
