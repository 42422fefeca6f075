"""The models that tests run on: all of them openai-whisper's real class and code.

- `micro_checkpoint`: planted weights, made in seconds, about 0.2 s a window. Its words mean nothing and depend on
  nothing that was said before: for system tests with many jobs.
- `babbler`: random weights of the same size: whatever is mixed up in a batch, its words are others then.

For what is about words: tiny.en (`whisperd.model.loading.demo_folder`) and base (`bench.weights.base_folder`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from whisper.audio import N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

# Wide enough to keep some hundred planted tokens apart, and nothing more.
MICRO = ModelDimensions(
    n_mels=80,
    n_audio_ctx=1500,
    n_audio_state=128,
    n_audio_head=2,
    n_audio_layer=1,
    n_vocab=51865,
    n_text_ctx=448,
    n_text_state=128,
    n_text_head=2,
    n_text_layer=1,
)
_SCRIPTS = 4  # a window says one of these, whichever its audio favours
_SEGMENT_S = 1.4
_TOKENS_A_SECOND = 50


def micro_checkpoint(folder: Path, *, segments: int = 2, words: int = 5, seed: int = 0) -> Path:
    """Write a checkpoint of the micro model and return its path.

    Each window says one of four scripts of `segments` segments of 1.4 s with `words` words, and is then over. What was
    said before, prompts and the position in the context change nothing. The window's audio has little weight: hums,
    hisses and noise were all seen to say the same script, so what must tell recordings apart takes `babbler`.
    """
    path = folder / "micro.pt"
    torch.save({"dims": vars(MICRO), "model_state_dict": _weights(segments, words, seed)}, path)
    return path


def babbler_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of `babbler` and return its path."""
    path = folder / "babbler.pt"
    torch.save({"dims": vars(MICRO), "model_state_dict": babbler().state_dict()}, path)
    return path


def babbler(layers: int = 1, *, audio_layers: int = 1) -> Whisper:
    """Return a model of random weights: what it says depends on the audio and all tokens before; it ends at times."""
    torch.manual_seed(1)
    model = Whisper(replace(MICRO, n_text_layer=layers, n_audio_layer=audio_layers))
    model.decoder.positional_embedding.data = torch.randn(MICRO.n_text_ctx, MICRO.n_text_state)
    for block in model.decoder.blocks:
        block.cross_attn.out.weight.data *= 8
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
    embeddings = model.decoder.token_embedding.weight.data
    embeddings *= 0.3
    embeddings[tokenizer.timestamp_begin :] *= 1.2
    embeddings[tokenizer.eot] *= 5
    return model.eval()


@cache
def _weights(segments: int, words: int, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights as a checkpoint has them, made once a process: they take seconds, and 14 MB."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine a team of threads waits for itself: 1 s alone, 20 s together
    try:
        model = _planted(segments, words, seed)
    finally:
        torch.set_num_threads(threads)
    return {name: value.half() for name, value in model.state_dict().items()}


def _planted(segments: int, words: int, seed: int) -> Whisper:
    """Plant a table "after this token comes that one" into the decoder's MLP.

    One hidden unit knows one token: it fires when the token's embedding is at hand and writes that of the next.
    Attention within the text is silenced and positions are zero, so nothing else can decide, except the audio: cross
    attention adds a little of one script's first words, and only there do the choices lie close.
    """
    torch.manual_seed(seed)
    model = Whisper(MICRO)
    decoder, block = model.decoder, model.decoder.blocks[0]
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
    table, first_words = _table(tokenizer, segments, words, seed)
    tokens = sorted({token for rule in table for token in (rule[0], *rule[1])})
    assert len(tokens) <= MICRO.n_text_state, "more planted tokens than dimensions: fewer words or segments, please"

    # Planted tokens are orthogonal to each other, and all others too short to be heard.
    embeddings = 0.3 * torch.nn.functional.normalize(torch.randn(MICRO.n_vocab, MICRO.n_text_state), dim=1)
    embeddings[tokens] = torch.linalg.qr(torch.randn(MICRO.n_text_state, len(tokens)))[0].T
    decoder.token_embedding.weight.data = embeddings.clone()
    decoder.positional_embedding.data.zero_()
    decoder.ln.weight.data.fill_(4.0)  # certainty: with log probabilities near zero no window is tried again warmer
    first, second = block.mlp[0], block.mlp[2]
    for part in (block.attn.out.weight, block.attn.out.bias, first.weight, first.bias, second.weight, second.bias):
        part.data.zero_()
    for unit, (token, following) in enumerate(table):
        # The layer norm before made the embedding sqrt(width) long: 10 for the unit's own token, about 0 for others.
        first.weight.data[unit] = 10 * embeddings[token] / MICRO.n_text_state**0.5
        first.bias.data[unit] = -6.0
        second.weight.data[:, unit] = embeddings[following].sum(0)
    times = [token for token, following in table if len(following) > 1]
    _listen(model, embeddings[times], torch.stack([embeddings[choice].sum(0) for choice in first_words]))
    return model.eval()


def _table(
    tokenizer: Tokenizer, segments: int, words: int, seed: int
) -> tuple[list[tuple[int, list[int]]], list[list[int]]]:
    """Return the table (token, what may follow), and the first words of the segments of each script."""
    vocabulary = _plain_words(tokenizer)
    order = torch.randperm(len(vocabulary), generator=torch.Generator().manual_seed(seed)).tolist()
    picked = iter([vocabulary[i] for i in order])
    scripts = [[[next(picked) for _ in range(words)] for _ in range(segments)] for _ in range(_SCRIPTS)]
    stamps = [tokenizer.timestamp_begin + n * round(_SEGMENT_S * _TOKENS_A_SECOND) for n in range(segments + 1)]
    english = tokenizer.to_language_token("en")
    table = [(tokenizer.sot, [english]), (english, [tokenizer.transcribe])]
    table += [(task, [stamps[0]]) for task in (tokenizer.transcribe, tokenizer.translate)]
    for number in range(segments):
        # A time stands there twice, as the end of one segment and the start of the next; the rules for timestamps
        # let only one of both kinds of followers through.
        table.append((stamps[number], [stamps[number], *(script[number][0] for script in scripts)]))
        for script in scripts:
            chain = [*script[number], stamps[number + 1]]
            table += [(token, [following]) for token, following in pairwise(chain)]
    table.append((stamps[segments], [tokenizer.eot]))
    return table, [[segment[0] for segment in script] for script in scripts]


def _plain_words(tokenizer: Tokenizer) -> list[int]:
    return [token for token in range(1000, 20000) if re.fullmatch(" [a-z]{3,9}", tokenizer.decode([token]))]


def _listen(model: Whisper, first_times: torch.Tensor, directions: torch.Tensor) -> None:
    """Make cross attention add a little of one of `directions`, each for another kind of sound.

    The random encoder's features are of one length (its last norm), so what is added stays small for any audio. Some
    calibration sounds show where their middle lies and along which directions they differ.
    """
    cross = model.decoder.blocks[0].cross_attn
    with torch.no_grad():
        silence = model.encoder(log_mel_spectrogram(torch.zeros(N_SAMPLES))[None])[0, -1]
        sounds = model.encoder(torch.stack([log_mel_spectrogram(s, padding=N_SAMPLES - len(s)) for s in _sounds()]))
        loud = sounds[:, :500].mean((0, 1)) - silence
        # Looks at the sounding frames, wherever in the window they are, and at each token a little differently:
        # word times need a difference.
        cross.query.weight.data *= 0.3
        cross.query.bias.data = 4 * loud / loud.norm()
        for part in (cross.key, cross.value, cross.out):
            part.weight.data = torch.eye(MICRO.n_text_state)
        cross.value.bias.data.zero_()
        cross.out.bias.data.zero_()
        asking = model.decoder.blocks[0].cross_attn_ln(first_times)[None].expand(len(sounds), -1, -1)
        heard = cross(asking, sounds)[0].mean(1)
        middle = heard.mean(0)
        components = torch.linalg.svd(heard - middle, full_matrices=False)[2][: len(directions) // 2]
        # Each component speaks for one script with its positive side, for another with its negative side.
        cross.out.weight.data = directions.T @ (0.1 * torch.cat([components, -components]))
        cross.out.bias.data = -(cross.out.weight.data @ middle)


def _sounds() -> Iterator[torch.Tensor]:
    """Return ten seconds each of hum and hiss, of many pitches and colours, in syllables."""
    generator = torch.Generator().manual_seed(1)
    time_s = torch.arange(10 * SAMPLE_RATE) / SAMPLE_RATE
    one_s = time_s[:SAMPLE_RATE]  # whole numbers of hertz: every second sounds like the first
    for pitch_hz in (90, 120, 160, 220, 300, 420):
        for brightness in (0.5, 1.0, 2.0):
            tones = [torch.sin(2 * torch.pi * pitch_hz * n * one_s) / n**brightness for n in range(1, 7000 // pitch_hz)]
            harmonics = torch.stack(tones).sum(0).repeat(10)
            hiss = torch.randn(len(time_s), generator=generator) * 0.02 * brightness
            syllables = torch.sin(2 * torch.pi * (1 + pitch_hz / 100) * time_s).clamp(min=0)
            yield 0.1 * harmonics * syllables + hiss
