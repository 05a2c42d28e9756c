"""How long a checkpoint takes from the disk to its first chunk, in a process of its own.

python -m meanflow_ros.evaluation.bench.startup CHECKPOINT --device cuda
"""

from __future__ import annotations

import time

BEGIN = time.perf_counter()   # before the imports, which are part of a start

import argparse   # noqa: E402
import json       # noqa: E402
import os         # noqa: E402
import resource   # noqa: E402
import subprocess   # noqa: E402
import sys        # noqa: E402
from pathlib import Path   # noqa: E402

LONGEST_S = 900.0


def measure_start(checkpoint: Path, *, device: str, dtype: str,
                  cache: Path) -> dict[str, object]:
    """Start a process that loads a checkpoint and acts once; return its times and memory.

    RuntimeError carries what it said if it fails.
    """
    command = [sys.executable, '-m', 'meanflow_ros.evaluation.bench.startup', str(checkpoint),
               '--device', device, '--dtype', dtype, '--cache', str(cache)]
    begin = time.perf_counter()
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR')}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False,
                          env=environment)
    if done.returncode:
        raise RuntimeError(f'a start failed: {done.stderr.strip()[-2000:]}')
    return {**json.loads(done.stdout.splitlines()[-1]),
            'process_s': round(time.perf_counter() - begin, 2)}


def main(argv=None) -> int:
    """Load, act once, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--cache', type=Path)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--fp8', action='store_true')
    arguments = parser.parse_args(argv)
    import torch

    from meanflow_ros.core.policy import DTYPES
    from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
    from meanflow_ros.evaluation.bench.subjects import observations
    imported = time.perf_counter()
    policy = FastPolicy.load(arguments.checkpoint, device=arguments.device,
                             dtype=DTYPES[arguments.dtype], options=RuntimeOptions(
                                 compile=arguments.compile, fp8=arguments.fp8,
                                 compile_cache=arguments.cache))
    loaded = time.perf_counter()
    observation = observations(policy.robot, 1)[0]
    why_eager = policy.warm_up(observation)
    warm = time.perf_counter()
    policy.act(observation)
    result = {'import_s': round(imported - BEGIN, 2), 'load_s': round(loaded - imported, 2),
              'warm_up_s': round(warm - loaded, 2),
              'first_chunk_s': round(time.perf_counter() - BEGIN, 2), 'why_eager': why_eager,
              'why_not_compiled': policy.why_not_compiled, 'why_no_kernels': policy.why_no_kernels,
              'why_not_one_kernel': policy.why_not_one_kernel, 'why_not_fp8': policy.why_not_fp8,
              'host_peak_mib': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if policy.device.type == 'cuda':
        result |= {'gpu_peak_mib': round(torch.cuda.max_memory_allocated() / 2**20),
                   'gpu_reserved_mib': round(torch.cuda.max_memory_reserved() / 2**20)}
    policy.close()
    print(json.dumps(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
