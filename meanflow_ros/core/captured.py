"""CUDA graphs of a FusedNetwork, from pictures in host memory to actions in host memory.

A graph is fixed to addresses and to a GraphShape; an inference is three graphs, of which one runs
beside another. They are captured on a thread of their own while chunks go on being computed
eagerly. Streams keep the two apart: a stream has a workspace of cuBLAS of its own, and what a
graph was captured with may be used by nothing that runs beside it.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meanflow_ros.core.fused import FusedNetwork
from meanflow_ros.core.fused_dit import Schedule

WARM_UP_RUNS = 3
MAX_GRAPHS = 12
GRAPH_TOLERANCE = 1e-3   # of the first replay to the eager run, of half an action's range


@dataclass(frozen=True)
class GraphShape:
    """What a graph is fixed to.

    sizes: height and width of each camera's pictures. steps: NFE. length: of the sequence, visual
    tokens and prompt. known: whether steps are given.
    """

    sizes: tuple[tuple[int, int], ...]
    steps: int
    length: int
    known: bool


@dataclass(frozen=True)
class Prompt:
    """Prompts as the network takes them, see PromptEmbedding."""

    embedded: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Numbers:
    """What else the network takes, on the CPU.

    state: (B, P), P may be 0. noise: (B, T, A). known: steps that are given, see
    FusedNetwork.decide.
    """

    state: Tensor
    noise: Tensor
    known: tuple[Tensor, Tensor] | None = None

    def parts(self) -> list[Tensor]:
        """Return all of them, as float32."""
        return [self.state, self.noise, *(value.float() for value in self.known or ())]


@dataclass(frozen=True)
class Request:
    """One inference of B observations.

    images: for each observation, the picture of each camera. known: whether steps are given.
    find_numbers: finds what vision does not wait for; ValueError as `act` says.
    """

    images: Sequence[Sequence[np.ndarray]]
    prompt: Prompt
    schedule: Schedule
    steps: int
    known: bool
    find_numbers: Callable[[], Numbers]

    @functools.cached_property
    def numbers(self) -> Numbers:
        """Return what vision does not wait for."""
        return self.find_numbers()

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return height and width of each camera's pictures."""
        return tuple(image.shape[:2] for image in self.images[0])

    @property
    def shape(self) -> GraphShape:
        """Return what a graph for this must be fixed to."""
        length = self.prompt.bias.shape[-1] if self.prompt.bias is not None else 0
        return GraphShape(self.sizes, self.steps, length, self.known)


def picture_shapes(batch: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the shapes (B, cameras, H, W, 3) in which pictures lie: one if all have one size."""
    if len(set(sizes)) == 1:
        return [(batch, len(sizes), *sizes[0], 3)]
    return [(batch, 1, *size, 3) for size in sizes]


def lay_out(pictures: Sequence[Tensor], images: Sequence[Sequence[np.ndarray]]) -> None:
    """Copy images into tensors of `picture_shapes`; to wake other threads would take longer."""
    for row, of_observation in enumerate(images):
        places = [camera for group in pictures for camera in group[row].numpy()]
        for place, image in zip(places, of_observation):
            place[:] = image


class StaticAct:
    """One inference on buffers that never move, of batch 1: what graphs are captured from.

    It is done in stages, so that `see` can begin to run while the host does what the others need.
    `tell` finds what modulates the network, and may run beside it: vision leaves much of a GPU
    idle. `decide` needs both. Where host memory can be pinned the copies to and from the device
    are part of the stages; elsewhere (a CPU, or a device that shares the host's memory) they are
    made before and after.
    """

    def __init__(self, network: FusedNetwork, request: Request, *, pinned: bool):
        device, dtype = network.place.device, network.place.dtype
        self._network, self._pinned = network, pinned
        self._schedule, self._steps = request.schedule, request.steps
        self._host = [torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned)
                      for shape in picture_shapes(1, request.sizes)]
        self._device = [torch.empty_like(host, device=device) for host in self._host]
        numbers = request.numbers.parts()
        self._host_numbers = torch.zeros(sum(map(torch.Tensor.numel, numbers)), pin_memory=pinned)
        self._numbers = torch.empty_like(self._host_numbers, device=device)
        parts = self._numbers.split([part.numel() for part in numbers])
        self._state, self._noise, *self._known = (
            part.view(like.shape) for part, like in zip(parts, numbers))
        self._prompt: Prompt | None = None
        self._embedded = torch.zeros_like(request.prompt.embedded, device=device, dtype=dtype)
        self._bias = torch.zeros_like(request.prompt.bias, device=device, dtype=dtype)
        self._actions = torch.zeros(1, self._noise.shape[1], len(network.middle),
                                    dtype=torch.float64, device=device)
        self._result = torch.zeros_like(self._actions, device='cpu', pin_memory=pinned)

    def load_pictures(self, request: Request) -> None:
        """Put what the first stage takes into the buffers."""
        lay_out(self._host, request.images)
        if not self._pinned:
            self._upload(self._host, self._device)

    def load_numbers(self, request: Request) -> None:
        """Put what the second stage takes into the buffers."""
        torch.cat([part.flatten() for part in request.numbers.parts()], out=self._host_numbers)
        if not self._pinned:
            self._upload([self._host_numbers], [self._numbers])

    def load_prompt(self, request: Request) -> None:
        """Put what the last stage takes into the buffers."""
        if request.prompt is not self._prompt:
            self._embedded.copy_(request.prompt.embedded)
            self._bias.copy_(request.prompt.bias)
            self._prompt = request.prompt

    def see(self) -> None:
        """Turn the pictures into visual tokens."""
        if self._pinned:
            self._upload(self._host, self._device)
        self._visual = self._network.see(self._network.prepare(self._device))

    def tell(self) -> None:
        """Turn the state into what modulates the network."""
        if self._pinned:
            self._upload([self._host_numbers], [self._numbers])
        self._modulations = self._network.dit.modulations(
            self._schedule, self._state if self._state.numel() else None)

    def decide(self) -> None:
        """Turn all of it into actions."""
        known = (self._known[0], self._known[1] > 0) if self._known else None
        context = self._network.read(self._visual, self._embedded, self._bias)
        self._network.physical(self._network.decide(
            context, self._bias, self._modulations, self._noise, self._schedule, self._steps,
            known), out=self._actions)
        if self._pinned:
            self._result.copy_(self._actions, non_blocking=True)

    def result(self) -> np.ndarray:
        """Return the actions (1, T, A) in physical units, once the device is done."""
        if not self._pinned:
            self._result.copy_(self._actions)
        return self._result.numpy().copy()

    @staticmethod
    def _upload(host: Sequence[Tensor], device: Sequence[Tensor]) -> None:
        for source, target in zip(host, device):
            target.copy_(source, non_blocking=True)


class Replay:
    """Computes requests of one shape: starts the stages of an act, as soon as it can.

    see, tell, decide: start those of the act. wait: returns when the device is done.
    """

    def __init__(self, act: StaticAct, see: Callable[[], None], tell: Callable[[], None],
                 decide: Callable[[], None], wait: Callable[[], None] = lambda: None):
        self._act, self._see, self._tell, self._decide, self._wait = act, see, tell, decide, wait

    def __call__(self, request: Request) -> np.ndarray:
        """Return the actions (1, T, A) of a request."""
        self.load_pictures(request)
        return self.go_on(request)

    def load_pictures(self, request: Request) -> None:
        """Put the pictures where the first stage takes them."""
        self._act.load_pictures(request)

    def go_on(self, request: Request) -> np.ndarray:
        """Return the actions of the request whose pictures were loaded last."""
        self._see()
        self._act.load_numbers(request)
        self._tell()
        self._act.load_prompt(request)
        self._decide()
        self._wait()
        return self._act.result()


class CudaGraphs:
    """Captures StaticActs of one network as CUDA graphs; use it from one thread only.

    device_lock: held while anything that shares memory with the graphs runs on the device.
    """

    def __init__(self, network: FusedNetwork, device_lock: threading.Lock):
        self._network, self._device_lock = network, device_lock
        device = network.place.device
        # Memory that a chip shares with the host is slow to read where it is pinned.
        self._pinned = not getattr(torch.cuda.get_device_properties(device), 'is_integrated', 0)
        # What runs beside another graph may not use memory that this one has given back.
        self._pool, self._pool_beside = (torch.cuda.graph_pool_handle() for _ in range(2))
        self._warm, self._stream, self._beside = (torch.cuda.Stream(device) for _ in range(3))
        # Not the one that is captured beside: a capture takes what anybody starts on its stream.
        self._telling = torch.cuda.Stream(device)
        for stream in (self._stream, self._beside):   # whose workspace is not to lie in a graph's
            with torch.cuda.stream(stream):
                one = torch.ones(64, 64, device=device, dtype=network.place.dtype)
                torch.addmm(one[0], one, one)
            stream.synchronize()

    @torch.inference_mode()
    def capture(self, request: Request) -> Replay:
        """Return what computes requests of this one's shape; RuntimeError says why it cannot."""
        with torch.cuda.stream(self._warm):
            act = StaticAct(self._network, request, pinned=self._pinned)
            for load in (act.load_pictures, act.load_numbers, act.load_prompt):
                load(request)
            for _ in range(WARM_UP_RUNS):
                for stage in (act.see, act.tell, act.decide):
                    stage()
            self._warm.synchronize()
            expected = act.result()
        see = self._captured(act.see, self._stream, self._pool)
        tell = self._captured(act.tell, self._beside, self._pool_beside)
        decide = self._captured(act.decide, self._stream, self._pool)

        def tell_beside() -> None:
            if not self._pinned:   # the numbers were uploaded by the stream that sees
                self._telling.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._telling):
                tell.replay()
            torch.cuda.current_stream().wait_stream(self._telling)

        replay = Replay(act, see.replay, tell_beside, decide.replay,
                        lambda: torch.cuda.current_stream().synchronize())
        with self._device_lock, torch.cuda.stream(self._warm):
            difference = self._network.off(replay(request), expected)
        if not difference <= GRAPH_TOLERANCE:
            raise RuntimeError(f'the graph is {difference:.2g} off the eager run')
        return replay

    @staticmethod
    def _captured(stage: Callable[[], None], stream: torch.cuda.Stream,
                  pool: tuple) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph(): it collects garbage and empties caches, which stalls inference.
        # thread_local: other threads use the device meanwhile.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode='thread_local')
            try:
                stage()
            finally:
                graph.capture_end()
        return graph


class GraphCache:
    """The graphs that there are, by shape; those that are missing are captured in the background.

    make: returns a maker of graphs, called on the thread that captures. limit: graphs kept, those
    used last. What could not be captured is not tried again; `why` says what was wrong.
    """

    def __init__(self, make: Callable[[], Callable[[Request], Callable]], *,
                 limit: int = MAX_GRAPHS):
        self._make, self._limit, self._capture = make, limit, None
        self._lock = threading.Lock()
        self._graphs: OrderedDict[GraphShape, Callable[[Request], np.ndarray]] = OrderedDict()
        self._pending: dict[GraphShape, Future] = {}
        self._failed: OrderedDict[GraphShape, str] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='capture')

    def find(self, request: Request) -> Callable[[Request], np.ndarray] | None:
        """Return the graph for a request, or None and see to it that there will be one."""
        with self._lock:
            if request.shape in self._graphs:
                self._graphs.move_to_end(request.shape)
                return self._graphs[request.shape]
        self._begin(request)
        return None

    def wait(self, request: Request) -> None:
        """Return once the graph for a request is there, or known to be impossible."""
        with self._lock:
            if request.shape in self._graphs:
                return
        pending = self._begin(request)
        if pending is not None:
            pending.result()

    def why(self, shape: GraphShape) -> str:
        """Return why there is no graph of this shape; '' if there is one."""
        with self._lock:
            if shape in self._graphs:
                return ''
            return self._failed.get(shape, 'its graph is being captured')

    def forget(self) -> None:
        """Forget all graphs, those too that are being captured."""
        with self._lock:
            pending = list(self._pending.values())
        for capture in pending:
            capture.result()
        with self._lock:
            self._graphs.clear()

    def close(self) -> None:
        """Forget all graphs, and capture no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._graphs.clear()
            self._capture = None

    def _begin(self, request: Request) -> Future | None:
        shape = request.shape
        with self._lock:
            if shape in self._failed:
                return None
            if shape not in self._pending:
                self._pending[shape] = self._thread.submit(self._add, request)
            return self._pending[shape]

    def _add(self, request: Request) -> None:
        shape, graph, problem = request.shape, None, ''
        try:
            self._capture = self._capture or self._make()
            graph = self._capture(request)
        except Exception as error:  # whatever a driver says; eager inference goes on
            problem = f'its graph cannot be captured: {type(error).__name__}: {error}'
        with self._lock:
            del self._pending[shape]
            if graph is None:
                self._failed[shape] = problem
                while len(self._failed) > self._limit:
                    self._failed.popitem(last=False)
                return
            self._graphs[shape] = graph
            while len(self._graphs) > self._limit:
                self._graphs.popitem(last=False)
