"""What diagnostics tell: counts, latencies, and the reason when no chunk is produced."""

from __future__ import annotations

import re
import time
from collections import deque

import numpy as np


class Status:
    """The numbers of one activation; every method is called under the node's lock."""

    def __init__(self):
        self.reason: str | None = None
        self._reason_since_s = 0.0
        self._reason_logged = False
        self.last_stamp_ns: int | None = None
        self.discarded = 0
        self.chunks = 0
        self.latency_ns = 0               # the network's median so far
        self._latencies_s = deque(maxlen=1000)
        self._published_at = deque(maxlen=1000)

    def begin(self) -> None:
        """Begin new statistics."""
        self.reason, self.last_stamp_ns = None, None
        self.chunks = self.discarded = self.latency_ns = 0
        self._published_at.clear()
        self._latencies_s.clear()

    def withheld(self, reason: str, patience_s: float) -> bool:
        """Note a reason; True when it is to be logged: once per kind (numbers do not count)."""
        if self.reason is None or _without_numbers(self.reason) != _without_numbers(reason):
            self._reason_since_s, self._reason_logged = time.monotonic(), False
        self.reason = reason
        if self._reason_logged or time.monotonic() - self._reason_since_s < patience_s:
            return False
        self._reason_logged = True
        return True

    def published(self, latency_s: float) -> str | None:
        """Count a chunk; return the logged reason that held chunks back before, if any."""
        self.chunks += 1
        self._latencies_s.append(latency_s)
        self.latency_ns = round(np.median(self._latencies_s) * 1e9)
        self._published_at.append(time.monotonic())
        reason, self.reason = self.reason, None
        return reason if self._reason_logged else None

    def rate_hz(self) -> float:
        """Return the chunks per second of the last 5 s, by the wall clock."""
        since = time.monotonic() - 5.0
        return sum(at > since for at in self._published_at) / 5.0

    def values(self) -> dict[str, object]:
        """Return what diagnostics show."""
        values = {'rate_hz': f'{self.rate_hz():.1f}', 'chunks': self.chunks,
                  'discarded': self.discarded}
        if self._latencies_s:
            p50, p99 = np.percentile(self._latencies_s, [50, 99]) * 1e3
            values |= {'latency_p50_ms': f'{p50:.2f}', 'latency_p99_ms': f'{p99:.2f}'}
        return values


def _without_numbers(text: str) -> str:
    return re.sub(r'[\d.]+', '#', text)
