"""Reads the arguments of the launch files; ValueError names the one that is wrong.

`ros2 launch` itself ignores an argument that no launch file declares: with a misspelled
`checkpoint:=` another policy would run, with a misspelled `motion:=` the robot would not move.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from meanflow_ros.core.schema import known_or_hint
from meanflow_ros.paths import PACKAGE


def refuse_unknown(launch_file: str, known: Sequence[str], argv: Sequence[str] | None = None):
    """ValueError for an argument that is not known, if `ros2 launch` was told this very file.

    argv: the command line, this process's by default. Where another launch file includes this
    one, the command line is that file's.
    """
    argv = sys.argv if argv is None else argv
    file = Path(launch_file)
    if (PACKAGE, file.name) not in zip(argv, argv[1:]) and not any(
            ':=' not in argument and os.path.basename(argument) == file.name
            and os.path.realpath(argument) == os.path.realpath(file) for argument in argv):
        return
    for argument in argv:
        name, assigned, _ = argument.partition(':=')
        if assigned and name not in known:
            raise ValueError(f'unknown argument {name!r} ({known_or_hint(name, known)})')


def path(text: str) -> str:
    """Return a path; a shell leaves the ~ of `name:=~/file` as it is."""
    return os.path.expanduser(text)


def flag(name: str, text: str) -> bool:
    """Return what true, false, 1 or 0 says."""
    if text.lower() not in ('true', 'false', '1', '0'):
        raise ValueError(f'{name} must be true or false, got {text!r}')
    return text.lower() in ('true', '1')


def whole_number(name: str, text: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f'{name} must be a whole number, got {text!r}') from None


def remappings(text: str) -> list[tuple[str, str]]:
    """Return the pairs of `from:=to from:=to ...`."""
    pairs = [tuple(pair.split(':=')) for pair in text.split()]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"remappings must be 'from:=to' pairs separated by spaces, "
                             f'got {text!r}')
    return pairs
