"""One fault on a running graph, from motion to motion, and what came of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from reliability.faults import Fault
from reliability.graph import START_S, Failed, Graph, until

POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a fault; `problems` is empty if it is what was declared.

    rest_s: from the fault's begin until every output rested; told_s: until the reason was told
    (None for a fault that goes on). recovered_s: from the fault's end until every output moved
    again. growth_mib: of the node's anonymous memory, None for a new process.
    """

    name: str
    expected: str
    said: tuple[str, ...]
    commands: int
    outside_limits: int
    rest_s: float | None
    told_s: float | None
    recovered_s: float | None
    growth_mib: float | None
    problems: tuple[str, ...]


def _moves(graph: Graph, since_s: float) -> bool:
    if not graph.alive('node'):
        raise Failed(f'the node has ended: {graph.log("node")}')
    return graph.moving(since_s)


def prepare(graph: Graph, fault: Fault) -> None:
    """Have the fault's variant of the node run, and the robot move."""
    graph.start_node(fault.node)
    since_s = time.monotonic()
    until(lambda: _moves(graph, since_s), lambda: f'motion before the fault {fault.name!r} '
          f'({graph.said(since_s)[-3:]}, log: {graph.log("node")})', START_S)


def attempt(graph: Graph, fault: Fault) -> Outcome:
    """Let the robot move, do the fault, undo it, and wait for motion."""
    checker, problems = graph.checker, []
    commands, violated = checker.commands, checker.violated
    try:
        prepare(graph, fault)
    except Failed as error:
        graph.revive()
        return Outcome(name=fault.name, expected=_expected(fault), said=(), commands=0,
                       outside_limits=0, rest_s=None, told_s=None, recovered_s=None,
                       growth_mib=None, problems=(str(error),))
    process, memory = graph._processes['node'], graph.memory_mib()
    begin_s = time.monotonic()
    rest_s = told_s = recovered_s = None
    try:
        fault.begin(graph)
        if fault.stops is None and not fault.silent:
            _goes_on(graph, fault, problems)
        else:
            rest_s, told_s = _stops(graph, fault, begin_s, problems)
    except Failed as error:
        problems.append(str(error))
    said = graph.said(begin_s)
    end_s = time.monotonic()
    try:
        fault.end(graph)
        until(lambda: _moves(graph, end_s), lambda: f'motion after the fault '
              f'({graph.said(end_s)[-3:]}, log: {graph.log("node")})', START_S)
        recovered_s = time.monotonic() - end_s
        if recovered_s > fault.recovers_s:
            problems.append(f'moved again after {recovered_s:.1f} s, at most '
                            f'{fault.recovers_s:g} s are allowed')
    except Failed as error:
        problems.append(str(error))
        if graph.alive('node'):
            graph.kill('node', 9)       # the next fault begins with a new one
    outside = checker.violated - violated
    if outside:
        problems.append(f'{outside} commands outside the limits, the last: '
                        f'{list(checker.violations)[-3:]}')
    same = graph._processes.get('node') is process and graph.alive('node')
    growth_mib = graph.memory_mib() - memory if same else None
    if growth_mib is not None and growth_mib > fault.grows_mib:
        problems.append(f'the memory grew by {growth_mib:.1f} MiB')
    return Outcome(
        name=fault.name, expected=_expected(fault), said=tuple(said[-8:]),
        commands=checker.commands - commands,
        outside_limits=outside, rest_s=rest_s, told_s=told_s, recovered_s=recovered_s,
        growth_mib=growth_mib, problems=tuple(problems))


def _expected(fault: Fault) -> str:
    return 'goes on' if fault.stops is None and not fault.silent else 'stops'


def _goes_on(graph: Graph, fault: Fault, problems: list[str]) -> None:
    begin_s = time.monotonic()
    time.sleep(fault.seconds)
    chunks = graph.chunks_since(begin_s)
    if chunks < fault.chunks_hz * fault.seconds:
        problems.append(f'only {chunks} chunks in {fault.seconds:g} s: {graph.said(begin_s)[-4:]}')


def _stops(graph: Graph, fault: Fault, begin_s: float, problems: list[str]):
    """Wait until the words are told and nothing moves; return when, since the begin."""
    told_s, words = None, fault.stops or ()
    limit_s = begin_s + max(fault.within_s, 1.6) + 2.0
    while time.monotonic() < limit_s:
        time.sleep(POLL_S)
        rests_s = time.monotonic() - graph.resting_since()
        if told_s is None and (fault.silent or any(
                all(word in said for word in words) for said in graph.said(begin_s))):
            told_s = time.monotonic() - begin_s
        if told_s is not None and rests_s > 0.5:
            break
    rest_s = max(0.0, graph.resting_since() - begin_s)
    if told_s is None:
        problems.append(f'nobody said {" ... ".join(words)!r}: {graph.said(begin_s)[-6:]}')
    if rest_s > fault.within_s:
        problems.append(f'at rest after {rest_s:.2f} s, at most {fault.within_s:g} s are allowed')
    return rest_s, None if fault.silent else told_s
