"""`--fail-if`: a condition on the numbers of metrics.json; read by hand, nothing is evaluated.

    NAME OP NUMBER                     first_step_mae.x > 0.01
    max|min|mean(NAME) OP NUMBER       max(first_step_mae) > 0.05

NAME is a path in metrics.json; parts that are no plain word stand in quotes, as in
`probes."blanked wrist".moved`.
Where it leads to several numbers (a mapping or a list), max, min or mean makes one of them.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator

COMPARE: dict[str, Callable] = {
    '<=': operator.le, '>=': operator.ge, '==': operator.eq, '!=': operator.ne,
    '<': operator.lt, '>': operator.gt}
SEVERAL: dict[str, Callable] = {'max': max, 'min': min,
                                'mean': lambda values: sum(values) / len(values)}
_PART = r'(?:\w+|"[^"]*")'
_NAME = rf'(?P<name>[A-Za-z_]\w*(?:\.{_PART})*)'
_CONDITION = re.compile(rf'\s*(?:(?P<of>{"|".join(SEVERAL)})\(\s*)?{_NAME}\s*(?P<end>\))?'
                        rf'\s*(?P<sign>{"|".join(COMPARE)})\s*(?P<number>\S+)\s*')


class Condition:
    """A condition such as `first_step_mae.x > 0.01`; ValueError where it cannot be read."""

    def __init__(self, text: str):
        self.text = text
        match = _CONDITION.fullmatch(text)
        if match is None or bool(match['of']) != bool(match['end']):
            raise ValueError(f'--fail-if {text!r}: write NAME > NUMBER, or max(NAME) > NUMBER; '
                             f'compare with one of {", ".join(COMPARE)}')
        self._of, self._name, self._sign = match['of'], match['name'], match['sign']
        try:
            self._limit = float(match['number'])
        except ValueError:
            raise ValueError(f'--fail-if {text!r}: {match["number"]!r} is no number') from None
        if not math.isfinite(self._limit):
            raise ValueError(f'--fail-if {text!r}: the number must be finite')

    def holds(self, metrics: dict) -> bool:
        """Return whether it is true of metrics.json.

        ValueError for a name that is not there, with the nearest ones, or without a number.
        """
        place = self._look_up(metrics)
        if self._of:
            values = list(_numbers(place))
            if not values:
                raise self._fault(f'there is no number in {self._name!r}')
            return COMPARE[self._sign](SEVERAL[self._of](values), self._limit)
        if isinstance(place, (dict, list)):
            raise self._fault(f'{self._name!r} is several numbers: write max({self._name}), min '
                              f'or mean, or one of {", ".join(list(place)[:6])}'
                              if isinstance(place, dict) else
                              f'{self._name!r} is a list: write max({self._name}), min or mean')
        if place is None:
            raise self._fault(f'{self._name!r} has no value in this replay')
        if isinstance(place, bool) or not isinstance(place, (int, float)):
            raise self._fault(f'{self._name!r} is no number: {place!r}')
        return COMPARE[self._sign](place, self._limit)

    def _look_up(self, metrics: dict):
        place, parts = metrics, [part.strip('"') for part in re.findall(_PART, self._name)]
        for index, part in enumerate(parts):
            if isinstance(place, dict) and part in place:
                place = place[part]
            elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            else:
                raise self._fault(f'there is no {self._name!r} in metrics.json; nearest: '
                                  f'{_nearest(self._name, parts[:index], place, metrics)}')
        return place

    def _fault(self, why: str) -> ValueError:
        return ValueError(f'--fail-if {self.text!r}: {why}')


def _numbers(value) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def names_in(metrics: dict, prefix: str = '') -> list[str]:
    """Return every name of a number, as a condition would write it."""
    found = []
    for key, value in metrics.items():
        key = key if re.fullmatch(r'\w+', key) else f'"{key}"'
        if isinstance(value, dict):
            found += names_in(value, f'{prefix}{key}.')
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(prefix + key)
    return found


def _nearest(name: str, parents: list[str], place, metrics: dict) -> str:
    inside = ['.'.join([*parents, key]) for key in place] if isinstance(place, dict) else []
    near = (difflib.get_close_matches(name, inside, n=3, cutoff=0.5)
            + difflib.get_close_matches(name, names_in(metrics), n=3, cutoff=0.5))
    return ', '.join(dict.fromkeys(near or inside[:6])) or 'none'
