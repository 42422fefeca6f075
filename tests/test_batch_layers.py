"""The layers of few rows: what they are laid out for anew, and that it changes nothing."""

from __future__ import annotations

import threading
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.layers import Linear, SettlingLinear

FBGEMM = "quantized::linear_dynamic_fp16"
ONEDNN = "mkldnn::_linear_pointwise"
needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has FBGEMM on x86 with AVX2 only"
)


def published(rows: int = 1500, columns: int = 384) -> tuple[Tensor, Tensor]:
    """Return a matrix as it is published, in float16, and a bias that float16 has not."""
    return (torch.randn(rows, columns) / 20).half().float(), torch.randn(rows) / 3


def operations(layer: Linear, x: Tensor) -> Counter[str]:
    """Return which operations of the two libraries a call takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return Counter(event.name for event in profile.events() if event.name in (FBGEMM, ONEDNN))


@needs_fbgemm
@pytest.mark.parametrize("rows", [1, 5, 8, 40, 300])
@pytest.mark.parametrize("biased", [True, False])
@torch.inference_mode()
def test_published_weights_are_read_in_half_the_bytes_and_say_the_same(rows: int, biased: bool) -> None:
    weight, bias = published()
    x, given = torch.randn(rows, weight.shape[1]), bias if biased else None
    layer = SettlingLinear(weight, given, rows=8)
    wanted = F.linear(x.double(), weight.double(), None if given is None else given.double())
    assert (layer(x) - wanted).abs().max() < 1e-5
    assert not operations(layer, x)
    layer.settle()
    assert (layer(x) - wanted).abs().max() < 1e-5
    assert operations(layer, x) == {FBGEMM: 1}


@pytest.mark.parametrize("where", [0, 1499])
@torch.inference_mode()
def test_a_weight_that_float16_has_not_is_not_rounded(where: int) -> None:
    weight, _ = published()
    weight[where, 7] = 1 + 2**-12
    layer = SettlingLinear(weight, None, rows=8)
    x = torch.zeros(1, 384)
    x[0, 7] = 1
    layer.settle()
    assert layer(x)[0, where].item() == 1 + 2**-12
    assert operations(layer, x) == {ONEDNN: 1}


@torch.inference_mode()
def test_an_infinite_weight_stays_infinite() -> None:
    weight, _ = published()
    weight[3, 7] = torch.inf
    layer = SettlingLinear(weight, None, rows=8)
    layer.settle()
    assert weight[3, 7] == torch.inf, "FBGEMM would make it 65504, in place"
    assert layer(torch.ones(1, 384))[0, 3] == torch.inf


@torch.inference_mode()
def test_a_layer_that_settles_answers_meanwhile_and_lets_go_of_its_weight() -> None:
    weight, bias = published(20_000)
    layer, x = SettlingLinear(weight, bias, rows=8), torch.randn(8, 384)
    wanted, held = layer(x), weakref.ref(weight)
    thread = threading.Thread(target=torch.inference_mode()(layer.settle))
    thread.start()
    while thread.is_alive():
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert operations(layer, x).total() == 1
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    del weight
    assert held() is None


@torch.inference_mode()
def test_a_layer_that_cannot_be_laid_out_works_on_and_others_settle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels(torch.device("cpu"), torch.float32)
    weight, bias = published()
    layers = [kernels.linear(weight, bias, rows=8) for _ in range(2)]

    def full() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(layers[0], "settle", full)
    kernels.settle()
    x = torch.randn(8, 384)
    assert [operations(layer, x).total() for layer in layers] == [0, 1]
    assert torch.allclose(layers[0](x), layers[1](x), atol=1e-5)
    assert "a layer stays as it lies" in caplog.text


@torch.inference_mode()
def test_all_layers_of_few_rows_settle_and_no_other() -> None:
    kernels = Kernels(torch.device("cpu"), torch.float32)
    weight, bias = published()
    few, many = kernels.linear(weight, bias, rows=8), kernels.linear(weight, bias, rows=1500)
    assert isinstance(few, SettlingLinear)
    assert not isinstance(many, SettlingLinear)
    kernels.settle()
    x = torch.randn(8, 384)
    assert operations(few, x).total() == 1
    kernels.settle()  # nothing is left: no error
    assert torch.allclose(few(x), many(x), atol=1e-5)
