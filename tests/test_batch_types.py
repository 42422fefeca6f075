"""What a GPU is given to compute, in shapes and types alone: tensors on the meta device have no numbers to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whisper.decoding import DecodingTask
from whisper.model import Conv1d, Linear, Whisper

from tests import models
from tests.test_batch_rules import task_of
from whisperd.model.batch.decoder import Decoder, Routing
from whisperd.model.batch.encoder import Encoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pasts import Pasts
from whisperd.model.batch.pieces import at_once
from whisperd.model.batch.rows import LiveRows
from whisperd.model.batch.rules import apply_rules, rules_of
from whisperd.model.batch.search import Outcome, search_of

META = torch.device("meta")
DIMS = models.MICRO
FEATURES = (DIMS.n_audio_ctx, DIMS.n_audio_state)


@dataclass(frozen=True, slots=True)
class Parts:
    dtype: torch.dtype
    encoder: Encoder
    decoder: Decoder

    def features(self) -> Tensor:
        return torch.empty(FEATURES, dtype=self.dtype, device=META)


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=str)
def parts(request: pytest.FixtureRequest) -> Parts:
    """The parts of a model that was loaded as for a GPU, in each type that a GPU computes in."""
    dtype = cast("torch.dtype", request.param)
    model = Whisper(DIMS)
    for module in model.modules():
        if isinstance(module, Linear | Conv1d | nn.Embedding):
            module.to(dtype)
    for store in (each for module in model.modules() for each in (module._parameters, module._buffers)):
        for name, value in store.items():
            if value is not None and not value.is_sparse:
                store[name] = value.detach().to(META)
    kernels = Kernels(META, dtype)
    return Parts(
        dtype,
        Encoder(model.encoder, kernels, heads=DIMS.n_audio_head),
        Decoder(model.decoder, kernels, heads=DIMS.n_text_head, audio_positions=DIMS.n_audio_ctx),
    )


def spread(rows: int, windows: int) -> Routing:
    """Return a routing of so many rows to fewer windows: beams."""
    return Routing(
        rows=torch.zeros(windows, rows // windows, dtype=torch.int64, device=META),
        places=torch.zeros(rows, dtype=torch.int64, device=META),
    )


class NothingFromTheHost(TorchFunctionMode):
    """Refuses what makes a tensor of the host's numbers: a replay would have those of the recording for ever."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("routing", [None, spread(10, 2)], ids=["greedy", "beams"])
@torch.inference_mode()
def test_a_step_reads_nothing_back(parts: Parts, routing: Routing | None) -> None:
    rows, windows = parts.decoder.row_cache(12), parts.decoder.window_cache(12)
    tokens = torch.zeros(10, dtype=torch.int64, device=META)
    with NothingFromTheHost():
        logits = parts.decoder.step_at(tokens, tokens, rows, windows, routing, length=64, masked=True)
    assert (logits.shape, logits.dtype, logits.device) == ((10, DIMS.n_vocab), torch.float32, META)
    assert {each.dtype for cache in (rows, windows) for each in (*cache.keys, *cache.values)} == {parts.dtype}


@torch.inference_mode()
def test_rules_read_nothing_back(parts: Parts) -> None:
    task: DecodingTask = task_of(Whisper(DIMS))
    rules = rules_of(task, vocabulary=DIMS.n_vocab, device=META)
    rows, numbers = slice(0, 3), torch.zeros(3, dtype=torch.int64, device=META)
    pasts = Pasts(3, META)
    pasts.begin(rows, rules.time_begin)
    pasts.follow(rows, numbers, rules.time_begin)
    logits = torch.empty(3, DIMS.n_vocab, device=META)
    times = pasts.times(rows, rules.time_begin)
    filtered = apply_rules(logits, [rules] * 3, times, timed=numbers.bool(), speech_until=numbers)
    assert [each.shape for each in filtered.best()] == [(3,), (3,)]
    assert filtered.log_probabilities(numbers[:2]).shape == (2, DIMS.n_vocab)


class Distant(Kernels):
    """A GPU whose numbers come when they are asked for. It says one word again and again."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(META, dtype)
        self.launched = 0
        self.read_after: list[int] = []  # how many more choices were launched when one was read

    @property
    def reads_late(self) -> bool:
        return True

    def receive(self, numbers: Tensor) -> Callable[[], Any]:
        if not numbers.shape:  # no speech
            return lambda: 0.25
        self.launched += 1
        number, rows = self.launched, numbers.shape[1]

        def read() -> list[list[float]]:
            self.read_after.append(self.launched - number)
            return [[400.0] * rows, [-0.5] * rows]

        return read


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "best_of": 3}], ids=["greedy", "drawn"])
@torch.inference_mode()
def test_nothing_is_read_before_the_next_step_is_launched(parts: Parts, options: dict[str, Any]) -> None:
    kernels = Distant(parts.dtype)
    live: LiveRows[str] = LiveRows(parts.decoder, kernels, windows=4, rows=4)
    found = dict[str, Outcome]()
    lengths = {"long": 12, "later": 6, "bound": 9}
    tasks = {name: task_of(Whisper(DIMS), sample_len=length, **options) for name, length in lengths.items()}
    for name, task in tasks.items():
        until = 500 if name == "bound" else 0
        live.begin(name, task, search_of(task, 1), parts.features(), speech_until=until)
        found |= dict(live.step())
    while live.count:
        found |= dict(live.step())
    assert {name: len(outcome.candidates[0][0]) for name, outcome in found.items()} == lengths
    assert {outcome.no_speech for outcome in found.values()} == {0.25}
    # The last tokens of a window that is cut off are no step's business: one choice each is read before the next.
    assert len(kernels.read_after) == kernels.launched
    assert kernels.read_after.count(0) == len(lengths)
    assert set(kernels.read_after) <= {0, 1, 2}


@torch.inference_mode()
def test_a_window_is_encoded_and_begun_in_the_type_of_the_model(parts: Parts) -> None:
    features = at_once(parts.encoder.encode(torch.empty(DIMS.n_mels, 3000)))
    assert (features.shape, features.dtype, features.device) == (FEATURES, parts.dtype, META)
    rows, windows = parts.decoder.row_cache(2), parts.decoder.window_cache(2)
    prompt = at_once(
        parts.decoder.begin([1, 2, 3, 4], (0, 3), features, lambda layer, k, v: windows.put(layer, 1, k, v))
    )
    for layer, (keys, values) in enumerate(prompt.said):
        rows.put(layer, 1, keys, values)
    assert (prompt.logits.shape, prompt.logits.dtype) == ((2, DIMS.n_vocab), torch.float32)
    wanted = dict[int, Tensor]()
    logits = at_once(parts.decoder.read_through([1, 2, 3], features, wanted.__setitem__))
    assert (logits.shape, logits.dtype) == ((3, DIMS.n_vocab), torch.float32)
    assert {(each.shape, each.dtype) for each in wanted.values()} == {
        ((DIMS.n_text_head, 3, DIMS.n_audio_ctx), torch.float32)
    }
