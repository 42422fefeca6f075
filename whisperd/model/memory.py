"""Memory of the device: how much may be taken, how many windows that is, and whether it was what ran out."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import Any

import torch

_MB = 2**20
# glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT_MB, _KEPT_MB = 32, 128
# The CPU's allocator says it in words only, and so does what takes a GPU's memory by itself: graphs, cuBLAS and cuDNN.
# cuBLAS cannot begin without memory; a convolution of cuDNN's for which there is none finds no way to be computed.
_OUT = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)
_SHARE = 0.8  # of what is free: others come and go
_WORKING_BYTES = 512 * _MB  # what one encoder block and the logits of all rows take for a moment


def is_out_of_memory(error: BaseException) -> bool:
    """True when memory of the device or of the machine ran out, and nothing worse happened."""
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(words in str(error) for words in _OUT)


def keep_freed_memory() -> None:
    """Have the C allocator keep up to 128 MB of what layers free, in one arena for all threads.

    By itself glibc gives a layer's 9 MB back to the kernel each time and has every page of it zeroed again: 80,000 page
    faults for 26 windows, 30 so. And it has an arena for each few threads, that all grow to what one job ever took.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_MB * _MB)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_MB * _MB)


def forget_pages(read: torch.Tensor) -> None:
    """Take a tensor of a mapped file, which has been read, out of this process's memory; the file has it still.

    For mapped files alone that nobody wrote to: what lies elsewhere would be zeros.
    """
    whole = read.untyped_storage()
    end = min(read.data_ptr() + read.nbytes, whole.data_ptr() + whole.nbytes())
    first, last = -(-read.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def limit_cuda(device: torch.device, limit_mb: int, *, cuda: Any = torch.cuda) -> None:
    """Let this process take so much of a GPU at most (0: all of it); beyond it torch says out of memory."""
    if device.type == "cuda" and limit_mb:
        total = cuda.get_device_properties(device).total_memory
        cuda.set_per_process_memory_fraction(min(1.0, limit_mb * _MB / total), device)


def free_bytes(
    device: torch.device, *, limit_mb: int = 0, cuda: Any = torch.cuda, meminfo: Path = Path("/proc/meminfo")
) -> int:
    """Return what may still be taken: of the GPU, within the limit, or of the machine, which has none."""
    if device.type == "cuda":
        free, _ = cuda.mem_get_info(device)
        left = limit_mb * _MB - cuda.memory_reserved(device)
        return int(min(free, left) if limit_mb else free)
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def windows_that_fit(free: int, *, window_bytes: int, row_bytes: int, most: int) -> int:
    """Return how many windows may be decoded at once, besides one for interactive work: 1 to `most`.

    Reckoned with two rows a window. More, for beams, are taken when they are wanted; want of memory is survived.
    """
    fitting = int((free * _SHARE - _WORKING_BYTES) // (window_bytes + 2 * row_bytes)) - 1
    return max(1, min(most, fitting))
