"""The caches of keys and values: what they cost before anybody speaks."""

from __future__ import annotations

import psutil
import pytest
import torch

from whisperd.model.batch.caches import Cache
from whisperd.model.batch.kernels import Kernels


@pytest.mark.parametrize("turned", [False, True])
def test_a_slot_takes_memory_when_it_is_written(turned: bool) -> None:
    def resident_mb() -> float:
        return float(psutil.Process().memory_info().rss) / 1e6

    before = resident_mb()
    cache = Cache(
        layers=1,
        heads=8,
        length=1500,
        width=64,
        slots=40,  # 246 MB of keys and values
        zeros=Kernels(torch.device("cpu"), torch.float32).zeros,
        turned=turned,
    )
    assert resident_mb() - before < 60
    assert not cache.keys[0].any()
    assert not cache.values[0].any()
    cache.keys[0].fill_(1)
    assert resident_mb() - before > 100, "and this is how it would be seen"
