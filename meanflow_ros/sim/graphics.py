"""MuJoCo and Meta-World with an offscreen OpenGL, or what to install."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace

NO_GRAPHICS = ('no offscreen OpenGL for the cameras: neither EGL nor OSMesa works here; on '
               'Debian or Ubuntu install libegl1 libgl1-mesa-dri libosmesa6')
_EGL_PLATFORM_DEVICE = 0x313F


def _egl_works() -> bool:
    """Whether any EGL device gives a display, asked as MuJoCo asks it."""
    try:
        egl = ctypes.CDLL('libEGL.so.1')
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        query = egl.eglGetProcAddress(b'eglQueryDevicesEXT')
        display_of = egl.eglGetProcAddress(b'eglGetPlatformDisplayEXT')
    except (OSError, AttributeError):
        return False
    if not query or not display_of:
        return False
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query = ctypes.CFUNCTYPE(ctypes.c_uint, integer, ctypes.POINTER(pointer),
                             ctypes.POINTER(integer))(query)
    display_of = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_of)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    egl.eglTerminate.argtypes = [pointer]
    devices, count = (pointer * 32)(), integer()
    if not query(32, devices, ctypes.byref(count)):
        return False
    for device in devices[:count.value]:
        display = display_of(_EGL_PLATFORM_DEVICE, device, None)
        if display and egl.eglInitialize(display, None, None):
            egl.eglTerminate(display)
            return True
    return False


def _osmesa_works() -> bool:
    for name in ('libOSMesa.so.8', 'libOSMesa.so.6', 'libOSMesa.so'):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def load_simulator() -> SimpleNamespace:
    """Import MuJoCo and Meta-World with an offscreen OpenGL; RuntimeError says what to install."""
    if not os.environ.get('MUJOCO_GL') and 'mujoco' not in sys.modules:
        if _egl_works():
            os.environ['MUJOCO_GL'] = 'egl'
        elif _osmesa_works():
            os.environ['MUJOCO_GL'] = 'osmesa'
        else:
            raise RuntimeError(NO_GRAPHICS)
    try:
        import metaworld.policies
        import mujoco
        from metaworld import env_dict
    except ModuleNotFoundError as error:
        raise RuntimeError(f'the simulator needs the package {error.name!r}: '
                           f"pip install 'metaworld==3.1.1' packaging") from error
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f'{NO_GRAPHICS} ({error})') from error
    from meanflow_ros.sim import multimodal
    environments = {name.removesuffix('-goal-observable'): environment for name, environment
                    in env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE.items()}
    environments |= {scene.__name__: scene for scene in multimodal.SCENES}
    return SimpleNamespace(mujoco=mujoco, policies=metaworld.policies.ENV_POLICY_MAP,
                           environments=environments)
