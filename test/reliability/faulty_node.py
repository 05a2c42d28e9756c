"""Process: the policy node, with a model that fails as the newest line on stdin says."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time

import numpy as np
import torch

from meanflow_ros.core.policy import Policy
from meanflow_ros.ros.policy_node import main

REAL = Policy.act
mode = ''


def act(self, observation, **options):
    """Fail, or answer as the policy does."""
    failing = globals().get(f'_{mode}') if mode else None
    return REAL(self, observation, **options) if failing is None else failing(
        lambda: REAL(self, observation, **options))


def _raises(answer):
    raise RuntimeError('the network failed')


def _out_of_memory(answer):
    return bytearray(2**62)


def _out_of_gpu_memory(answer):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')


def _exits(answer):
    sys.exit(1)


def _hangs(answer):
    while mode == 'hangs':
        time.sleep(0.01)
    return answer()


def _slow(answer):
    time.sleep(0.15)
    return answer()


def _very_slow(answer):
    time.sleep(1.2)
    return answer()


def _edited(answer, edit):
    chunk = answer()
    actions = chunk.actions.copy()
    return dataclasses.replace(chunk, actions=edit(actions))


def _nan(answer):
    def edit(actions):
        actions[3, 1] = np.nan
        return actions
    return _edited(answer, edit)


def _infinite(answer):
    def edit(actions):
        actions[-1, 0] = -np.inf
        return actions
    return _edited(answer, edit)


def _far(answer):
    return _edited(answer, lambda actions: 1e300 * np.sign(actions))


def _short(answer):
    return _edited(answer, lambda actions: actions[:-1])


def _narrow(answer):
    return _edited(answer, lambda actions: actions[:, :-1])


def _old(answer):
    chunk = answer()
    return dataclasses.replace(chunk, stamp_ns=chunk.stamp_ns - 60 * 10**9)


def _nothing(answer):
    return None


def _listen() -> None:
    global mode
    for line in sys.stdin:
        mode = line.strip()


if __name__ == '__main__':
    Policy.act = act
    threading.Thread(target=_listen, daemon=True).start()
    sys.exit(main())
