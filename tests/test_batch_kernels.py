"""What CUDA is asked for, as far as that shows without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from whisperd.model.batch.kernels import Kernels

CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def libraries() -> Iterator[None]:
    """What torch takes of CUDA's libraries, as it was before and is again."""
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True


def test_attention_is_not_cudnns_which_plans_each_shape_and_convolutions_do_not_round() -> None:
    assert torch.backends.cuda.cudnn_sdp_enabled(), "torch's own choice is another"
    assert torch.backends.cudnn.allow_tf32
    Kernels(torch.device("cpu"), torch.float32)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    Kernels(CUDA, torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32


class Stream:
    """Stands in for torch's."""

    waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_recordings_have_new_memory_each_time_and_one_stream_for_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each stream that was ever multiplied on torch keeps memory of cuBLAS's: 32 MiB on an H100."""
    made: list[tuple[object, Stream]] = []

    @contextmanager
    def graph(recorded: object, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        made.append((pool, stream))
        yield

    driver = {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Stream": Stream,
        "current_stream": lambda device: Stream(),
        "device": lambda device: nullcontext(),
        "graph": graph,
        "graph_pool_handle": object,
        "stream": lambda stream: nullcontext(),
    }
    for name, stand_in in driver.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    kernels = Kernels(CUDA, torch.float16)
    kernels.forget_recordings()  # there are none
    for _ in range(2):
        kernels.record(lambda: None)
    kernels.forget_recordings()
    kernels.record(lambda: None)
    (first, stream), (second, _), (third, _) = made
    assert first is second
    assert third is not first, "the memory of recordings that are gone may not be recorded into again"
    assert {id(each) for _, each in made} == {id(stream)}
    assert stream.waited == 1
