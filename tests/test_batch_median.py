"""The median that word alignment takes is upstream's, number by number."""

from __future__ import annotations

import pytest
import torch
from whisper import timing

from whisperd.model import substitutes
from whisperd.model.batch.median import median_of_seven

upstream = substitutes._upstream_median_filter


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 3, 8), (6, 90, 1500), (3, 1, 400), (1, 40, 33)])
def test_the_medians_are_those_of_sorting(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x[..., ::3] = x[..., :1].clone()  # ties
    assert torch.equal(median_of_seven(x), upstream(x, 7))


def test_what_it_cannot_do_is_upstreams() -> None:
    substitutes.install()
    broken = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(1))
    broken[1, 2, 20] = torch.nan
    for x, width in ((torch.randn(2, 3, 3), 7), (torch.randn(2, 3, 20), 5), (torch.randn(3, 20), 7), (broken, 7)):
        assert torch.equal(timing.median_filter(x, width).nan_to_num(9), upstream(x, width).nan_to_num(9))
