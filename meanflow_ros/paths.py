"""Where the package's data files are: colcon install space, pip install, or source tree."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

PACKAGE = 'meanflow_ros'


def share_directory() -> Path:
    """Return the folder that holds config/, launch/ and resource/.

    FileNotFoundError names the places that were searched.
    """
    source = Path(__file__).resolve().parent.parent
    prefixes = [p for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    prefixes += [sysconfig.get_path('data'), *(str(p) for p in Path(__file__).parents)]
    candidates = [source, *(Path(prefix) / 'share' / PACKAGE for prefix in prefixes)]
    for candidate in candidates:
        if (candidate / 'package.xml').is_file() and (candidate / 'config').is_dir():
            return candidate
    raise FileNotFoundError(f'the data files of {PACKAGE} were not found in any of '
                            f'{", ".join(map(str, candidates))}; install the package again')


def default_checkpoint() -> Path:
    """Return the directory of the checkpoint that ships with the package."""
    return share_directory() / 'resource' / 'default_policy'
