"""The faults, and what must come of each."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from meanflow_ros.core.contract import MAX_INSTRUCTION_BYTES
from reliability.graph import (
    CLOCK, COMPRESSED, HOLD, MODEL, NEUTRAL, PLAIN, Failed, Graph)
from reliability.robot import CAMERAS, DEADLINE_S, INSTRUCTION, MAX_AGE_S, STOP_S
from reliability.robot import NEUTRAL as NEUTRAL_COMMAND

SLACK_S = 0.5                  # a busy computer, and the way to rest within the limits
DEADLINE = DEADLINE_S + STOP_S + SLACK_S
AT_ONCE = STOP_S + SLACK_S
NEUTRAL_S = 2.5                # from anywhere to the neutral command
PROCESS_S = 60.0               # Python and PyTorch start, on a busy computer
URDF = '<robot name="r">' + ''.join(
    f'<joint name="{name}" type="revolute"><limit lower="{lower}" upper="{upper}" velocity="9"/>'
    f'</joint>' for name, lower, upper in (('shoulder', -1.5, 2), ('elbow', -1, 1))) + '</robot>'
SLOW_URDF = URDF.replace('velocity="9"', 'velocity="0.4"')
BOMB = '<!DOCTYPE r [<!ENTITY a "aaaa">]>' + URDF


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault.

    begin, end: do and undo it. stops: words of which heartbeat or diagnostics must say all, in
    one message, while the robot rests; None: chunks go on and no command breaks a limit.
    within_s: from `begin` until everything rests. recovers_s: from `end` until everything moves
    again. seconds: how long a fault lasts that does not stop the robot. chunks_hz: how many come
    meanwhile, at least. node: the variant of the node. silent: nobody is there to say anything.
    grows_mib: the node's memory, at most: large messages leave their buffers to the allocator.
    short: it is among those of `make test`. soak: it may come in a soak.
    """

    name: str
    begin: Callable[[Graph], None]
    end: Callable[[Graph], None] = lambda graph: None
    stops: tuple[str, ...] | None = None
    within_s: float = DEADLINE
    recovers_s: float = 3.0
    seconds: float = 1.5
    chunks_hz: float = 2.0
    node: str = PLAIN
    silent: bool = False
    grows_mib: float = 8.0
    short: bool = False
    soak: bool = True


def _tell(process: str, *lines: str) -> Callable[[Graph], None]:
    return lambda graph: [graph.tell(process, line) for line in lines]


def _stream(stream: str, kind: str, stops=None, **more) -> Fault:
    title = {'joints': 'joint states', 'clock': 'clock'}.get(
        stream, 'camera ' + stream.replace('/', ', '))
    return Fault(name=f'{title}: {kind.replace("_", " ")}', begin=_tell('feeder',
                 f'{stream} {kind}'), end=_tell('feeder', f'{stream} ok'), stops=stops, **more)


def _camera(name: str) -> list[Fault]:
    topic = f'camera/{name}'
    first = name == CAMERAS[0]
    old = DEADLINE + MAX_AGE_S
    return [
        _stream(name, 'dropped', (topic, 'old'), short=first),
        _stream(name, 'lossy'),
        _stream(name, 'delayed', (topic, 'old'), within_s=old),
        _stream(name, 'duplicated'),
        _stream(name, 'reordered'),
        _stream(name, 'frozen', (topic, 'identical'), within_s=old, short=not first),
        _stream(name, 'repeating', (topic, 'stamp repeats')),
        _stream(name, 'flooded'),
        _stream(name, 'truncated', (topic, 'Invalid')),
        _stream(name, 'garbled', (topic, 'Invalid')),
        _stream(name, 'empty', (topic, 'encoding')),
        _stream(name, 'wrong_size', (topic, '640x7')),
        _stream(name, 'wrong_encoding', (topic, "'16UC1' is not supported")),
        _stream(name, 'short_data', (topic, 'data has 100 bytes')),
        _stream(name, 'huge_header', (topic, 'cap')),
        _stream(name, 'future', (topic, 'in the future')),
        _stream(name, 'zero_stamp', (topic, 'stamp goes backward')),
        Fault(name=f'camera {name}: a second publisher', begin=_tell('feeder', f'second {name}'),
              end=_tell('feeder', f'{name} ok'))]


def _compressed() -> list[Fault]:
    topic = f'camera/{CAMERAS[0]}'

    def jpeg(kind, words=None, **more):
        return _stream(f'{CAMERAS[0]}/compressed', kind, words and (topic, words),
                       node=COMPRESSED, soak=False, **more)

    return [
        jpeg('dropped', 'old'),
        jpeg('frozen', 'identical', within_s=DEADLINE + MAX_AGE_S),
        jpeg('flooded'),
        jpeg('truncated', 'Invalid'),
        jpeg('garbled', 'Invalid'),
        jpeg('empty', 'must have 1 to'),
        jpeg('truncated_JPEG', 'cannot be decoded'),
        jpeg('garbled_JPEG', 'no header of a JPEG'),
        jpeg('garbled_scan'),
        jpeg('decompression_bomb', 'cap')]


def _safe_actions() -> list[Fault]:
    def dropped(action, **more):
        return Fault(name=f'safe action {action}: camera {CAMERAS[0]} dropped',
                     begin=_tell('feeder', f'{CAMERAS[0]} dropped'),
                     stops=(f'camera/{CAMERAS[0]}', 'old'), node=action, soak=False, **more)

    def at_neutral(graph: Graph) -> None:
        graph.tell('feeder', f'{CAMERAS[0]} ok')
        if abs(graph.elbow - NEUTRAL_COMMAND['elbow']) > 1e-6:
            raise Failed(f'the elbow stands at {graph.elbow:.6f}, not at neutral')

    return [dropped(HOLD, end=_tell('feeder', f'{CAMERAS[0]} ok')),
            dropped(NEUTRAL, end=at_neutral, within_s=DEADLINE + NEUTRAL_S)]


def _joints() -> list[Fault]:
    topic = 'joint_states'
    return [
        _stream('joints', 'dropped', (topic, 'old')),
        _stream('joints', 'lossy'),
        _stream('joints', 'delayed', (topic, 'old'), within_s=DEADLINE + MAX_AGE_S),
        _stream('joints', 'duplicated'),
        _stream('joints', 'reordered'),
        _stream('joints', 'frozen'),
        _stream('joints', 'repeating', (topic, 'stamp repeats')),
        _stream('joints', 'flooded'),
        _stream('joints', 'truncated', (topic, 'Invalid')),
        _stream('joints', 'garbled', (topic, 'Invalid')),
        _stream('joints', 'empty', (topic, "no 'shoulder'")),
        _stream('joints', 'nan', (topic, 'not finite'), short=True),
        _stream('joints', 'infinite', (topic, 'not finite')),
        _stream('joints', 'far', ('shoulder', 'outside its limits')),
        _stream('joints', 'missing_joint', (topic, "no 'load'")),
        _stream('joints', 'lengths_differ', (topic, '3 names but 2 positions')),
        _stream('joints', 'a_million_names', (topic,), soak=False, grows_mib=64.0),
        _stream('joints', 'future', (topic, 'in the future')),
        _stream('joints', 'zero_stamp', (topic, 'stamp goes backward')),
        Fault(name='joint states: a second publisher', begin=_tell('feeder', 'second joints'),
              end=_tell('feeder', 'joints ok'))]


def _say(text: str, stream: str = 'instruction') -> str:
    return f'say {stream} {json.dumps(text)}'


def _burst(stream: str, hz: int, *texts: str) -> Callable[[Graph], None]:
    return _tell('feeder', f'burst {stream} {hz} {json.dumps(texts)}')


def _instructions() -> list[Fault]:
    other = 'pull the lever'
    good = _tell('feeder', 'instruction ok', _say(INSTRUCTION))
    back = _tell('feeder', 'back instruction', _say(INSTRUCTION))
    gone = _tell('feeder', 'gone instruction')

    def hostile(name, line, words, **more):
        return Fault(name=f'instruction: {name}', begin=_tell('feeder', line), end=good,
                     within_s=DEADLINE, stops=('instruction', words), **more)

    def broken(kind, *texts, stops=None):
        return Fault(name=f'instruction: {kind}', end=good, stops=stops, begin=_tell(
            'feeder', f'instruction {kind}', *map(_say, texts)))

    def gone_for_good(graph: Graph) -> None:
        gone(graph)
        _transitions(*AGAIN)(graph)

    garbled = (b'\0\1\0\0' + b'\xff' * 12).hex()
    invalid = (b'\0\1\0\0' + (7).to_bytes(4, 'little') + b'pu\xff\xfesh\0').hex()
    return [
        Fault(name='instruction: another one', begin=_tell('feeder', _say(other)), end=good),
        broken('dropped', other),         # nobody knows that there was one: the last one counts
        broken('delayed', other),
        broken('duplicated', other),
        broken('reordered', other, INSTRUCTION),
        broken('frozen', INSTRUCTION, other),
        broken('truncated', other, stops=('instruction', 'not a std_msgs')),
        Fault(name='instruction: publisher gone', begin=gone, end=back),
        Fault(name='instruction: publisher gone, node configured anew', begin=gone_for_good,
              end=back, stops=('instruction', 'none has been received'),
              within_s=AT_ONCE, recovers_s=5.0),
        Fault(name='instruction: the same again, 30 a second',
              begin=_burst('instruction', 30, INSTRUCTION), end=_burst('instruction', 0)),
        Fault(name='instruction: a burst, 30 a second',
              begin=_burst('instruction', 30, INSTRUCTION, other), end=_burst('instruction', 0)),
        Fault(name='instruction: flooded, 300 a second',
              begin=_burst('instruction', 300, INSTRUCTION, other),
              end=_burst('instruction', 0), stops=('instruction',)),
        hostile('empty', _say(''), 'empty'),
        hostile('64 kB', _say('a' * 65536), str(MAX_INSTRUCTION_BYTES), short=True),
        hostile('invalid UTF-8', f'bytes instruction {invalid}', 'UTF-8'),
        hostile('garbled bytes', f'bytes instruction {garbled}', 'not a std_msgs')]


def _models() -> list[Fault]:
    def model(name, mode, words, **more):
        return Fault(name=f'model: {name}', begin=_tell('node', mode), end=_tell('node', ''),
                     stops=words, node=MODEL, **more)

    return [
        model('raises', 'raises', ('inference failed', 'the network failed')),
        model('hangs', 'hangs', ('no chunk',), short=True),
        model('out of memory', 'out_of_memory', ('MemoryError',)),
        model('out of GPU memory', 'out_of_gpu_memory', ('OutOfMemoryError',)),
        model('exits', 'exits', ('SystemExit',)),
        model('NaN', 'nan', ('guard', 'not finite'), short=True),
        model('infinite', 'infinite', ('guard', 'not finite')),
        model('far outside the limits', 'far', ('guard', 'outside')),
        model('too few steps', 'short', ('guard', 'shape')),
        model('too few dimensions', 'narrow', ('guard', 'shape')),
        model('a chunk of a minute ago', 'old', ('guard', 'due before now')),
        model('no chunk at all', 'nothing', ('inference failed',)),
        model('slow, 0.15 s', 'slow', None),
        model('very slow, 1.2 s', 'very_slow', ('no chunk',))]


def _clocks() -> list[Fault]:
    def clock(name, line, words, **more):
        return Fault(name=f'clock: {name}', begin=_tell('feeder', f'time {line}'), stops=words,
                     node=CLOCK, soak=False, **more)

    def topic(kind, words=None, **more):
        return _stream('clock', kind, words, node=CLOCK, soak=False, **more)

    def reordered(graph: Graph) -> None:
        graph.tell('feeder', 'clock reordered')
        time.sleep(0.5)
        graph.tell('feeder', 'clock ok')

    return [
        topic('dropped', ('the clock stands',)),
        topic('delayed', ('camera', 'in the future')),
        topic('duplicated'),
        Fault(name='clock: reordered for half a second', begin=reordered, node=CLOCK, soak=False),
        topic('frozen', ('the clock stands',)),
        topic('flooded'),
        topic('truncated', ('the clock stands',)),
        topic('garbled', ('the clock stands',)),
        topic('near_zero', ('clock jump',)),
        clock('10 s forward', '10', None),
        clock('10 s backward', '-10', None),
        clock('1 ms backward', '-0.001', None),
        clock('stops', 'stop', ('clock',), end=_tell('feeder', 'time go'),
              within_s=DEADLINE + 1.0)]


def _restart_node(graph: Graph) -> None:
    graph.start_node(graph.variant)


def _kill(name: str, number: int = signal.SIGKILL) -> Callable[[Graph], None]:
    return lambda graph: graph.kill(name, number)


def _terminate(graph: Graph) -> None:
    took_s = graph.kill('node', signal.SIGTERM)
    if took_s > 4:
        raise Failed(f'the node took {took_s:.1f} s to end: launch kills after 5')


AGAIN = ('deactivate', 'cleanup', 'configure', 'activate')


def _transitions(*names: str) -> Callable[[Graph], None]:
    return lambda graph: [graph.transition(name) for name in names]


def _processes() -> list[Fault]:
    return [
        Fault(name='node: killed mid-chunk, restarted', begin=_kill('node'), end=_restart_node,
              silent=True, soak=False, recovers_s=PROCESS_S),
        Fault(name='node: SIGTERM mid-chunk, restarted', begin=_terminate, end=_restart_node,
              silent=True, soak=False, within_s=AT_ONCE, recovers_s=PROCESS_S),
        Fault(name='node: stopped (SIGSTOP) and continued',
              begin=lambda graph: graph._processes['node'].send_signal(signal.SIGSTOP),
              end=lambda graph: graph._processes['node'].send_signal(signal.SIGCONT),
              silent=True, short=True),
        Fault(name='node: deactivated mid-chunk', begin=_transitions('deactivate'),
              end=_transitions('activate'), stops=('deactivated',), within_s=AT_ONCE, short=True),
        Fault(name='node: cleaned up mid-chunk', begin=_transitions('deactivate', 'cleanup'),
              end=_transitions('configure', 'activate'), stops=('not configured',),
              within_s=AT_ONCE),
        Fault(name='controllers: killed, restarted', begin=_kill('controller'),
              end=lambda graph: graph.start_controller(), stops=('no subscriber',),
              within_s=30.0, recovers_s=PROCESS_S),
        Fault(name='all inputs: killed, restarted', begin=_kill('feeder'),
              end=lambda graph: graph.start_feeder(),
              stops=('old',), recovers_s=PROCESS_S)]


def _set(name: str, value, accepted: bool = True) -> Callable[[Graph], None]:
    def act(graph: Graph) -> None:
        if graph.set_parameter(name, value) != accepted:
            raise Failed(f'{name} := {value!r} was {"refused" if accepted else "accepted"}')
    return act


def _parameters() -> list[Fault]:
    def change(name, value, back, accepted=True):
        words = 'to' if accepted else 'refused,'
        return Fault(name=f'parameter: {name} {words} {value}', begin=_set(name, value, accepted),
                     end=_set(name, back), chunks_hz=1.0 if value == 'open_loop' else 2.0)

    return [
        change('execution', 'open_loop', 'receding_horizon'),
        change('execution', 'ensemble:0.1', 'receding_horizon'),
        change('execution', 'receding_horizon:4', 'receding_horizon'),
        change('sampler_steps', 4, 0),
        change('seed', 7, 0),
        change('execution', 'real_time:4', 'receding_horizon', accepted=False),
        change('execution', 'sometimes', 'receding_horizon', accepted=False),
        change('sampler_steps', 10**6, 0, accepted=False),
        change('seed', -1, 0, accepted=False),
        Fault(name='parameter: checkpoint refused while active',
              begin=_set('checkpoint', '/elsewhere', accepted=False))]


def _reconfigured_while_stopped(graph: Graph) -> None:
    graph.switch('estop', True)
    _transitions(*AGAIN)(graph)


def _switches() -> list[Fault]:
    def switched(service, value):
        return lambda graph: graph.switch(service, value)

    return [
        Fault(name='emergency stop', begin=switched('estop', True), end=switched('estop', False),
              stops=('emergency stop',), within_s=AT_ONCE, short=True),
        Fault(name='emergency stop, latched over reconfigure', begin=_reconfigured_while_stopped,
              end=switched('estop', False), stops=('emergency stop',), within_s=AT_ONCE),
        Fault(name='disabled', begin=switched('enable', False), end=switched('enable', True),
              stops=('disabled',), within_s=AT_ONCE),
        Fault(name='reset mid-chunk', begin=lambda graph: graph.reset())]


def _descriptions() -> list[Fault]:
    good = _tell('feeder', 'description ok', _say(URDF, 'description'))

    def description(name, text, words=None, **more):
        return Fault(name=f'robot description: {name}', end=good, stops=words, within_s=DEADLINE,
                     begin=_tell('feeder', _say(text, 'description')), soak=False, **more)

    def broken(kind, *texts, stops=None):
        return Fault(name=f'robot description: {kind}', end=good, stops=stops, soak=False,
                     begin=_tell('feeder', f'description {kind}', *(
                         _say(text, 'description') for text in texts)))

    def burst(name, hz, *texts, stops=None):
        return Fault(name=f'robot description: {name}, {hz} a second', soak=False, stops=stops,
                     begin=_burst('description', hz, *texts), end=lambda graph: [
                         graph.tell('feeder', 'burst description 0 []'), good(graph)])

    return [
        Fault(name='robot description: a good one', begin=good),
        description('a second valid one mid-chunk', SLOW_URDF),
        broken('dropped', SLOW_URDF),     # the limits of the last one stay
        broken('delayed', SLOW_URDF),
        broken('duplicated', SLOW_URDF),
        broken('reordered', SLOW_URDF, URDF),
        broken('frozen', URDF, SLOW_URDF),
        broken('truncated', SLOW_URDF, stops=('robot_description', 'not a std_msgs')),
        broken('garbled', SLOW_URDF, stops=('robot_description',)),
        burst('flooded', 300, URDF),
        burst('two in turn', 30, URDF, SLOW_URDF, stops=('robot_description',)),
        Fault(name='robot description: publisher gone', begin=_tell('feeder', 'gone description'),
              end=lambda graph: [graph.tell('feeder', 'back description'), good(graph)],
              soak=False),
        description('no XML', 'robot?', ('robot_description', 'no XML')),
        description('entities', BOMB, ('robot_description', 'entities')),
        description('a joint is missing', URDF.replace('elbow', 'knee'), ('elbow',)),
        description('no room left', URDF.replace('-1.5', '1.99'), ('shoulder',)),
        description('17 MB', URDF + ' ' * 17 * 2**20, ('robot_description', 'bytes'),
                    grows_mib=64.0)]


CYCLES = 1000


def _lifecycle_cycles(graph: Graph) -> None:
    for _ in range(CYCLES):
        _transitions(*AGAIN)(graph)


def all_faults() -> list[Fault]:
    """Return every fault, those of one variant of the node together."""
    return [*(fault for name in CAMERAS for fault in _camera(name)), *_joints(), *_instructions(),
            *_parameters(), *_switches(), *_descriptions(), *_processes(),
            Fault(name=f'lifecycle: {CYCLES} cycles', begin=_lifecycle_cycles, soak=False,
                  seconds=0.5),
            *_models(), *_compressed(), *_safe_actions(), *_clocks()]
