"""The Triton kernels compute what PyTorch computes: interpreted, on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meanflow_ros.core import kernels

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec('triton') is None,
                    reason='Triton is missing: it comes with PyTorch for CUDA')
def test_every_kernel_gives_what_pytorch_gives():
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', HERE / 'check_kernels.py'], capture_output=True,
        text=True, timeout=300, check=False,
        env={**os.environ, 'TRITON_INTERPRET': '1',
             'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 28
    assert {name: value for name, value in found.items() if not value < 5e-6} == {}


@pytest.mark.parametrize('device, dtype', [('cpu', torch.bfloat16), ('cuda', torch.float32)])
def test_kernels_are_for_bfloat16_on_cuda(device, dtype, monkeypatch):
    monkeypatch.setattr(kernels, 'triton', object())
    assert 'not for' in kernels.why_not(torch.device(device), dtype)
    assert kernels.why_not(torch.device('cuda'), torch.bfloat16) == ''


@pytest.mark.parametrize('width, fits', [(8, False), (16, True), (48, False), (64, True),
                                         (128, True), (256, False)])
def test_heads_are_powers_of_two_from_16_to_128(width, fits):
    assert kernels.fits(width) is fits
