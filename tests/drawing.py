"""openai-whisper, made to draw with given numbers: what is drawn can then be compared token by token."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import whisper.decoding
from numpy.typing import NDArray
from whisper.decoding import DecodingTask

from whisperd.model.journal import Strand


@contextmanager
def upstream_draws(seeds: Iterable[int]) -> Iterator[None]:
    """Have each decoding task draw with the numbers that a search of ours has for the next of `seeds`.

    The numbers are all that is ours. Upstream's sampling is replaced by another that is as good: of a row's tokens, in
    their order, the first whose probabilities sum up to more than the row's number.
    """
    run, left, numbers = DecodingTask.run, iter(seeds), iter(list[NDArray[np.float64]]())

    def seeded_run(task: DecodingTask, mel: torch.Tensor) -> Any:
        nonlocal numbers
        generator = np.random.Generator(np.random.PCG64(next(left)))
        numbers = iter(generator.random((task.sample_len, task.n_group)))
        return run(task, mel)

    class Given:
        def __init__(self, logits: torch.Tensor) -> None:
            self._probabilities = logits.double().softmax(-1).numpy()

        def sample(self) -> torch.Tensor:
            pairs = zip(self._probabilities.cumsum(-1), next(numbers), strict=True)
            return torch.tensor([int(np.searchsorted(sums, number, side="right")) for sums, number in pairs])

    with patch.object(DecodingTask, "run", seeded_run), patch.object(whisper.decoding, "Categorical", Given):
        yield


@contextmanager
def seeds_of_runs() -> Iterator[dict[str, list[int]]]:
    """Yield what the windows of runs draw with, by the name of the run's thread, in its order."""
    seeds, seed = defaultdict[str, list[int]](list), Strand.seed

    def remembered(strand: Strand, question: str) -> int:
        seeds[threading.current_thread().name].append(number := seed(strand, question))
        return number

    with patch.object(Strand, "seed", remembered):
        yield seeds
