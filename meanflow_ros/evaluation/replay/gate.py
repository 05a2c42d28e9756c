"""`--fail-if`: conditions on the numbers of metrics.json, parsed by hand; nothing is evaluated.

    condition  = term {"or" term};    term = factor {"and" factor}
    factor     = "not" factor | comparison
    comparison = sum [("<" | "<=" | ">" | ">=" | "==" | "!=") sum]
    sum        = product {("+" | "-") product};    product = atom {("*" | "/") atom}
    atom       = number | name | ("max" | "min" | "mean" | "abs") "(" sum ")" | "(" condition ")"
               | "-" atom
    name       = part {"." part};    part = word | "quoted text"

A name is a path in metrics.json. A name of several numbers (a mapping or a list) can only stand
inside max, min or mean.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable

TOKEN = re.compile(r'\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)'
                   r'|(?P<name>(?:[A-Za-z_]\w*|"[^"]*")(?:\.(?:\w+|"[^"]*"))*)'
                   r'|(?P<sign><=|>=|==|!=|[<>()+\-*/])|(?P<bad>\S))')
COMPARE = {'<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge,
           '==': operator.eq, '!=': operator.ne}
SEVERAL: dict[str, Callable] = {'max': max, 'min': min,
                                'mean': lambda values: sum(values) / len(values)}
DEEPEST = 50


class Condition:
    """A condition such as `first_step_mae.x > 0.01`; ValueError where it cannot be read."""

    def __init__(self, text: str):
        self.text = text
        self._tokens = [(match.lastgroup, match[match.lastgroup])
                        for match in TOKEN.finditer(text) if match.lastgroup]
        bad = next((token for kind, token in self._tokens if kind == 'bad'), None)
        if bad is not None:
            raise ValueError(f'--fail-if {text!r}: {bad!r} is not understood')
        if not self._tokens:
            raise ValueError('--fail-if: the condition is empty')
        self.holds({}, check=True)

    def holds(self, metrics: dict, *, check: bool = False) -> bool:
        """Return whether it is true of metrics.json.

        ValueError for a name that is not there, with the nearest ones, or without a number.
        check: read the condition only.
        """
        run = _Run(self.text, self._tokens, None if check else metrics)
        value = run.condition(0)
        if run.token() is not None:
            raise run.fault(f'{run.token()!r} is not expected there')
        if not isinstance(value, bool):
            raise run.fault('it must compare something, as in `... > 0.01`')
        return value


class _Run:
    """One pass over the tokens. metrics: None where names are not looked up."""

    def __init__(self, text: str, tokens: list[tuple[str, str]], metrics: dict | None):
        self._text, self._tokens, self._metrics, self._at = text, tokens, metrics, 0

    def token(self) -> str | None:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else None

    def fault(self, why: str) -> ValueError:
        return ValueError(f'--fail-if {self._text!r}: {why}')

    def _take(self, *wanted: str) -> str | None:
        if self.token() in wanted:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return None

    def condition(self, depth: int):
        if depth > DEEPEST:
            raise self.fault('it is nested too deeply')
        value = self._term(depth)
        while self._take('or'):
            value = self._logical(value) | self._logical(self._term(depth))
        return value

    def _term(self, depth: int):
        value = self._factor(depth)
        while self._take('and'):
            value = self._logical(value) & self._logical(self._factor(depth))
        return value

    def _factor(self, depth: int):
        if self._take('not'):
            if depth > DEEPEST:
                raise self.fault('it is nested too deeply')
            return not self._logical(self._factor(depth + 1))
        value = self._sum(depth)
        sign = self._take(*COMPARE)
        if sign is None:
            return value
        return COMPARE[sign](self._number(value), self._number(self._sum(depth)))

    def _sum(self, depth: int):
        value = self._product(depth)
        while sign := self._take('+', '-'):
            other = self._number(self._product(depth))
            value = self._number(value) + (other if sign == '+' else -other)
        return value

    def _product(self, depth: int):
        value = self._atom(depth)
        while sign := self._take('*', '/'):
            other = self._number(self._atom(depth))
            if sign == '/' and other == 0 and self._metrics is not None:
                raise self.fault('it divides by zero')
            value = self._number(value) * other if sign == '*' else (
                self._number(value) / (other or 1.0))
        return value

    def _atom(self, depth: int):
        if depth > DEEPEST:
            raise self.fault('it is nested too deeply')
        if self._take('('):
            value = self.condition(depth + 1)
            return self._closed(value)
        if self._take('-'):
            return -self._number(self._atom(depth + 1))
        if self._at >= len(self._tokens):
            raise self.fault('it ends too early')
        kind, text = self._tokens[self._at]
        self._at += 1
        if kind == 'number':
            return float(text)
        if kind != 'name' or text in ('and', 'or', 'not'):
            raise self.fault(f'{text!r} is not expected there')
        if text in (*SEVERAL, 'abs') and self._take('('):
            return self._closed(self._function(text, self._sum(depth + 1)))
        return self._look_up(text)

    def _closed(self, value):
        if not self._take(')'):
            raise self.fault('a bracket is not closed')
        return value

    def _function(self, name: str, value):
        if name == 'abs':
            return abs(self._number(value))
        values = list(_numbers(value))
        if not values:
            raise self.fault(f'{name} of nothing')
        return SEVERAL[name](values)

    def _look_up(self, name: str):
        if self._metrics is None:
            return 1.0
        place = self._metrics
        parts = [part.strip('"') for part in re.findall(r'"[^"]*"|[^.]+', name)]
        for index, part in enumerate(parts):
            if isinstance(place, dict) and part in place:
                place = place[part]
            elif isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            else:
                near = _nearest(name, '.'.join(parts[:index]), place, self._metrics)
                raise self.fault(f'there is no {name!r} in metrics.json; nearest: {near}')
        if place is None:
            raise self.fault(f'{name!r} has no value in this replay')
        if not isinstance(place, (int, float, dict, list)):
            raise self.fault(f'{name!r} is no number: {place!r}')
        return place

    def _number(self, value) -> float:
        if isinstance(value, (dict, list)):
            raise self.fault('a name of several numbers can only stand inside max, min or mean')
        return float(value)

    def _logical(self, value) -> bool:
        if not isinstance(value, bool):
            raise self.fault('and, or, not stand between comparisons')
        return value


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
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


def _nearest(name: str, parent: str, place, metrics: dict) -> str:
    inside = [f'{parent}.{key}' if parent else key for key in place] if isinstance(
        place, dict) else []
    names = names_in(metrics)
    near = (difflib.get_close_matches(name, inside, n=3, cutoff=0.5)
            + difflib.get_close_matches(name, names, n=3, cutoff=0.5))
    return ', '.join(dict.fromkeys(near or inside[:6] or names[:6])) or 'none'
