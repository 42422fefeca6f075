"""What the decoder's process may use: it reads files that anybody made, with libraries that have had holes."""

from __future__ import annotations

import math
import os
import resource
import time

_MIB = 2**20
# The decoder looks at its CPU time between packets. This much later the kernel ends a process that never got there.
_BACKSTOP_S = 30


def limit_process(*, memory_mb: int, max_file_bytes: int) -> None:
    """Set the limits that hold for the whole life of the process: memory, size of files, no core dumps.

    Memory is counted from here on: libraries, stacks and the allocator's reserves take 150 to 300 MiB of address space
    before the first file is opened, and few of them are ever touched.
    """
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    _lower(resource.RLIMIT_AS, pages * os.sysconf("SC_PAGE_SIZE") + memory_mb * _MIB)
    _lower(resource.RLIMIT_FSIZE, max_file_bytes)
    # A core would hold somebody's recording.
    _lower(resource.RLIMIT_CORE, 0)


def limit_cpu(cpu_s: float) -> None:
    """Let the kernel end this process (SIGXCPU) a while after it has used `cpu_s` more CPU seconds.

    RLIMIT_CPU counts from the start of a process that does many jobs: each job raises the soft limit for itself.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + cpu_s) + _BACKSTOP_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _lower(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))
