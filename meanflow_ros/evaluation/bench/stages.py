"""How long each stage of a FastPolicy's inference takes, by the device's clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

from meanflow_ros.core.captured import lay_out, picture_shapes
from meanflow_ros.core.contract import Observation
from meanflow_ros.core.runtime import FastPolicy
from meanflow_ros.evaluation.bench.device import capture, device_ms, host_ms, summary


@torch.inference_mode()
def stage_times(policy: FastPolicy, observation: Observation, *, steps: int, runs: int,
                graphs: bool) -> dict[str, dict[str, float]]:
    """Return the percentiles of upload, resize, vision, text, DiT and download, ms.

    Each stage runs alone, as a graph of its own where `graphs`; starting it is part of its time.
    By the host's clock beside them: `copy` of the pictures into pinned memory, and where there is
    a graph `pinned`, all from there to the actions in pinned memory.
    """
    network, device = policy.fused, policy.device
    request = policy.request([observation], steps, [0], None)
    pinned = device.type == 'cuda'
    host = [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
            for shape in picture_shapes(1, request.sizes)]
    lay_out(host, request.images)
    pictures = [group.to(device) for group in host]
    numbers, prompt = request.numbers, request.prompt
    state = numbers.state.to(device) if numbers.state.numel() else None
    noise = numbers.noise.to(device)
    kept: dict[str, torch.Tensor] = {}

    def upload() -> None:
        for source, target in zip(host, pictures):
            target.copy_(source, non_blocking=True)

    def resize() -> None:
        kept['pixels'] = network.prepare(pictures)

    def vision() -> None:
        kept['visual'] = network.see(kept['pixels'])

    def text() -> None:
        kept['context'] = network.read(kept['visual'], prompt.embedded, prompt.bias)

    def dit() -> None:
        kept['actions'] = network.physical(network.decide(
            kept['context'], prompt.bias, network.dit.modulations(request.schedule, state), noise,
            request.schedule, steps))

    def download() -> None:
        result.copy_(kept['actions'], non_blocking=True)

    times, result = {}, None
    for stage in (upload, resize, vision, text, dit, download):
        if stage is download:
            result = torch.empty_like(kept['actions'], device='cpu', pin_memory=pinned)
        stage()
        run: Callable[[], None] = capture(stage) if graphs else stage
        run()
        times[stage.__name__] = summary(device_ms(run, runs, warm_up=20, device=device))
    times['copy'] = summary(host_ms(lambda: lay_out(host, request.images), runs, warm_up=20))
    with policy.from_pinned_memory(request) as act:
        if act:
            times['pinned'] = summary(host_ms(act, runs, warm_up=20))
    return times
