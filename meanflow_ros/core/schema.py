"""Strict reading of plain mappings (from YAML) into dataclasses, and back.

Every unknown, missing or mistyped field is refused with its full path and the known names.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

MAX_ITEMS = 100_000
MAX_YAML_BYTES = 16 * 2**20   # of what is no checkpoint: a configuration, a bag's metadata


def read_yaml(path: Path, max_bytes: int):
    """Return what a YAML file holds: plain values, mappings and lists.

    ValueError if it is larger, no YAML, or grows beyond MAX_ITEMS values when its aliases are
    followed: an error message that shows a few bytes of them could fill the memory.
    """
    if path.stat().st_size > max_bytes:
        raise ValueError(f'is larger than {max_bytes} bytes')
    try:
        document = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None
    left, waiting = MAX_ITEMS, [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        left -= 1
        if left < 0:
            raise ValueError(f'holds more than {MAX_ITEMS} values')
    return document


def known_or_hint(name: str, known) -> str:
    """Return ' (did you mean ...)' or the list of known names, for an error message."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f'did you mean {close[0]!r}?' if close else f'known: {", ".join(map(str, known))}'


def check_keys(mapping, required, optional, path: str) -> None:
    """ValueError unless `mapping` is a mapping with all required and no unknown keys."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f'{path} must be a mapping, got {type(mapping).__name__}')
    for key in mapping:
        if key not in required and key not in optional:
            hint = known_or_hint(key, [*required, *optional])
            raise ValueError(f'{path}: unknown field {key!r} ({hint})')
    missing = [key for key in required if key not in mapping]
    if missing:
        raise ValueError(f'{path}: missing field {missing[0]!r}')


def read_dataclass(cls, mapping, path: str):
    """Build dataclass `cls` from `mapping`; ValueError names the field that is wrong."""
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is dataclasses.MISSING
                and f.default_factory is dataclasses.MISSING]
    check_keys(mapping, required, [f.name for f in fields if f.name not in required], path)
    types = {f.name: str(f.type) for f in fields}
    for key, value in mapping.items():
        if not _fits(value, types[key]):
            raise ValueError(f'{path}.{key} must be {types[key]}, got {value!r}')
    try:
        return cls(**{key: tuple(value) if types[key].startswith('tuple') else value
                      for key, value in mapping.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path}: {error}') from None


def _fits(value, annotation: str) -> bool:
    """Whether a YAML value fits the annotated type; unknown annotations are left to the class."""
    if annotation.endswith(' | None'):
        return value is None or _fits(value, annotation.removesuffix(' | None'))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation == 'int':
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation == 'bool':
        return isinstance(value, bool)
    if annotation == 'float':
        return is_number
    if annotation == 'str':
        return isinstance(value, str)
    if annotation.startswith('tuple'):
        return isinstance(value, (list, tuple))
    if annotation.startswith('Mapping'):
        return isinstance(value, Mapping)
    if annotation == 'np.ndarray':
        return isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    return True


def to_plain(value):
    """Turn dataclasses, arrays, tuples and mappings into what YAML can hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
