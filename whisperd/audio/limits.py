"""What the decoder's process may use: it reads files that anybody made, with libraries that have had holes."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

_MIB = 2**20
# The decoder looks at its CPU time between packets. This much later the kernel ends a process that never got there.
_BACKSTOP_S = 30


def limit_process(*, max_file_bytes: int) -> None:
    """Set the limits that hold for the whole life of the process: the size of files, no core dumps."""
    resource.setrlimit(resource.RLIMIT_FSIZE, _below(resource.RLIMIT_FSIZE, max_file_bytes))
    # A core would hold somebody's recording.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class OverMemoryLimitError(Exception):
    """A job needs more memory than it may have."""


@contextmanager
def limit_job(*, memory_mb: float, cpu_s: float) -> Iterator[None]:
    """Limit what one job may use beyond what the process has already.

    Beyond `memory_mb` MiB more address space, allocations fail, and it raises `OverMemoryLimitError`; `MemoryError`
    where somebody else has limited the process to less than that, so that it is of no more use. The 120 to 300 MiB that
    libraries, stacks and the allocator's reserves take, hardly any of it touched, do not count. Some 30 s after `cpu_s`
    more CPU seconds the kernel ends the process (SIGXCPU). The kernel counts both from the start of a process that does
    many jobs, so the soft limits move with each.
    """
    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    cpu_end_s = math.ceil(time.process_time() + cpu_s) + _BACKSTOP_S
    limits = {resource.RLIMIT_AS: used_bytes + int(memory_mb * _MIB), resource.RLIMIT_CPU: cpu_end_s}
    before = {what: resource.getrlimit(what) for what in limits}
    memory_bytes, _ = _below(resource.RLIMIT_AS, limits[resource.RLIMIT_AS])
    if memory_bytes < used_bytes:
        raise MemoryError
    for what, soft in limits.items():
        resource.setrlimit(what, (_below(what, soft)[0], before[what][1]))
    try:
        yield
    except MemoryError:
        if resource.getrlimit(resource.RLIMIT_AS)[0] < memory_bytes:
            raise
        raise OverMemoryLimitError from None
    finally:
        # The answer that memory has run out needs some itself.
        for what, (soft, _) in before.items():
            # An administrator can have lowered the hard limit meanwhile; it cannot be raised again.
            _, hard = resource.getrlimit(what)
            resource.setrlimit(what, (hard if soft == resource.RLIM_INFINITY else _below(what, soft)[0], hard))


def _below(what: int, value: int) -> tuple[int, int]:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    return value, value
