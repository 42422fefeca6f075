"""The aligner: its compiler works beside the first jobs, outlives no process, and works once for all of them.

What waits for it takes little memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from whisper.model import Whisper
from whisper.timing import find_alignment
from whisper.tokenizer import get_tokenizer

from tests import models
from whisperd.model.batch.decoder import Decoder
from whisperd.model.batch.kernels import Kernels
from whisperd.model.batch.pieces import at_once
from whisperd.model.batch.upstream import Aligner
from whisperd.model.worker import Turn

_ENDS_AT_ONCE = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

import torch

from whisperd.model.batch import upstream

go, done = Path(sys.argv[1]), Path(sys.argv[2])

def slow():
    # Stands for the compiler: C++ that a process which ends aborts in. It goes on only once the process is ending.
    while not go.exists():
        time.sleep(0.01)
    done.touch()

upstream.compile_alignment = slow
upstream.Aligner(SimpleNamespace(alignment_heads=torch.ones(1, 1).to_sparse()))
assert not done.exists(), "making it waits for the compiler"
go.touch()
"""


def test_making_it_waits_for_no_compiler_and_the_end_of_the_process_does(tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = [sys.executable, "-c", _ENDS_AT_ONCE, str(tmp_path / "go"), str(done)]
    subprocess.run(command, check=True, timeout=120)
    assert done.exists()


_COMPILES = """
import sys

import torch
from whisper.timing import dtw, dtw_cpu

from whisperd.model.batch.upstream import compile_alignment

compile_alignment()
assert dtw(torch.eye(3)).shape[0] == 2
print(sum(dtw_cpu.stats.cache_hits.values()))
"""


def test_what_one_process_compiled_the_next_one_reads(tmp_path: Path) -> None:
    def hits() -> int:
        environ = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "NUMBA_DISABLE_JIT": "0"}
        command = [sys.executable, "-c", _COMPILES]
        return int(subprocess.run(command, check=True, env=environ, capture_output=True, timeout=120).stdout)

    assert [hits(), hits()] == [0, 1]
    kept = [path for path in (tmp_path / "numba").rglob("*") if path.is_file()]
    for path in kept:
        path.write_bytes(b"")  # what a power cut may leave
    assert kept
    assert hits() == 0


# --- what waits for it ---


class _All:
    """Asked by `find_alignment`, and has all that was read: every head of every layer, all logits."""

    device = torch.device("cpu")

    def __init__(self, model: Whisper, tokens: list[int], features: torch.Tensor, decoder: Decoder) -> None:
        self.dims, self.alignment_heads = model.dims, model.alignment_heads
        self._hooks: list[Any] = []
        attention = SimpleNamespace(register_forward_hook=self._hook)
        self.decoder = SimpleNamespace(blocks=[SimpleNamespace(cross_attn=attention)] * model.dims.n_text_layer)
        self._wanted = dict[int, torch.Tensor]()
        self._logits = at_once(decoder.read_through(tokens, features, self._wanted.__setitem__))

    def _hook(self, hook: Any) -> Any:
        self._hooks.append(hook)
        return SimpleNamespace(remove=lambda: None)

    def __call__(self, mel: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for layer, hook in enumerate(self._hooks):
            hook(None, None, (self._wanted[layer][None],))
        return self._logits[None]


@torch.inference_mode()
def test_what_is_kept_of_a_text_that_waits_is_little_and_enough() -> None:
    """Of large-v3 and 230 tokens 14 MB: all heads of those layers and all logits were 330."""
    model = models.babbler(layers=3)
    heads = torch.zeros(3, 2, dtype=torch.bool)
    heads[[0, 2, 2], [1, 0, 1]] = True
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    for block in model.decoder.blocks:
        block.cross_attn.query.weight.data *= 20  # else every head wants everything alike
    tokenizer = get_tokenizer(True, num_languages=model.num_languages, language="en", task="transcribe")
    text = tokenizer.encode(" The harbour was quiet in the morning. A small boat came in with the tide.")
    decoder = Decoder(model.decoder, Kernels(torch.device("cpu"), torch.float32), heads=2, audio_positions=1500)
    features = torch.randn(1500, models.MICRO.n_audio_state)
    aligner = Aligner(model)
    reading = at_once(aligner.read(tokenizer, text, features, decoder))
    tokens = [*tokenizer.sot_sequence, tokenizer.no_timestamps, *text, tokenizer.eot]
    kept = [getattr(reading, field.name) for field in fields(reading)]
    assert sum(each.untyped_storage().nbytes() for each in kept) <= 4 * (3 * len(tokens) * 1500 + len(text))
    ours = aligner.align(Turn(), reading, tokenizer, text, 2400)
    everything: Any = _All(model, tokens, features, decoder)
    assert ours == find_alignment(everything, tokenizer, text, torch.empty(0), 2400)
    assert len({word.start for word in ours}) > 5, "where all is equal nothing is shown"
