"""FastPolicy: a Policy that runs fast. The only place that knows how.

Constants are computed once (core/fused*.py), what runs is captured as a CUDA graph where there is
a CUDA device (core/captured.py), and compiled if asked (core/compiled.py). Its chunks are those
of the Policy that it is made from, up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core import fp8, kernels
from meanflow_ros.core.captured import (
    CudaGraphs, GraphCache, Numbers, Prompt, Request, lay_out, picture_shapes)
from meanflow_ros.core.compiled import CompiledParts, keep_compiled_in, users_cache
from meanflow_ros.core.contract import ActionChunk, Observation, clean_instruction
from meanflow_ros.core.fused import FusedNetwork
from meanflow_ros.core.fused_dit import Schedule
from meanflow_ros.core.fused_encoder import Placement
from meanflow_ros.core.policy import Policy, PolicyNetwork
from meanflow_ros.core.prefix import checked_prefix

PROMPTS_KEPT, SCHEDULES_KEPT = 64, 16
CPU_INFO = Path('/proc/cpuinfo')
BUCKET = 64   # tokens; a GPU's matrix products work in tiles of such sizes
KERNEL_TOLERANCE = 0.05   # of chunks with and without our kernels, bfloat16, normalised units
FP8_TOLERANCE = 0.1       # with and without fp8; the shipped policy's is 0.025 for black pictures
Value = TypeVar('Value')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How a policy is run.

    dtype: of weights and activations; the policy's own by default. graphs: capture CUDA graphs.
    kernels: use those of Triton and CUDA. compile: compile the network's blocks when the policy is
    warmed up, by torch.compile's `backend`. compile_cache: where what was compiled is. fp8: put
    the encoder's layers into fp8 when the policy is warmed up (core/fp8.py). lengths: of the
    sequence of visual tokens and prompt, ascending, which prompts are padded to; multiples
    of 64 by default on a GPU, none on a CPU. threads: of a CPU; 0 takes PyTorch's own choice, but
    never more than this process may use.
    """

    dtype: torch.dtype | None = None
    graphs: bool = True
    kernels: bool = True
    compile: bool = False
    backend: str | Callable = 'inductor'
    compile_cache: Path | None = None
    fp8: bool = False
    lengths: tuple[int, ...] | None = None
    threads: int = 0


class FastPolicy(Policy):
    """A Policy with the same interface and results; made from one, which it does not change.

    What it holds of the policy's weights are copies. Use it from one thread at a time.
    """

    def __init__(self, policy: Policy, *, device: torch.device | str | None = None,
                 options: RuntimeOptions = RuntimeOptions()):
        device = torch.device(device or policy.device)
        if device.type == 'cuda' and device.index is None:
            device = torch.device('cuda', torch.cuda.current_device())
        with torch.device('meta'):   # it has names and sizes, and weighs nothing
            network = PolicyNetwork(policy.config, policy.network.encoder.tokenizer)
        super().__init__(policy.config, network, dtype=options.dtype or policy.dtype)
        if device.type == 'cpu':
            torch.set_num_threads(options.threads or min(torch.get_num_threads(), usable_cores()))
        self._why_no_kernels = (kernels.why_not(device, self.dtype) if options.kernels
                                else 'kernels were not asked for')
        self._place = Placement(device, self.dtype, kernels=not self._why_no_kernels)
        self.fused = FusedNetwork(policy, self._place,
                                  shifts=options.compile or self._place.kernels)
        self.fused.eval().requires_grad_(False)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)   # what is folded is used on other streams
            torch.cuda.empty_cache()         # and what that took is no longer needed
        self._lengths = self._default_lengths() if options.lengths is None else options.lengths
        self._prompts: Recent[Prompt] = Recent(PROMPTS_KEPT)
        self._schedules: Recent[Schedule] = Recent(SCHEDULES_KEPT)
        self._device_lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self._options, self._compiled, self._tried = options, None, set()
        if options.compile_cache and (options.compile or not self._why_no_kernels):
            keep_compiled_in(options.compile_cache)
        self._why_not_compiled = 'compilation was not asked for'
        if options.compile:
            self._why_not_compiled = 'the policy is not warmed up yet'
        self._why_not_fp8 = (fp8.why_not(device, self.dtype) if options.fp8
                             else 'fp8 was not asked for')
        self._fp8_is_due = not self._why_not_fp8
        if self._fp8_is_due:
            self._why_not_fp8 = 'the policy is not warmed up yet'
        self._graphs, self._why_eager = None, f'there are no CUDA graphs on {device.type}'
        if device.type == 'cuda':
            self._why_eager = 'graphs were not asked for'
        if device.type == 'cuda' and options.graphs:
            self._graphs = GraphCache(lambda: CudaGraphs(self.fused, self._device_lock).capture)

    @classmethod
    def load(cls, directory: Path | str, *, device: str | torch.device = 'cpu',
             dtype: torch.dtype = torch.float32,
             options: RuntimeOptions = RuntimeOptions()) -> 'FastPolicy':
        """Read a checkpoint as Policy.load does; what is compiled is kept for the user."""
        policy = Policy.load(directory, dtype=dtype, as_stored=True)
        if options.compile_cache is None:
            options = dataclasses.replace(options, compile_cache=users_cache())
        return cls(policy, device=device, options=options)

    @property
    def device(self) -> torch.device:
        """Return the device that the network is on."""
        return self._place.device

    @property
    def why_eager(self) -> str:
        """Return why the last chunk was computed without a CUDA graph; '' if it was with one."""
        return self._why_eager

    @property
    def why_not_compiled(self) -> str:
        """Return why the network is not compiled; '' if it is."""
        return self._why_not_compiled

    @property
    def why_no_kernels(self) -> str:
        """Return why PyTorch's operations stand in for our kernels; '' if they do not."""
        return self._why_no_kernels

    @property
    def why_not_fp8(self) -> str:
        """Return why the encoder's layers are not in fp8 (core/fp8.py); '' if they are."""
        return self._why_not_fp8

    @property
    def why_not_one_kernel(self) -> str:
        """Return why the action network takes many kernels (core/persistent.py); '' if one."""
        return self.fused.dit.why_apart

    def save(self, directory: Path | str, **_) -> None:
        """Raise ValueError: the weights are no longer those of a checkpoint."""
        raise ValueError(f'a FastPolicy cannot be saved to {directory}; save the Policy that it '
                         f'was made from')

    @torch.inference_mode()
    def act_batch(self, observations: Sequence[Observation], *, steps: int | None = None,
                  seeds: Sequence[int], noise: Tensor | None = None,
                  prefixes: Sequence[np.ndarray | None] = ()) -> list[ActionChunk]:
        """Return the chunk of each of B observations, as Policy.act_batch does.

        One observation at a time is computed by a CUDA graph, more are not.
        """
        prefixes = [checked_prefix(prefix, self.robot, self.config.max_prefix)
                    for prefix in prefixes or [None] * len(observations)]
        with self._on_device():
            request = self.request(observations, steps or self.config.sampler_steps, seeds, noise,
                                   prefixes)
            actions = (self._graph_of(request) or self._eager)(request)
        return [self.physical_chunk(row, observation, prefix)
                for row, observation, prefix in zip(actions, observations, prefixes)]

    def warm_up(self, observation: Observation, steps: Sequence[int] = ()) -> str:
        """Compile, and capture the graphs of these NFEs for pictures like the observation's.

        All lengths that a prompt can be padded to are made ready, and prefixes if the network
        takes them. steps: the checkpoint's own by default. Returns '' or why chunks will be eager.
        """
        if self._fp8_is_due and self._graphs:
            self._graphs.forget()   # they read weights that are about to go
        prefixes = [np.zeros((count, self.robot.action_space.size))
                    for count in (0, 1)[:1 + (self.config.max_prefix > 0)]]
        for some, prefix, index in itertools.product(
                steps or (self.config.sampler_steps,), prefixes,
                range(max(1, len(self._lengths)))):
            with torch.inference_mode(), self._on_device():
                prompt = self._embedded([clean_instruction(observation.instruction)],
                                        self._lengths[index:])
                request = dataclasses.replace(
                    self.request([observation], some, [0], prefixes=[prefix]), prompt=prompt)
                self._prepare(request)
            if self._graphs:
                self._graphs.wait(request)
        self.act(observation, steps=some)
        return self._why_eager

    def _prepare(self, request: Request) -> None:
        """Try the kernels, fp8, then compile; what fails is left out, and its reason is kept."""
        given = request.known   # other kernels do that
        if not self._why_no_kernels and given not in self._tried:
            self._tried.add(given)
            self._why_no_kernels = self._try_kernels(request)
        if self._fp8_is_due:
            self._fp8_is_due = False
            self._why_not_fp8 = self._try_fp8(request)
        if not self._options.compile:
            return
        if self._compiled is None:
            self._compiled = CompiledParts(self.fused, backend=self._options.backend)
        self._compiled.try_out(lambda: self._eager(request))
        self._why_not_compiled = self._compiled.problem

    def _try_kernels(self, request: Request) -> str:
        """Return '' if the kernels give what PyTorch gives, else why not, and go on without."""
        users = [part for part in self.fused.modules() if getattr(part, 'kernels', False)]
        dit, apart = self.fused.dit, self.fused.dit.why_apart

        def use(them: bool, *, why_apart: str) -> None:
            dit.why_apart = why_apart
            for part in users:
                part.kernels = them

        use(False, why_apart='kernels are being tried')
        expected = self._eager(request)
        use(True, why_apart=apart)
        tolerance = KERNEL_TOLERANCE if self._why_not_fp8 else FP8_TOLERANCE
        problem = self._off(request, expected, 'the kernels', tolerance)
        if problem and not apart:
            use(True, why_apart=problem)
            problem = self._off(request, expected, 'the kernels', tolerance)
        if problem:
            use(False, why_apart=problem)
        return problem

    def _try_fp8(self, request: Request) -> str:
        """Return '' if fp8 gives nearly what there was before, else why not, and go back."""
        product, problem = fp8.choose(self.device)
        if product is None:
            return problem
        expected = self._eager(request)
        layers = fp8.Fp8Layers(self.fused, product, kernels=not self._why_no_kernels)
        problem = self._off(request, expected, 'fp8', FP8_TOLERANCE) or layers.problem()
        if problem:
            layers.undo()
        del layers
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()   # of what is not used any more
        return problem

    def _off(self, request: Request, expected: np.ndarray, what: str, tolerance: float) -> str:
        """Return '' if an eager run gives what is expected, else what is wrong."""
        try:
            difference = self.fused.off(self._eager(request), expected)
        except Exception as error:  # what a compiler of kernels or a driver says
            return f'{what} failed: {type(error).__name__}: {error}'
        if difference <= tolerance:
            return ''
        return f'chunks were {difference:.2g} off with {what}'

    @contextlib.contextmanager
    def from_pinned_memory(self, request: Request) -> Iterator[Callable[[], np.ndarray] | None]:
        """Put a request's pictures into pinned memory; give what computes its actions from there.

        It may be called again and again; None where there is no graph for the request.
        """
        with torch.inference_mode(), self._on_device():
            graph = self._graph_of(request)
            if graph is not None:
                graph.load_pictures(request)
            yield graph and functools.partial(graph.go_on, request)

    def close(self) -> None:
        """Free the graphs, and end the thread that captures them."""
        if self._graphs:
            self._graphs.close()

    def _graph_of(self, request: Request) -> Callable[[Request], np.ndarray] | None:
        if self._graphs is None:
            return None
        if len(request.images) > 1:
            self._why_eager = 'graphs are for one observation at a time'
            return None
        graph = self._graphs.find(request)
        self._why_eager = '' if graph else self._graphs.why(request.shape)
        return graph

    def _eager(self, request: Request) -> np.ndarray:
        device = self.device
        pictures = [torch.empty(shape, dtype=torch.uint8)
                    for shape in picture_shapes(len(request.images), request.sizes)]
        lay_out(pictures, request.images)
        numbers = request.numbers
        actions = self.fused(
            [group.to(device) for group in pictures],
            request.prompt.embedded, request.prompt.bias,
            numbers.state.to(device) if numbers.state.numel() else None,
            numbers.noise.to(device), request.schedule, request.steps,
            tuple(value.to(device) for value in numbers.known) if numbers.known else None)
        return actions.cpu().numpy()

    def request(self, observations: Sequence[Observation], steps: int, seeds: Sequence[int],
                noise: Tensor | None = None, prefixes: Sequence[np.ndarray] = ()) -> Request:
        """Return what the network takes; ValueError as `act` says. prefixes: checked ones."""
        names = self.robot.camera_names
        for name in names:
            if any(name not in observation.images for observation in observations):
                raise ValueError(f'the observation has no picture of camera {name!r}')
        given = any(map(len, prefixes))

        def find_numbers() -> Numbers:
            drawn, known = noise, None
            if noise is None:
                drawn = torch.cat([self.noise(observation.stamp_ns, seed)
                                   for observation, seed in zip(observations, seeds)])
            if given:
                x, which = self.known_steps(prefixes, observations)
                known = x.float().cpu(), which.cpu()
            return Numbers(torch.from_numpy(self.states(observations)), drawn.float().cpu(), known)

        return Request(
            images=[[observation.images[name] for name in names] for observation in observations],
            prompt=self._prompt(tuple(clean_instruction(o.instruction) for o in observations)),
            schedule=self._schedules.get(steps, lambda: self._made(self.fused.schedule(steps))),
            steps=steps, known=given, find_numbers=find_numbers)

    def states(self, observations: Sequence[Observation]) -> np.ndarray:
        """Return the normalised states (B, P); ValueError as `act` says."""
        names = self.robot.state_names
        if not names:
            return np.zeros((len(observations), 0), np.float32)
        for state in (observation.state for observation in observations):
            if state is None or state.shape != (len(names),):
                raise ValueError(f'the observation must have {len(names)} states {list(names)}, '
                                 f'got {None if state is None else state.shape}')
        return self.config.state_normalizer.apply(
            np.stack([o.state for o in observations])).astype(np.float32)

    def _prompt(self, instructions: tuple[str, ...]) -> Prompt:
        return self._prompts.get(
            instructions, lambda: self._embedded(instructions, self._lengths))

    def _embedded(self, instructions: Sequence[str], lengths: Sequence[int]) -> Prompt:
        prompts = [self.config.prompt.format(instruction=text) for text in instructions]
        return self._made(Prompt(*self.fused.embed_prompts(prompts, lengths)))

    def _made(self, constants: Value) -> Value:
        """Return constants once they are there, for any stream."""
        if self._stream:
            self._stream.synchronize()
        return constants

    def _default_lengths(self) -> tuple[int, ...]:
        if self.device.type == 'cpu':
            return ()
        prompts = self.fused.embed_prompts
        shortest, longest = prompts.shortest // BUCKET + 1, -(-prompts.longest // BUCKET)
        return tuple(min(count * BUCKET, prompts.positions)
                     for count in range(shortest, longest + 1))

    @contextlib.contextmanager
    def _on_device(self):
        """Let nothing else run on the device, and this on a stream of its own."""
        with self._device_lock, torch.cuda.stream(self._stream):
            yield


class Recent(dict[Hashable, Value]):
    """The values that were asked for last, at most `limit`; others are made when asked for."""

    def __init__(self, limit: int):
        super().__init__()
        self._limit = limit

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key."""
        self[key] = value = self.pop(key) if key in self else make()
        if len(self) > self._limit:
            del self[next(iter(self))]
        return value


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware: newer GPUs, and some CPUs."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(OSError):
        words = set(CPU_INFO.read_text().split())
        return not words.isdisjoint(('avx512_bf16', 'amx_bf16', 'bf16'))   # x86, x86, Arm
    return False


def usable_cores() -> int:
    """Return how many CPUs this process may use: by its affinity, and by its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores
