"""The `bench` command: print and write what an inference costs, beside FLOWER's manner."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from meanflow_ros.core.policy import DTYPES, Policy
from meanflow_ros.core.runtime import FastPolicy, RuntimeOptions
from meanflow_ros.evaluation.bench import checks, device, roofline, subjects
from meanflow_ros.evaluation.bench.stages import stage_times
from meanflow_ros.evaluation.bench.startup import measure_start
from meanflow_ros.evaluation.bench.techniques import Technique, flower_rows, own_rows, release

WARM_UP_RUNS = 20


class Bench:
    """One run of the command; `results` is what is written, after every part."""

    def __init__(self, arguments: argparse.Namespace):
        self._arguments = arguments
        self._device = torch.device(arguments.device)
        self._dtype = DTYPES[arguments.dtype]
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        self.results: dict[str, object] = {
            'command': 'bench ' + ' '.join(arguments.command),
            'machine': device.describe(self._device), 'dtype': arguments.dtype,
            'preset': arguments.preset or str(arguments.checkpoint), 'cameras': arguments.cameras,
            'pictures': f'{arguments.width}x{arguments.height}', 'problems': []}

    @property
    def of_node(self) -> bool:
        """Return whether it is measured through ROS."""
        return self._arguments.node

    def run(self) -> None:
        """Measure every part that was asked for; a part that fails is told and left out."""
        parts = (self._node,) if self.of_node else (
            self._ceilings, self._own, self._start, self._flower)
        for part in parts:
            if part.__name__.strip('_') not in self._arguments.skip:
                try:
                    part()
                except (RuntimeError, ValueError, OSError) as error:
                    self.results['problems'].append(f'{part.__name__.strip("_")}: {error}')
                    print(f'bench: {self.results["problems"][-1]}', file=sys.stderr, flush=True)
                release()
                self._write()

    def _wanted(self, name: str) -> bool:
        return any(part in name for part in self._arguments.rows)

    def _policy(self, *, rectified_flow: bool = False) -> Policy:
        arguments = self._arguments
        if arguments.checkpoint:
            return Policy.load(arguments.checkpoint, device=self._device, dtype=self._dtype)
        policy = subjects.random_policy(
            arguments.preset, cameras=arguments.cameras, width=arguments.width,
            height=arguments.height, horizon=arguments.horizon, states=arguments.states,
            device=self._device, rectified_flow=rectified_flow)
        return Policy(policy.config, policy.network, dtype=self._dtype)

    def _ceilings(self) -> None:
        self.results['ceilings'] = device.ceilings(self._device, self._dtype)

    def _flower(self) -> None:
        if self._arguments.checkpoint:
            raise ValueError("the path in FLOWER's manner is measured with --preset only")
        policy = self._policy(rectified_flow=True)
        example = subjects.observations(policy.robot, 1)[0]
        for technique in flower_rows(policy, example, compiled=self._arguments.compile,
                                     wanted=self._wanted):
            self._measure(technique, example)

    def _own(self) -> None:
        arguments, policy = self._arguments, self._policy()
        seen = subjects.observations(policy.robot)
        options = RuntimeOptions(dtype=self._dtype, compile_cache=arguments.cache,
                                 threads=arguments.threads)
        if arguments.dtype == 'float32':
            torch.backends.cudnn.allow_tf32 = False   # what is compared with it is exact too
        for technique in own_rows(policy, seen[0], arguments.nfe, options=options,
                                  compiled=arguments.compile, fp8=arguments.fp8,
                                  wanted=self._wanted):
            row, fast = self._measure(technique, seen[0]), technique.policy
            if technique.detailed:
                row['why_not_compiled'] = fast.why_not_compiled
                row['why_no_kernels'] = fast.why_no_kernels
                row['why_not_one_kernel'] = fast.why_not_one_kernel
                row['why_not_fp8'] = fast.why_not_fp8
                if technique.nfe == arguments.nfe[0]:
                    row['checks'] = self._check(policy, fast, seen)
                row['stages_ms'] = stage_times(fast, seen[0], steps=technique.nfe,
                                               runs=arguments.runs,
                                               graphs='graphed' in technique.name)
                if fast.why_not_fp8:   # the bound is of the dtype's weights and products
                    self._bound(policy, fast, row)
            self._write()

    def _measure(self, technique: Technique, example) -> dict[str, object]:
        """Measure one row; the fastest one's times are what `evaluate replay --latency` reads."""
        arguments = self._arguments
        gpu = self._device.type == 'cuda'
        if gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        values = device.host_ms(lambda: technique.act(example), arguments.runs,
                                warm_up=min(WARM_UP_RUNS, arguments.runs),
                                limit_s=arguments.row_seconds)
        row = {'technique': technique.name, 'nfe': technique.nfe,
               'host_ms': device.summary(values)}
        if gpu:
            row['peak_mib'] = round(torch.cuda.max_memory_allocated(self._device) / 2**20)
        if technique.policy:
            row['why_eager'] = technique.policy.why_eager
        found, table = device.kernels(lambda: technique.act(example), self._device)
        row |= found
        if table and arguments.profile:
            name = f'{technique.name.replace(" ", "_")}_nfe{technique.nfe}.txt'
            arguments.profile.mkdir(parents=True, exist_ok=True)
            (arguments.profile / name).write_text(table)
        self.results.setdefault('rows', []).append(row)
        if technique.nfe == arguments.nfe[0] and row['host_ms']['p50'] <= min(
                (r['host_ms']['p50'] for r in self.results['rows'] if r['nfe'] == technique.nfe)):
            self.results['latencies_ms'] = [round(value, 4) for value in values]
        print(line_of(row), flush=True)
        self._write()
        if row.get('why_eager') and gpu:
            print(f'  {row["why_eager"]}', flush=True)
        return row

    def _check(self, policy: Policy, fast: FastPolicy, seen: list) -> dict[str, object]:
        nfe, exact = self._arguments.nfe, Policy(policy.config, policy.network)
        return {'off_the_eager_policy': {steps: checks.difference(policy, fast, seen[:4], steps)
                                         for steps in nfe},
                'off_float32': checks.difference(exact, fast, seen[:4], nfe[0]),
                'eager_policy_off_float32': checks.difference(exact, policy, seen[:4], nfe[0]),
                'repeats_that_differ': checks.repeats_differ(fast, seen, rounds=100),
                **checks.switches(fast, seen, nfe, count=self._arguments.switches)}

    def _bound(self, policy: Policy, fast: FastPolicy, row: dict) -> None:
        request = fast.request([subjects.observations(policy.robot, 1)[0]], row['nfe'], [0], None)
        sequence = request.prompt.embedded.shape[1] + len(
            policy.robot.cameras) * fast.fused.see.tokens
        work = roofline.work_of(policy, steps=row['nfe'], dtype=self._dtype, sequence=sequence)
        row['work'] = work
        if 'ceilings' in self.results:
            row['bound_ms'] = roofline.bound_ms(work, **self.results['ceilings'])
            row['roofline_fraction'] = {
                where: round(row['bound_ms']['total'] / times['p50'], 4)
                for where, times in (('host', row['host_ms']),
                                     ('pinned', row['stages_ms'].get('pinned'))) if times}

    def _checkpoint(self, folder: Path) -> Path:
        """Return the checkpoint that was asked for, or the random policy's, written there."""
        checkpoint = self._arguments.checkpoint
        if checkpoint is None:
            checkpoint = folder / 'policy'
            self._policy().save(checkpoint, dtype=torch.bfloat16)
            release()
        return checkpoint

    def _start(self) -> None:
        arguments = self._arguments
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = self._checkpoint(Path(folder))
            for name in ('cold', 'warm'):
                found = measure_start(checkpoint, device=arguments.device, dtype=arguments.dtype,
                                      cache=Path(folder) / 'compiled')
                self.results.setdefault('start', {})[name] = found
                print(f'{name} start: first chunk after {found["first_chunk_s"]} s', flush=True)

    def _node(self) -> None:
        from meanflow_ros.evaluation.bench.node import measure_node   # needs ROS
        arguments = self._arguments
        with tempfile.TemporaryDirectory() as folder:
            found = measure_node(
                self._checkpoint(Path(folder)), device=arguments.device, width=arguments.width,
                height=arguments.height, threads=arguments.threads, runs=arguments.runs,
                compressed=arguments.compressed, rate_hz=arguments.rate,
                minutes=arguments.minutes)
        self.results['node'] = found
        print(json.dumps(found, indent=1), flush=True)

    def _write(self) -> None:
        if self._arguments.out:
            self._arguments.out.parent.mkdir(parents=True, exist_ok=True)
            self._arguments.out.write_text(json.dumps(self.results, indent=1) + '\n')


def line_of(row: dict) -> str:
    """Return a row of the printed table."""
    times = row['host_ms']
    busy = f'{row["gpu_busy_ms"]:9.3f} {row["kernels"]:8}' if 'kernels' in row else f'{"":18}'
    return (f'{row["technique"]:33} {row["nfe"]:3} {times["p50"]:9.3f} {times["p95"]:9.3f} '
            f'{times["p99"]:9.3f} {times["max"]:9.3f} {busy} {times["runs"]:5}')


HEAD = (f'{"technique":33} {"NFE":>3} {"p50 ms":>9} {"p95":>9} {"p99":>9} {"max":>9} '
        f'{"GPU busy":>9} {"kernels":>8} {"runs":>5}')


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the arguments; exits with what is wrong."""
    parser = argparse.ArgumentParser(
        prog='bench', description='Measure an inference, from pictures in memory to the chunk, '
        'beside an eager four-step rectified flow in the manner of FLOWER.')
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--preset', choices=('large', 'tiny'), help='sizes, with random weights')
    what.add_argument('--checkpoint', type=Path)
    parser.add_argument('--cameras', type=int, default=2, help='of a preset; default 2')
    parser.add_argument('--width', type=int, default=640, help='of a picture; default 640')
    parser.add_argument('--height', type=int, default=480, help='default 480')
    parser.add_argument('--horizon', type=int, default=10, help='steps of a chunk; default 10')
    parser.add_argument('--states', type=int, default=7, help='joints that are seen; default 7')
    parser.add_argument('--nfe', type=int, nargs='+', default=[1, 2, 4], help='default 1 2 4')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=sorted(DTYPES),
                        default='bfloat16' if torch.cuda.is_available() else 'float32')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True,
                        help='measure compiled rows too; the default')
    parser.add_argument('--fp8', action='store_true',
                        help="measure a row with the encoder's layers in fp8 too")
    parser.add_argument('--threads', type=int, default=0, help="of a CPU; 0: PyTorch's choice")
    parser.add_argument('--runs', type=int, default=1000, help='timed, of each row; default 1000')
    parser.add_argument('--row-seconds', type=float, default=150.0,
                        help='a slow row ends after these with fewer runs; default 150')
    parser.add_argument('--switches', type=int, default=1000,
                        help='of instruction and NFE, looking for leaks; default 1000')
    parser.add_argument('--skip', nargs='*', default=[],
                        choices=('ceilings', 'flower', 'own', 'start'), help='parts to leave out')
    parser.add_argument('--rows', nargs='+', default=[''], metavar='WORDS',
                        help='only the rows whose name contains any of these')
    parser.add_argument('--node', action='store_true',
                        help='measure through ROS 2 instead: publication to arrival')
    parser.add_argument('--compressed', action='store_true', help='with --node: JPEG pictures')
    parser.add_argument('--rate', type=float, default=30.0, help='with --minutes; default 30 Hz')
    parser.add_argument('--minutes', type=float, default=0.0,
                        help='with --node: then publish at --rate for so long; default 0')
    parser.add_argument('--cache', type=Path, help='directory of what is compiled')
    parser.add_argument('--profile', type=Path, help='directory for a table of kernels per row')
    parser.add_argument('--out', type=Path, help='JSON file')
    arguments = parser.parse_args(argv)
    arguments.command = sys.argv[1:] if argv is None else list(argv)
    if arguments.preset is None and arguments.checkpoint is None:
        arguments.preset = 'large' if torch.cuda.is_available() else 'tiny'
    if min(arguments.nfe) < 1 or arguments.runs < 1:
        parser.error('--nfe and --runs must be at least 1')
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the `bench` command."""
    bench = Bench(parse(argv))
    if not bench.of_node:
        print(HEAD, flush=True)
    try:
        bench.run()
    except KeyboardInterrupt:
        print('\nbench: interrupted; what was measured before is kept', file=sys.stderr)
        return 130
    return 1 if bench.results['problems'] else 0


if __name__ == '__main__':
    sys.exit(main())
