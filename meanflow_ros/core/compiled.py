"""torch.compile of a FusedNetwork's repeated blocks, and where its results are kept.

Blocks of one kind and shape share what was compiled for the first of them, so that starting cold
takes as long as a few blocks take, however deep the network is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from meanflow_ros.core.fused_dit import FusedFlowBlock, KeysAndValues
from meanflow_ros.core.fused_encoder import PatchEmbedding, TextLayer, VisionBlock

PARTS = (PatchEmbedding, VisionBlock, TextLayer, KeysAndValues, FusedFlowBlock)
KINDS_AND_SHAPES = 64   # of one part: stages, and lengths of the prompt


class CompiledParts:
    """The blocks of a network, compiled in place; as they were again if that fails.

    backend: of torch.compile.
    """

    def __init__(self, network: nn.Module, *, backend: str | Callable = 'inductor'):
        self.problem = ''
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, KINDS_AND_SHAPES)
        self._parts = [(parent, name, child) for parent in network.modules()
                       for name, child in parent.named_children() if isinstance(child, PARTS)
                       and not getattr(child, 'kernels', False)]   # those are kernels already
        for parent, name, child in self._parts:
            setattr(parent, name, torch.compile(child, backend=backend, dynamic=False))

    def try_out(self, run: Callable[[], object]) -> None:
        """Run the network; if that raises, take the compiled blocks out and keep the reason."""
        try:
            run()
        except Exception as error:  # a compiler that is missing, or of which the kernels fail
            for parent, name, child in self._parts:
                setattr(parent, name, child)
            self.problem = f'compilation failed: {type(error).__name__}: {error}'


def keep_compiled_in(cache: Path) -> None:
    """Keep what is compiled from start to start, where the environment names no directories.

    What is kept there is run. So it does not lie beside the checkpoint, where it could come out of
    somebody's archive, and ValueError says so if others may write to it. Where the directory
    cannot be made, each start compiles anew.
    """
    directories = {'TORCHINDUCTOR_CACHE_DIR': cache, 'TRITON_CACHE_DIR': cache / 'triton'}
    if directories.keys() <= os.environ.keys():
        return
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return
    status = cache.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f'others may write to {cache}, and what is compiled there is run: '
                         f'chmod go-w {cache}, or set {" and ".join(directories)}')
    for name, directory in directories.items():
        os.environ.setdefault(name, str(directory))


def users_cache() -> Path:
    """Return the user's directory for what is compiled, of all checkpoints."""
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'meanflow_ros' / 'compiled'
