"""How long an evaluation of the action network takes, and how far it is from float32.

Three ways, in bfloat16 and in one run: PyTorch's operations, kernel by kernel, and all of it as
one kernel (core/persistent.py); the last two on a GPU only. Random weights; evaluations one after
the other in a CUDA graph, so that the host does not count.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch

from meanflow_ros.core.dit import ActionDiT, dit_preset
from meanflow_ros.core.fused_dit import FusedDiT
from meanflow_ros.core.fused_encoder import Placement
from meanflow_ros.evaluation.bench import device as clocks

CONTEXT_WIDTH, ACTIONS, STATES = 1024, 7, 7
EVALUATIONS = 4   # in a graph
ZERO_WEIGHTS_BECOME = 0.1


def random_network(preset: str, blocks: int, device: torch.device) -> ActionDiT:
    """Return a network of a preset's sizes in which no gate is zero; blocks: 0 for its own."""
    config = dit_preset(preset, {'bench': ACTIONS}, {'bench': STATES})
    config = dataclasses.replace(config, depth=blocks or config.depth)
    torch.manual_seed(0)
    with device:
        network = ActionDiT(config, CONTEXT_WIDTH).eval()
    for value in network.state_dict().values():
        if value.is_floating_point() and not value.any():
            value.normal_(0.0, ZERO_WEIGHTS_BECOME)
    return network


def conditioned(network: FusedDiT, context: torch.Tensor, state: torch.Tensor,
                bias: torch.Tensor, given: torch.Tensor | None):
    """Return z -> velocity for one observation."""
    dtype, schedule = network.place.dtype, network.schedule([(1.0, 1.0)])
    modulation, clean = network.modulations(schedule, state)
    keys, values = network.laid_out(*network.keys_and_values(context.to(dtype)))
    bias, known = bias.to(dtype), None if given is None else (given, clean)
    return lambda z: network.velocity(z, modulation, schedule.offsets[0], keys, values, bias,
                                      known)


def microseconds(velocity, z: torch.Tensor, runs: int) -> list[float]:
    """Return what an evaluation takes, in each of `runs` runs of some."""
    def evaluations() -> None:
        x = z
        for _ in range(EVALUATIONS):
            x = x - velocity(x) / EVALUATIONS

    run = clocks.capture(evaluations) if z.is_cuda else evaluations
    return [value * 1e3 / EVALUATIONS for value in clocks.device_ms(
        run, runs, warm_up=min(20, runs), device=z.device)]


@torch.inference_mode()
def main(argv=None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--preset', choices=('large', 'tiny'), default='large')
    parser.add_argument('--blocks', type=int, default=0, help="0: the preset's own")
    parser.add_argument('--horizon', type=int, default=10, help='steps of a chunk; default 10')
    parser.add_argument('--keys', type=int, default=128, help='of the context; default 128')
    parser.add_argument('--given', type=int, default=0, help='steps of the chunk that are given')
    parser.add_argument('--runs', type=int, default=300)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='JSON file')
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', torch.cuda.current_device())
    network = random_network(arguments.preset, arguments.blocks, device)

    def fused(dtype: torch.dtype, kernels: bool) -> FusedDiT:
        return FusedDiT(network, 'bench', arguments.horizon, Placement(device, dtype, kernels))

    z = torch.randn(1, arguments.horizon, ACTIONS, device=device)
    bias = torch.zeros(1, 1, 1, arguments.keys, device=device)
    bias[..., -arguments.keys // 8:] = -torch.inf
    given = torch.arange(arguments.horizon, device=device)[None] < arguments.given
    question = (torch.randn(1, arguments.keys, CONTEXT_WIDTH, device=device),
                torch.rand(1, STATES, device=device), bias, given if arguments.given else None)
    exact = conditioned(fused(torch.float32, False), *question)(z)
    ways = {'PyTorch': fused(torch.bfloat16, False)}
    if device.type == 'cuda':
        ways['kernel by kernel'] = fused(torch.bfloat16, True)
        ways['kernel by kernel'].why_apart = 'it is measured apart'
        ways['one kernel'] = fused(torch.bfloat16, True)
    rows = {}
    print(f'{"":18} {"p50 us":>8} {"p95":>8} {"off float32":>12}')
    for name, way in ways.items():
        if name == 'one kernel' and way.why_apart:
            print(f'{name}: {way.why_apart}')
            continue
        velocity = conditioned(way, *question)
        found = velocity(z)
        off = ((found - exact).abs().max() / exact.abs().max()).item()
        same = all(torch.equal(velocity(z), found) for _ in range(20))
        times = sorted(microseconds(velocity, z, arguments.runs))
        rows[name] = {'p50_us': statistics.median(times),
                      'p95_us': times[int(0.95 * (len(times) - 1))], 'off_float32': off,
                      'repeats_are_equal': same, 'runs': len(times)}
        print(f'{name:18} {rows[name]["p50_us"]:8.1f} {rows[name]["p95_us"]:8.1f} {off:12.4f}'
              f'{"" if same else "  REPEATS DIFFER"}', flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(
            {'command': ' '.join(['bench_action_network.py', *(argv or sys.argv[1:])]),
             'machine': clocks.describe(device), 'rows': rows}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
