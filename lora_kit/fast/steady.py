"""Memory that a training loop needs again in its next step stays with the process.

Every step frees its activations and allocates them again. glibc gives much of what is freed back to the system,
which then has to clear every page once more; and Python's garbage collector walks all objects of the libraries again
and again. Neither happens inside :func:`steady`. Other C libraries and other systems keep their own ways.
Reads and writes nothing.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): its parameters, and what they are unless set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_INT, _LARGEST_MMAP_THRESHOLD, _USUAL = 2**31 - 1, 32 * 2**20, 128 * 2**10


@contextmanager
def steady() -> Iterator[None]:
    """Keep freed memory, and leave the objects that there are now out of garbage collection, until the end."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if libc is not None:
            libc.mallopt(_TRIM_THRESHOLD, _USUAL)
            libc.mallopt(_MMAP_THRESHOLD, _USUAL)
            libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.gnu_get_libc_version and libc.mallopt and libc.malloc_trim else None
    except (OSError, TypeError, AttributeError):
        return None
