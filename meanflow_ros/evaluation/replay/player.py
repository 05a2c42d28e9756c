"""The node on the time of a recording: when it looks, what it takes, when the chunk is ready.

Messages reach the ingest at the times at which they were recorded. As in the node, one inference
runs at a time on the newest complete observation; it takes the injected latency, and pictures
that come meanwhile are never decoded. Chunks are inferred in batches where the mode of execution
lets the choice of an observation depend on nothing that the network says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from meanflow_ros.core.contract import NANOSECONDS, ActionChunk, Observation
from meanflow_ros.evaluation.replay.cutting import Cutter, Start, Stop
from meanflow_ros.evaluation.replay.driving import Driving
from meanflow_ros.evaluation.replay.episode import EpisodeReplay
from meanflow_ros.evaluation.replay.execution import Foresight, decides_what_is_inferred
from meanflow_ros.evaluation.replay.gathered import Gathered, Taken
from meanflow_ros.evaluation.replay.latency import Latency
from meanflow_ros.evaluation.replay.probes import Prober
from meanflow_ros.evaluation.replay.topics import INT32, STATUS, Topics
from meanflow_ros.ros.bag import deserialize
from meanflow_ros.ros.bag_files import RawMessage
from meanflow_ros.ros.from_messages import time_ns
from meanflow_ros.ros.ingest import Ingest
from meanflow_ros.ros.streams import IngestLimits, NoObservation
from meanflow_ros.training.data_config import DataConfig, Instructions
from meanflow_ros.training.episode import ActionStream, Skipped

POLL_NS = 100_000_000        # as the node's inference thread, which looks at least that often


class Player:
    """Replays one bag; `take` and `end` yield every episode that ends, or why it cannot be used.

    infer(batch of Taken): sets the chunk of each, a lone one's at once, others' until `settle`
    returns; it is called with up to `batch` of them, of which it keeps what it needs.
    instructions: of the episodes, where no topic has them. wanted: whether the n-th episode is.
    prober: is offered every observation that is taken. answers: stamp -> when a node's answer
    came; then these observations are taken, and no latency is drawn.
    """

    def __init__(self, bag: str, driving: Driving, data: DataConfig, topics: Topics, *,
                 infer: Callable[[Sequence[Taken]], None], latency: Latency, seed: int = 0,
                 settle: Callable[[], None] = lambda: None,
                 batch: int = 16,
                 instructions: Instructions | str | None = None,
                 wanted: Callable[[int], bool] = lambda number: True,
                 prober: Prober | None = None, answers: Mapping[int, int] | None = None,
                 limits: IngestLimits | None = None):
        self._bag, self._driving, self._data, self._topics = bag, driving, data, topics
        self._robot = driving.robot
        self._infer, self._settle = infer, settle
        self._latency, self._seed = latency, seed
        self._foresees = decides_what_is_inferred(driving.mode)
        self._batch = 1 if self._foresees else batch
        self._instructions, self._wanted, self._prober = instructions, wanted, prober
        self._answers = answers
        limits = limits or data.limits()
        self._ingest = Ingest(self._robot, limits=limits)
        self._fresh_ns = round(limits.least_max_age_s * NANOSECONDS)
        self._cutter = Cutter(data)
        self._running: Gathered | None = None
        self._count = 0
        self._clock_ns = 0
        self._gripper: tuple | None = None
        self._handlers: dict[str, list[Callable]] = {}
        self._connect()

    def _connect(self) -> None:
        topics = self._topics
        self._on(topics.clock, self._on_clock)
        self._on(topics.episode, self._on_episode)
        self._on(topics.instruction, self._on_instruction)
        self._on(topics.state, self._on_state)
        for camera, topic in topics.cameras.items():
            self._on(topic, self._on_picture(camera))
        for index, (topic, reader) in enumerate(topics.actions):
            self._on(topic, self._on_action(index, reader))

    def _on(self, topic: str, handler: Callable) -> None:
        if topic:
            self._handlers.setdefault(topic, []).append(handler)

    # Messages

    def take(self, raw: RawMessage) -> Iterator[EpisodeReplay | Skipped]:
        """Take a message and yield the episodes that it ends."""
        now_ns = self._clock_ns if self._topics.clock else raw.stamp_ns
        self._pass_time(now_ns)
        jump_s = self._ingest.clock(now_ns)
        if jump_s is not None and self._running:
            self._running.fault = f'the clock jumped back by {-jump_s:.3f} s'
        for handle in self._handlers[raw.topic]:
            if now_ns > 0 or handle in (self._on_clock, self._on_instruction):
                yield from handle(raw, now_ns) or ()
        if self._running:
            self._look(now_ns)

    def end(self) -> Iterator[EpisodeReplay | Skipped]:
        """Yield what the end of the recording ends."""
        for event in self._cutter.end():
            yield from self._cut(event, 0)
        if not self._count:
            yield Skipped(name=self._bag, reason=f'no episode begins in it (episodes: '
                                                 f'{self._data.episodes})')

    def _on_clock(self, raw: RawMessage, now_ns: int) -> None:
        self._clock_ns = time_ns(deserialize(raw.data, raw.type).clock)

    def _on_episode(self, raw: RawMessage, now_ns: int) -> Iterator[EpisodeReplay | Skipped]:
        read = {STATUS: self._cutter.status, INT32: self._cutter.index}[raw.type]
        for event in read(deserialize(raw.data, raw.type)):
            yield from self._cut(event, now_ns)

    def _on_instruction(self, raw: RawMessage, now_ns: int) -> None:
        """Take words; what was planned or is being inferred for other ones is forgotten."""
        before = self._ingest.instruction
        try:
            self._ingest.set_serialized_instruction(raw.data)
        except ValueError:
            pass   # the ingest keeps the reason and gives no observation until a good one comes
        if self._running and self._ingest.instruction != before:
            self._running.halts.append((now_ns, 'instruction'))
            if self._foresight:
                self._foresight.halt(now_ns, 'instruction')

    def _on_state(self, raw: RawMessage, now_ns: int) -> None:
        if self._running:
            if self._store(self._add_state, raw, now_ns=now_ns):
                state = self._ingest.newest_state()
                self._running.felt.append((now_ns, state))
                if self._foresight:
                    self._foresight.feel(now_ns, state)

    def _add_state(self, raw: RawMessage, *, now_ns: int) -> None:
        self._ingest.add_joint_state(deserialize(raw.data, raw.type), now_ns=now_ns)

    def _on_picture(self, camera: str) -> Callable:
        def handle(raw: RawMessage, now_ns: int) -> Iterator[EpisodeReplay | Skipped]:
            for event in self._cutter.traffic(camera, now_ns):
                yield from self._cut(event, now_ns)
            if self._running:
                self._store(self._ingest.add_serialized, camera, raw.data, raw.type,
                            now_ns=now_ns)
        return handle

    def _on_action(self, index: int, reader: Callable) -> Callable:
        def handle(raw: RawMessage, now_ns: int) -> Iterator[EpisodeReplay | Skipped]:
            if index == 0:
                for event in self._cutter.traffic(Cutter.ACTIONS, now_ns):
                    yield from self._cut(event, now_ns)
            else:
                self._gripper = reader, raw, now_ns
            if self._running:
                self._add_action(index, reader, raw, now_ns)
        return handle

    def _add_action(self, index: int, reader: Callable, raw: RawMessage, now_ns: int) -> None:
        try:
            timed = reader(deserialize(raw.data, raw.type), now_ns)
            self._running.actions[index].add(timed)
        except ValueError as error:
            self._running.unusable[str(error)] += 1
            return
        if index == 0 and self._running.first_due_ns is None:
            self._running.first_due_ns = int(timed.due_ns[0])

    def _store(self, add: Callable, *arguments, now_ns: int) -> bool:
        try:
            add(*arguments, now_ns=now_ns)
        except ValueError:
            self._fault_heard = True   # the ingest keeps the reason
            return False
        return True

    # The inference thread

    def _pass_time(self, now_ns: int) -> None:
        """Let happen what the node does before `now_ns`: end an inference, look again."""
        while self._running and (at_ns := self._next_look_ns()) is not None and at_ns < now_ns:
            self._look(at_ns)

    def _next_look_ns(self) -> int | None:
        if self._busy_until_ns is not None:
            return self._busy_until_ns
        return None if self._looked_ns is None else self._looked_ns + POLL_NS

    def _look(self, now_ns: int) -> None:
        if self._answers is None:
            self._look_as_the_node(now_ns)
        elif (self._seen_common_ns is None
              or self._ingest.newest_common_ns() != self._seen_common_ns):
            observation = self._observe(now_ns)
            if observation is not None and observation.stamp_ns in self._answers:
                self._take(observation, now_ns)

    def _look_as_the_node(self, now_ns: int) -> None:
        if self._busy_until_ns is not None:
            if now_ns < self._busy_until_ns:
                return
            self._finish()
        self._looked_ns = now_ns
        if self._nothing_new(now_ns):
            return
        if self._foresight and not self._foresight.wants(now_ns, self._latency.typical_ns()):
            if self._something_new(now_ns):
                self._running.unneeded.append(now_ns)
                self._foresight.pass_over(now_ns)
            return
        observation = self._observe(now_ns)
        if observation is not None and not self._cutter.paused(now_ns):
            self._take(observation, now_ns)

    def _observe(self, now_ns: int) -> Observation | None:
        """Return an observation that has not been taken, or note what is missing."""
        try:
            observation = self._ingest.observe(now_ns=now_ns)
        except NoObservation as reason:
            self._note_missing(reason, now_ns)
            return None
        self._note_missing(None, now_ns)
        self._fault_heard = False
        self._seen_common_ns = self._ingest.newest_common_ns()
        taken = self._running.taken
        return None if taken and observation.stamp_ns <= taken[-1].stamp_ns else observation

    def _finish(self) -> None:
        """End the inference that was under way."""
        taken, self._busy_until_ns = self._running.taken[-1], None
        if not self._foresight:
            return
        if taken.chunk is None:
            self._foresight.assume(self._any_chunk(taken.stamp_ns), taken.done_ns,
                                   epoch=taken.epoch, prefix=taken.prefix)
        else:
            self._foresight.add(taken.chunk, taken.done_ns, epoch=taken.epoch, state=taken.state,
                                prefix=taken.prefix)

    def _any_chunk(self, stamp_ns: int) -> ActionChunk:
        """Return a chunk in place of a recorded one that is not yet known."""
        space = self._robot.action_space
        return ActionChunk(actions=np.tile((space.lower + space.upper) / 2,
                                           (self._robot.horizon, 1)),
                           stamp_ns=stamp_ns, period_s=self._robot.period_s,
                           first_step=self._robot.first_step)

    def _nothing_new(self, now_ns: int) -> bool:
        """Whether looking would only decode again what was taken already."""
        common_ns = self._ingest.newest_common_ns()
        taken = self._running.taken
        return (common_ns is not None and common_ns == self._seen_common_ns and bool(taken)
                and not self._fault_heard and self._missing is None
                and now_ns - taken[-1].stamp_ns <= self._fresh_ns)

    def _something_new(self, now_ns: int) -> bool:
        """Whether pictures are there that have not been taken, as far as their stamps tell."""
        common_ns, taken = self._ingest.newest_common_ns(), self._running.taken
        return (common_ns is not None and (not taken or common_ns > taken[-1].stamp_ns)
                and now_ns - common_ns <= self._fresh_ns)

    def _take(self, observation: Observation, now_ns: int) -> None:
        running = self._running
        done_ns = (now_ns + self._draw() if self._answers is None
                   else max(now_ns, self._answers[observation.stamp_ns]))
        taken = Taken(observation=observation, stamp_ns=observation.stamp_ns, taken_ns=now_ns,
                      done_ns=done_ns, state=observation.state
                      if observation.state is not None else np.zeros(0),
                      epoch=len(running.halts) if self._answers is None else None)
        self._busy_until_ns = done_ns if self._answers is None else None
        if self._foresight:
            taken.prefix = self._foresight.prefix(taken.stamp_ns)
        running.keep_pictures(observation)
        if not running.instructions or running.instructions[-1] != observation.instruction:
            running.instructions.append(observation.instruction)
        if self._prober:
            self._prober.offer(observation, len(running.taken))
        running.taken.append(taken)
        self._queue.append(taken)
        if len(self._queue) >= self._batch:
            self._flush()

    def _flush(self) -> None:
        if self._queue:
            self._infer(self._queue)
            for taken in self._queue:
                taken.observation = None
            self._queue = []

    def _note_missing(self, reason: NoObservation | None, now_ns: int) -> None:
        """Count for how long there was no observation, by stream and kind."""
        key = None if reason is None else f'{reason.stream}: {reason.kind}'
        if self._missing is not None and self._missing[0] != key:
            self._running.missing.append((*self._missing, now_ns))
            self._missing = None
        if key is not None and self._missing is None:
            self._missing = key, now_ns

    # Episodes

    def _cut(self, event: Start | Stop, now_ns: int) -> Iterator[EpisodeReplay | Skipped]:
        if isinstance(event, Start):
            self._start(event.number, now_ns)
        elif self._running:
            yield self._stop(event, now_ns)

    def _start(self, number: object, now_ns: int) -> None:
        """Begin an episode with empty buffers; number: its own, None to count, '' if alone."""
        count, self._count = self._count, self._count + 1
        if not self._wanted(count):
            return
        name = self._bag if number == '' else (
            f'{self._bag} episode {count if number is None else number}')
        self._running = Gathered(bag=self._bag, name=name, number=count, start_ns=now_ns,
                                 actions=[ActionStream() for _ in self._topics.actions])
        self._ingest.reset()
        if self._prober:
            self._prober.begin()
        self._draw = self._latency.draws(self._seed, count)
        self._queue: list[Taken] = []
        self._foresight = Foresight(self._driving) if self._foresees else None
        self._busy_until_ns: int | None = None
        self._looked_ns: int | None = None
        self._seen_common_ns: int | None = None
        self._missing: tuple[str, int] | None = None
        self._fault_heard = False
        if self._gripper:
            reader, raw, _ = self._gripper
            self._add_action(1, reader, raw, now_ns)   # a command holds until the next one
        if self._instructions is not None:
            try:
                self._ingest.set_instruction(
                    self._instructions if isinstance(self._instructions, str)
                    else self._instructions.of(self._bag, name))
            except ValueError as error:
                self._running.fault = str(error)

    def _stop(self, stop: Stop, now_ns: int) -> EpisodeReplay | Skipped:
        if now_ns:
            self._pass_time(now_ns)
        running, self._running = self._running, None
        try:
            fault = running.fault or stop.fault
            if fault:
                raise ValueError(fault)
            if stop.note:
                running.notes.append(stop.note)
            running.require_comparable(self._data.max_action_gap * self._robot.period_s,
                                       self._missing[0] if self._missing else '')
            self._flush()
            self._settle()
            if self._missing is not None:
                running.missing.append((*self._missing, now_ns or running.actions[0].end_ns()))
            probed, probes = (self._prober.answers() if self._prober
                              else (np.zeros(0, np.int64), {}))
            return running.replayed(self._driving, probed, probes)
        except ValueError as error:
            return Skipped(name=running.name, reason=str(error))
