"""How much may be taken of a device, how many windows that is, and which errors say that there was no more.

Work whose memory ran out is tried again smaller, and nothing else is wrong.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from whisper.model import Linear

from whisperd.model.batch.kernels import Kernels
from whisperd.model.engine import Engine
from whisperd.model.helper import is_device_failure
from whisperd.model.loading import load
from whisperd.model.memory import free_bytes, is_out_of_memory, limit_cuda, windows_that_fit

MB = 2**20
CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Cuda:
    """What torch says of a GPU of 24 GB, of which others have 4 and this process 3, and what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[float, torch.device]] = []

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        assert device == GPU
        return SimpleNamespace(total_memory=24_000 * MB)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert device == GPU
        return 17_000 * MB, 24_000 * MB

    def memory_reserved(self, device: torch.device) -> int:
        assert device == GPU
        return 3_000 * MB

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.told.append((fraction, device))


@pytest.mark.parametrize(
    ("limit_mb", "free_mb"),
    [
        (0, 17_000),
        (8_000, 5_000),  # what the weights have counts
        (22_000, 17_000),  # others have the rest
        (2_000, -1_000),
    ],
)
def test_what_is_free_of_a_gpu_is_what_nobody_has_within_the_limit(limit_mb: int, free_mb: int) -> None:
    assert free_bytes(GPU, limit_mb=limit_mb, cuda=Cuda()) == free_mb * MB


def test_what_is_free_for_a_cpu_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24576000 kB\nMemFree:         1000 kB\nMemAvailable:    8000000 kB\n")
    for limit_mb in (0, 100):  # which is a GPU's
        assert free_bytes(CPU, limit_mb=limit_mb, meminfo=meminfo) == 8_000_000 * 1024
    meminfo.write_text("MemTotal:       24576000 kB\n")
    assert free_bytes(CPU, meminfo=meminfo) == 0
    assert free_bytes(CPU) > 0, "of this machine"


@pytest.mark.parametrize(
    ("device", "limit_mb", "told"),
    [(GPU, 0, []), (CPU, 6_000, []), (GPU, 6_000, [(0.25, GPU)]), (GPU, 99_000, [(1.0, GPU)])],
)
def test_torch_is_told_the_limit_of_a_gpu(
    device: torch.device, limit_mb: int, told: list[tuple[float, torch.device]]
) -> None:
    cuda = Cuda()
    limit_cuda(device, limit_mb, cuda=cuda)
    assert cuda.told == told


@pytest.mark.parametrize(
    ("free_mb", "most", "windows"),
    [
        # large-v3's windows of 246 MB and rows of 73, two a window; 512 MB are for work, and a fifth for others.
        (100_000, 32, 32),
        (8_000, 32, 14),
        (8_000, 8, 8),
        (2_115, 32, 2),
        (2_105, 32, 1),
        (100, 32, 1),
        (0, 32, 1),
        (-1_000, 32, 1),
    ],
)
def test_as_many_windows_as_fit_beside_an_interactive_one_and_one_at_least(
    free_mb: int, most: int, windows: int
) -> None:
    assert windows_that_fit(free_mb * MB, window_bytes=246 * MB, row_bytes=73 * MB, most=most) == windows


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of graphs and pinned memory, which torch does not manage
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN's convolution
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_told_from_a_device_that_failed(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    ],
    ids=str,
)
def test_a_device_that_failed_is_no_want_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert is_device_failure(error, torch.device("cpu"))


BAD_SHAPES = RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_bad_shapes_are_neither() -> None:
    assert not is_out_of_memory(BAD_SHAPES)
    assert not is_device_failure(BAD_SHAPES, torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "asked"), [("cpu", []), ("cuda:0", [torch.device("cuda:0")]), ("cuda:1", [torch.device("cuda:1")])]
)
def test_whether_the_gpu_has_failed_that_gpu_is_asked_and_without_one_none(
    device: str, asked: list[torch.device]
) -> None:
    heard: list[torch.device] = []

    def fails(which: torch.device) -> None:
        heard.append(which)
        raise RuntimeError("out of order")

    assert is_device_failure(BAD_SHAPES, torch.device(device), ask=fails) == bool(asked)
    assert heard == asked
    assert not is_device_failure(BAD_SHAPES, torch.device(device), ask=lambda which: (1, 2))
    assert not is_device_failure(ValueError("not torch's"), torch.device(device), ask=fails)


def test_weights_that_were_laid_out_anew_are_given_back_before_free_memory_is_counted(
    micro: Path, tmp_path: Path
) -> None:
    """torch keeps what it freed on a GPU, and would count it as taken."""
    model = load(str(micro), cache_dir=tmp_path, device="cpu", dtype="auto", on_step=lambda: None, environ={})
    left: list[int] = []

    class Seen(Kernels):
        def give_back(self) -> None:
            left.append(sum(each.weight.numel() for each in model.whisper.modules() if isinstance(each, Linear)))

    Engine(model, on_step=lambda: None, release=True, kernels=Seen(model.device, model.dtype))
    assert left == [0]
