"""Weights of any size that say a script, whatever they hear: for measuring time where the real ones cannot be had.

Random weights are useless for that: they never end a window, and climb through all temperatures. Here the decoder's
blocks add nothing to what flows past them, and each position's embedding says the script's next token, so a window
costs what a real one costs and has as many tokens as a minute of fast speech has in half of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

TINY = ModelDimensions(80, 1500, 128, 2, 2, 51865, 448, 128, 2, 2)
TURBO = ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 4)
LARGE_V3 = ModelDimensions(128, 1500, 1280, 20, 32, 51866, 448, 1280, 20, 32)

_SEGMENTS, _SEGMENT_S, WORDS = 7, 4, 13  # 106 tokens a window, the end among them
_TOKENS_A_SECOND = 50  # timestamps
_SOT_TOKENS = 3  # start, language, task: the first token of the text is said at the last of them


def write_planted(dims: ModelDimensions, path: Path, *, device: str = "cpu", words: int = WORDS) -> Path:
    """Write such a model as openai-whisper's checkpoints are; `device` makes it (a GPU in seconds, however large)."""
    model = planted(dims, device=device, words=words)
    weights = {name: value.half().cpu() for name, value in model.state_dict().items()}
    part = path.with_suffix(".part")
    torch.save({"dims": vars(dims), "model_state_dict": weights}, part)
    return part.rename(path)


def planted(dims: ModelDimensions, *, device: str = "cpu", words: int = WORDS) -> Whisper:
    """Return a multilingual model that says the same script for every window, at temperature 0, without a prompt.

    The script has so many `words` in each of its segments.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = Whisper(dims)
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
    decoder = model.decoder
    for block in decoder.blocks:
        for last in (block.attn.out, block.cross_attn.out, block.mlp[2]):
            last.weight.data.zero_()
            last.bias.data.zero_()
    embeddings = torch.nn.functional.normalize(torch.randn(dims.n_vocab, dims.n_text_state, device=device), dim=1)
    decoder.token_embedding.weight.data = embeddings
    decoder.positional_embedding.data.zero_()
    for number, token in enumerate(_script(tokenizer, words)):
        decoder.positional_embedding.data[_SOT_TOKENS - 1 + number] = 20 * embeddings[token]
    # Certainty: with log probabilities near zero no window is tried again warmer.
    decoder.ln.weight.data.fill_(4.0)
    return model.eval()


def _script(tokenizer: Tokenizer, words: int) -> Iterator[int]:
    vocabulary = (token for token in range(1000, 20000) if re.fullmatch(" [a-z]{3,9}", tokenizer.decode([token])))
    for number in range(_SEGMENTS):
        yield tokenizer.timestamp_begin + number * _SEGMENT_S * _TOKENS_A_SECOND
        yield from (next(vocabulary) for _ in range(words))
        yield tokenizer.timestamp_begin + (number + 1) * _SEGMENT_S * _TOKENS_A_SECOND
    yield tokenizer.eot
