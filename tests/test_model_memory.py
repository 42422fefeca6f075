"""Which errors say that memory ran out: the work is tried again smaller then, and nothing else is wrong."""

from __future__ import annotations

import pytest
import torch

from whisperd.model.helper import is_device_failure
from whisperd.model.memory import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of graphs and pinned memory, which torch does not manage
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
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
    ],
    ids=str,
)
def test_a_device_that_failed_is_no_want_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert is_device_failure(error)


def test_bad_shapes_are_neither() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    assert not is_device_failure(error)
