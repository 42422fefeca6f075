"""Teacher forcing: our decoder is fed what openai-whisper said, and its logits are compared at every step.

Texts that are equal show that no choice fell the other way; this shows how far each was from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from whisper.decoding import DecodingTask, GreedyDecoder

from whisperd.model.batch.batcher import Request
from whisperd.model.batch.windows import KeptWindows
from whisperd.model.engine import Engine
from whisperd.model.worker import Turn

_TOGETHER = 8  # windows of different length step beside each other, as they do at work


@dataclass(slots=True, kw_only=True)
class _Window:
    mel: Tensor
    prompt: list[int]
    said: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)  # best and second best at each step
    gaps: list[float] = field(default_factory=list)  # by how much


class Choices:
    """Every token that openai-whisper chose greedily, and by how much its logit was above the next best one's."""

    def __init__(self) -> None:
        self.windows: list[_Window] = []

    def listen(self) -> None:
        """Hear of each window from now on, in this process."""
        run, update = DecodingTask.run, GreedyDecoder.update

        def listening_run(task: DecodingTask, mel: Tensor) -> Any:
            if task.options.temperature == 0 and task.options.beam_size is None:
                self.windows.append(_Window(mel=mel[0], prompt=list(task.initial_tokens)))
            return run(task, mel)

        def listening_update(decoder: GreedyDecoder, tokens: Tensor, logits: Tensor, sums: Tensor) -> Any:
            if decoder.temperature == 0:
                window = self.windows[-1]
                gaps, pair = logits[0].topk(2)
                window.gaps.append(float(gaps[0] - gaps[1]))
                window.pairs.append((int(pair[0]), int(pair[1])))
                window.said.append(int(pair[0]))
            return update(decoder, tokens, logits, sums)

        DecodingTask.run, GreedyDecoder.update = listening_run, listening_update


def replay(choices: Choices, engine: Engine) -> str:
    """Return in a line by how much our decoder, fed the same tokens, sees the gaps otherwise."""
    starts = range(0, len(choices.windows), _TOGETHER)
    changes = [change for n in starts for change in _changes(choices.windows[n : n + _TOGETHER], engine)]
    gaps = sorted(gap for window in choices.windows for gap in window.gaps)
    return (
        f"{len(gaps)} greedy choices in {len(choices.windows)} windows, the nearest ones won by "
        f"{', '.join(f'{gap:.1e}' for gap in gaps[:5])}; fed the same tokens our gaps differ by at most "
        f"{max(changes):.1e} (median {sorted(changes)[len(changes) // 2]:.1e}, above 1e-3: "
        f"{sum(change > 1e-3 for change in changes)})"
    )


@torch.inference_mode()
def _changes(windows: list[_Window], engine: Engine) -> Iterator[float]:
    """Feed some windows their tokens side by side; yield the change of each gap."""
    decoder = engine._decoder
    row_cache, window_cache = decoder.row_cache(len(windows)), decoder.window_cache(len(windows))
    for slot, window in enumerate(windows):
        features, read_at = _features(window.mel, engine), (len(window.prompt) - 1,)
        logits = decoder.begin(window.prompt, read_at, features, row_cache, slot, window_cache, slot)
        yield _change(window, 0, logits[0])
    # All that are left step; a window that is over repeats its last token, so that the others keep their slots.
    for step in range(1, max(len(window.said) for window in windows)):
        at = [min(step, len(window.said)) - 1 for window in windows]
        said = [window.said[n] for window, n in zip(windows, at, strict=True)]
        tokens = engine._kernels.send(said)
        positions = [len(window.prompt) + n for window, n in zip(windows, at, strict=True)]
        logits = decoder.step(tokens, positions, row_cache, window_cache, None)
        for slot, window in enumerate(windows):
            if step < len(window.said):
                yield _change(window, step, logits[slot])


def _features(mel: Tensor, engine: Engine) -> Tensor:
    request = Request(Turn(), KeptWindows().window(mel.cpu()), use=lambda features: features)
    features: Tensor = engine._batcher.call(request)
    return features


def _change(window: _Window, step: int, logits: Tensor) -> float:
    best, second = window.pairs[step]
    return abs(float(logits[best] - logits[second]) - window.gaps[step])
