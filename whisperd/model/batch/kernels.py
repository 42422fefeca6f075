"""The one place where a CPU and a GPU compute differently: layouts, types, what is worth its time, memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whisperd.model.batch.layers import Linear, SettlingLinear, with_onednn

log = logging.getLogger("whisperd.model")

_WAITS_FOR_MEMORY = 16  # rows of a layer; with more it waits for the processor


class Kernels:
    """Makes the layers of a model for one device.

    `compute` is the type of matrices and caches of weights, `stream` the type of what flows between layers and of
    attention. They differ on a CPU in bfloat16 alone: its matrix products are twice as fast as float32's, but its
    attention of one query 3.4 times as slow.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.compute = dtype
        self.stream = torch.float32 if device.type == "cpu" else dtype
        self._packs = device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._unsettled: list[SettlingLinear] = []
        # Where all recordings are made, one for life: torch keeps memory of cuBLAS's for each that was multiplied on.
        self._recording_stream: torch.cuda.Stream | None = None
        self._recording_pool: Any = None  # their own memory, while there are any
        if device.type == "cuda":
            _choose_libraries()

    @property
    def most_windows(self) -> int:
        """How many windows at once are worth it: with more a step takes longer by as much as it does more."""
        return 8 if self.device.type == "cpu" else 32

    @property
    def encodes_beside_steps(self) -> bool:
        """True where an encoder block between steps costs the rows little: a GPU waits for launches in both."""
        return self.device.type != "cpu"

    @property
    def rows_multiple(self) -> int:
        """Of what the rows of a large matrix should be a multiple: tensor cores want a whole number of tiles."""
        return 1 if self.device.type == "cpu" else 64

    def zeros(self, *shape: int) -> Tensor:
        """Return a tensor for what flows between layers; on a CPU its memory is taken when it is first written."""
        if self.device.type == "cpu":  # where the stream is always float32; torch writes its zeros at once
            return torch.from_numpy(np.zeros(shape, np.float32))
        return torch.zeros(shape, dtype=self.stream, device=self.device)

    def give_back(self) -> None:
        """Let others have the memory of tensors that are gone."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # after a recording that failed torch may take it for unfinished
                torch.cuda.empty_cache()

    def linear(self, weight: Tensor, bias: Tensor | None, *, rows: int) -> Linear:
        """Return the layer `x -> x @ weight.T + bias`; `rows` is how many rows x mostly has."""
        weight = weight.detach().to(self.device, self.compute).contiguous()
        bias = None if bias is None else bias.detach().to(self.device, self.compute).contiguous()
        if not self._packs:
            return lambda x: F.linear(x, weight, bias)
        if self.compute is not torch.float32:
            layer = with_onednn(weight, bias, rows=rows)
            return lambda x: layer(x.to(self.compute)).float()
        if rows > _WAITS_FOR_MEMORY:
            return with_onednn(weight, bias, rows=rows)
        settling = SettlingLinear(weight, bias, rows=rows)
        self._unsettled.append(settling)
        return settling

    def settle(self) -> None:
        """Lay out anew what works without it, for faster steps: for a thread of its own.

        For a second or more of one core; steps before it take up to three times as long. Reading weights in float16
        makes steps of tiny.en with one row 1.27 times as fast as oneDNN's layout does, with eight rows 1.05 times; with
        more than some 20 (beams of many windows) the layers take longer by up to a quarter.
        """
        while self._unsettled:
            try:
                self._unsettled.pop(0).settle()
            except (RuntimeError, MemoryError) as error:  # it works on as it is
                log.warning("model: a layer stays as it lies, steps take longer error=%s", error)

    @property
    def replays_steps(self) -> bool:
        """True where a step is hundreds of launches, and launching takes longer than computing."""
        return self.device.type == "cuda"

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what does the same work on the same tensors again, in one launch. Nothing is computed yet.

        Raises `RuntimeError` for work that cannot be recorded, or when memory runs out.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            if self._recording_stream is None:
                self._recording_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            if self._recording_pool is None:
                self._recording_pool = torch.cuda.graph_pool_handle()
            stream, pool = self._recording_stream, self._recording_pool
            # The outer one, because a recording that fails leaves its stream the current one. Only what this thread
            # does must fit into a recording: others may ask how much memory is free.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                work()
        return graph.replay

    def forget_recordings(self) -> None:
        """Have the next recordings take memory of their own: the pool of those that go may not be used again.

        Waits until none is being replayed, so that they can go.
        """
        if self._recording_stream is not None:
            with suppress(RuntimeError):  # the next launch says so
                self._recording_stream.synchronize()
                torch.cuda.current_stream(self.device).synchronize()
        self._recording_pool = None

    def send(self, numbers: Sequence[Any] | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the host's numbers as a tensor on the device, without waiting for it."""
        if self.device.type != "cuda":
            return torch.as_tensor(numbers, dtype=dtype, device=self.device)
        return torch.as_tensor(numbers, dtype=dtype).pin_memory().to(self.device, non_blocking=True)

    def receive(self, numbers: Tensor) -> Callable[[], Any]:
        """Return what gives a tensor's numbers to the host, and waits for nothing that is launched from now on."""
        if self.device.type != "cuda":
            return numbers.tolist
        here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        # Who waits for it sleeps: the device has the next step to do.
        arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(self.device))

        def read() -> Any:
            arrived.synchronize()
            return here.tolist()

        return read

    @property
    def reads_late(self) -> bool:
        """True where a step is launched before the tokens of the last one are read: the device waits for nobody.

        A row that has ended steps once more for nothing, which is a loss where launching takes less than computing.
        """
        return self.device.type == "cuda"

    @property
    def turns_windows(self) -> bool:
        """True where `listen` wants keys and values with the positions last: a CPU reads them 1.5 times as fast so."""
        return self.device.type == "cpu"

    def listen(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention of few queries `(..., queries, width)` over many positions, none of them masked.

        PyTorch's own attention on a CPU is made for as many queries as keys: for one it takes 2.1 ms a layer (8 windows
        of tiny.en), two products and a softmax take 1.1.
        """
        if not self.turns_windows:
            return F.scaled_dot_product_attention(query, keys, values)
        scores: Tensor = (query * query.shape[-1] ** -0.5) @ keys
        return scores.softmax(-1) @ values.transpose(-1, -2)

    def norm(self, norm: nn.LayerNorm) -> Linear:
        """Return the layer norm, computed in float32 as openai-whisper does."""
        shape, eps = norm.normalized_shape, norm.eps
        weight, bias = norm.weight.detach().to(self.device), norm.bias.detach().to(self.device)
        return lambda x: F.layer_norm(x.float(), shape, weight, bias, eps).to(x.dtype)


def _choose_libraries() -> None:
    """Set what torch takes of CUDA's libraries, for the whole process. No device is asked."""
    # On Hopper and Blackwell torch would ask cuDNN first for attention, which makes a plan for each new shape and keeps
    # it for ever: tens of milliseconds of the host, for nearly every prompt and, where steps are not replayed, token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Convolutions in float32, the encoder's two, would be rounded to TF32 as matrices are not.
    torch.backends.cudnn.allow_tf32 = False
