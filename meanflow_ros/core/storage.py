"""Directories that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD = '.partial', '.old'


@contextlib.contextmanager
def replaced_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the name `directory` when the block ends well.

    Files are flushed to the disk first. An existing directory is kept until its replacement is
    complete. After an error or a kill the old one, or nothing, is left under that name.
    """
    partial, old = (directory.with_name(directory.name + end) for end in (PARTIAL, OLD))
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush_tree(partial)
    recover_directory(directory)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Finish a replacement that was killed between its two renames."""
    old = directory.with_name(directory.name + OLD)
    if old.exists() and directory.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(directory)


def flush_tree(directory: Path) -> None:
    """Wait until every file below `directory` is on the disk."""
    for path in [*(path for path in directory.rglob('*') if path.is_file()), directory]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
