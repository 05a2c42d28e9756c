"""An evaluation of the action network as one kernel, which stays on the GPU from first to last.

A chunk of few steps gives a GPU so little to compute that starting kernels, and waiting for their
weights, takes longer than the rest of it; a DiT of 18 blocks is 160 kernels. velocity.cu is all
of it as one, in CUDA C++, since Triton has no word for what makes it fast: a warp that fetches
weights while others compute, and results that are their own signal. It is compiled here, by the
compiler that comes with PyTorch for CUDA, when a policy is loaded.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from meanflow_ros.core import kernels

try:
    from cuda.bindings import driver, nvrtc
except ImportError:   # PyTorch for CPUs comes without
    driver = nvrtc = None

SOURCE = Path(__file__).with_name('velocity.cu')
WARPS = 8                   # that compute, of a program
OLDEST = (9, 0)             # compute capability: the bulk copies of Hopper
LEAST_MEMORY = 200 * 1024   # bytes, shared: for weights that come while others are used
MOST_ROWS = 14              # the tensor cores take 16; two are those of shifts
CONTEXT_NUMBERS = 2**15     # of keys that a program keeps near
NOTHING = -1                # as int32: what no result is


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled for; named as in velocity.cu."""

    width: int
    hidden: int
    decoded: int
    heads: int
    blocks: int
    rows: int
    actions: int

    @property
    def exchange(self) -> int:
        """Return how many bytes programs tell each other."""
        hints, stream = self.programs * 4, self.rows * self.width * 2
        told = stream + hints + self.rows * self.programs * 4
        of_block = 3 * stream + self.rows * self.hidden * 2 + 2 * hints + 6 * told
        return self.blocks * of_block + 2 * told + 2 * (self.rows * self.decoded * 2 + hints)

    @property
    def head(self) -> int:
        """Return the width of a head."""
        return self.width // self.heads

    @property
    def most_keys(self) -> int:
        """Return how many keys there is room for."""
        return CONTEXT_NUMBERS // self.head

    @property
    def programs(self) -> int:
        """Return how many multiprocessors it takes."""
        return self.width // 8


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of an action network, in the order of velocity.cu's arguments.

    Those of all blocks are (blocks, out, in); straight, swapped: rotary tables (blocks, T, 2, 1,
    d).
    """

    sizes: Sizes
    encode_in: Tensor
    encode_in_bias: Tensor
    encode_out: Tensor
    encode_out_bias: Tensor
    qkv: Tensor
    proj: Tensor
    query: Tensor
    cross: Tensor
    gate_and_value: Tensor
    mlp: Tensor
    straight: Tensor
    swapped: Tensor
    decode_in: Tensor
    decode_middle: Tensor
    decode_middle_bias: Tensor
    decode_out: Tensor
    decode_out_bias: Tensor

    @classmethod
    def of(cls, sizes: Sizes, encoder: nn.Sequential, blocks: Sequence[nn.Module],
           decode_in: nn.Linear, decode_out: nn.Sequential) -> 'Weights':
        """Take those of a FusedDiT; its blocks' own then are views of what is returned."""
        layers = {'qkv': [block.self_attn.qkv for block in blocks],
                  'proj': [block.self_attn.proj for block in blocks],
                  'query': [block.query for block in blocks],
                  'cross': [block.cross_proj for block in blocks],
                  'gate_and_value': [block.gate_and_value for block in blocks],
                  'mlp': [block.mlp_proj for block in blocks]}
        stacked = {}
        for name, of_blocks in layers.items():
            stacked[name] = torch.stack([layer.weight.detach() for layer in of_blocks])
            for layer, weight in zip(of_blocks, stacked[name]):
                layer.weight = nn.Parameter(weight, requires_grad=False)
        for name in ('straight', 'swapped'):
            stacked[name] = torch.stack([getattr(block.self_attn, name) for block in blocks])
        first, last = (layer for layer in encoder if isinstance(layer, nn.Linear))
        middle, out = (layer for layer in decode_out if isinstance(layer, nn.Linear))
        return cls(
            sizes, **stacked, encode_in=first.weight, encode_in_bias=first.bias,
            encode_out=last.weight, encode_out_bias=last.bias, decode_in=decode_in.weight,
            decode_middle=middle.weight, decode_middle_bias=middle.bias, decode_out=out.weight,
            decode_out_bias=out.bias)


def why_not(sizes: Sizes, device: torch.device) -> str:
    """Return '' if the kernel can be expected to run here, or why not."""
    if device.type != 'cuda':
        return 'one kernel for the whole action network is for CUDA'
    if driver is None:
        return 'cuda-bindings is not installed (pip install cuda-bindings)'
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < OLDEST:
        return f'one kernel for the whole action network needs compute capability {OLDEST[0]}'
    if properties.shared_memory_per_block_optin < LEAST_MEMORY:
        return (f'one kernel for the whole action network needs {LEAST_MEMORY} bytes of shared '
                f'memory, there are {properties.shared_memory_per_block_optin}')
    programs = sizes.programs
    if programs > properties.multi_processor_count:
        return (f'an action network of width {sizes.width} as one kernel needs {programs} '
                f'multiprocessors, there are {properties.multi_processor_count}')
    if sizes.rows > MOST_ROWS:
        return f'one kernel takes chunks of {MOST_ROWS} steps at most, these have {sizes.rows}'
    if (sizes.head not in (64, 128) or sizes.width > 1024 or sizes.width % 32 or sizes.hidden % 32
            or sizes.decoded % 32):
        return f'one kernel is not for sizes as these: {sizes}'
    return ''


def laid_out(keys: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (blocks, 1, heads, S, d) as the kernel fetches them.

    Keys: RMS-normalised, times scale, (blocks, 1, heads, S, d + 32); values: (blocks, 1, heads,
    d, S + 8); so that rows begin in other banks of memory.
    """
    return kernels.context(keys, values, scale, 32, 8)


def velocity(z: Tensor, weights: Weights, modulation: Tensor, offset: Tensor, keys: Tensor,
             values: Tensor, bias: Tensor | None,
             given: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the velocity (1, T, A) at z (1, T, A) float32.

    modulation: (blocks, 6, 1, 1, D), the last dimension contiguous. offset: (F,), the bias of the
    decoder's first layer. keys, values: see `laid_out`; their number is a multiple of 32. bias: a
    number for each key, added to its scores. given: which steps are (1, T) bool, and their
    modulation. RuntimeError if the GPU does not take the kernel.
    """
    sizes = weights.sizes
    z, out = z.contiguous(), torch.empty_like(z)
    exchange = torch.full((sizes.exchange // 4,), NOTHING, dtype=torch.int32, device=z.device)
    which, clean = given or (None, modulation)
    arguments = _Arguments(
        z.data_ptr(), out.data_ptr(), exchange.data_ptr(),
        *(getattr(weights, name).data_ptr() for name in _BEFORE), offset.data_ptr(),
        *(getattr(weights, name).data_ptr() for name in _AFTER),
        modulation.data_ptr(), clean.data_ptr(), 0 if which is None else which.data_ptr(),
        *modulation.stride()[:2], keys.data_ptr(), values.data_ptr(),
        0 if bias is None else bias.data_ptr(), keys.shape[3])
    _launch(*_compiled(sizes, z.device.index), sizes.programs, arguments)
    return out


_NAMES = [field.name for field in dataclasses.fields(Weights)[1:]]
_BEFORE, _AFTER = (_NAMES[:_NAMES.index('decode_middle')], _NAMES[_NAMES.index('decode_middle'):])


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in (
                    'z', 'velocity', 'exchange', *_BEFORE, 'offset', *_AFTER, 'modulation',
                    'clean', 'given')),
                ('modulation_block', ctypes.c_longlong), ('modulation_kind', ctypes.c_longlong),
                *((name, ctypes.c_void_p) for name in ('keys', 'values', 'bias')),
                ('count', ctypes.c_int)]


def _checked(result: tuple):
    error, *values = result
    if int(error):
        raise RuntimeError(str(error))
    return values[0] if values else None


@functools.cache
def _compiled(sizes: Sizes, device: int) -> tuple:
    """Return the kernel for a device, and its bytes of shared memory."""
    properties = torch.cuda.get_device_properties(device)
    memory = properties.shared_memory_per_block_optin
    program = _checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0,
                                                None, None))
    options = [f'--gpu-architecture=sm_{properties.major}{properties.minor}', '--std=c++17',
               *(f'-D{name.upper()}={value}' for name, value in
                 (*dataclasses.asdict(sizes).items(), ('warps', WARPS), ('memory', memory)))]
    try:
        _checked(nvrtc.nvrtcCompileProgram(program, len(options),
                                           [option.encode() for option in options]))
    except RuntimeError as error:
        log = b' ' * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f'{SOURCE.name}: {error}: {log.decode()}') from None
    code = b' ' * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    function = _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(code)),
                                                   b'velocity'))
    _checked(driver.cuFuncSetAttribute(
        function, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        memory))
    return function, memory


def _launch(function, memory: int, programs: int, arguments: _Arguments) -> None:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = WARPS * 32 + 32, 1, 1
    config.sharedMemBytes = memory
    config.hStream = torch.cuda.current_stream().cuda_stream
    # Started when there is room for all programs, since each waits for all.
    together = driver.CUlaunchAttribute()
    together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    together.value.cooperative = 1
    config.attrs, config.numAttrs = [together], 1
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))
