"""What the bench on a GPU works with: the device, weights of real dimensions, tiny.en, speech."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from whisper.model import ModelDimensions

from bench import planted
from bench.daemon import Failed
from bench.recordings import TEXT, Spoken, read_spoken, repeat_sample, speak_sentences
from bench.report import Row
from whisperd.model.loading import choose_device, demo_folder
from whisperd.protocol.errors import WhisperdError

SIZES: Mapping[str, ModelDimensions] = {"turbo": planted.TURBO, "large-v3": planted.LARGE_V3}
# What planted weights want: a prompt would move their script.
PLANTED_OPTIONS: Mapping[str, Any] = {"language": "en", "condition_on_previous_text": False, "temperature": 0}
# Eight recordings of one or two windows: 280 s.
SPOKEN_S = (38, 27, 45, 33, 41, 29, 36, 31)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where is measured, and on what. `folder` is shared by all subjects: weights that one made the next one finds.

    `quick`: small dimensions and hardly anything to do, to see that the measuring works. `tiny_en` and `speech` stand
    in for the demo's package and for flite.
    """

    folder: Path
    device: torch.device
    quick: bool
    tiny_en: Path | None = None
    speech: Path | None = None
    peer_python: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: int, quick: int) -> int:
        """Return how often (or how much), by the length of the run."""
        return quick if self.quick else full

    def finish(self) -> None:
        """Wait until the device has done all that it was given. Not while an engine works: it may be recording."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def now(self) -> float:
        """Return the time in seconds at which the device has done what it was given."""
        self.finish()
        return time.perf_counter()

    def new_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def timed(self, row: Row) -> Row:
        """Return a row about time, without a verdict where it would mean nothing."""
        return replace(row, goal="", met=None) if self.quick else row

    def planted(self, size: str) -> str:
        """Return a checkpoint of planted weights, made by whoever asks first."""
        path = self.folder / f"{'small' if self.quick else size}.pt"
        if not path.exists():
            dims, words = (planted.TINY, 2) if self.quick else (SIZES[size], planted.WORDS)
            planted.write_planted(dims, path, device=str(self.device), words=words)
            if self.on_gpu:
                torch.cuda.empty_cache()  # else it would not count as free
        return str(path)

    def spoken_model(self) -> str:
        """Return tiny.en, or where hardly anything is to be done a small model. Raises `Failed` where it is missing.

        What was cut into pieces is put together.
        """
        if self.tiny_en is None:
            if self.quick:
                from tests.models import micro_checkpoint

                return str(micro_checkpoint(self.new_folder("micro")))
            try:
                return str(demo_folder())
            except WhisperdError as error:
                raise Failed(f"{error.message}, or give --tiny-en PATH") from None
        given = self.tiny_en
        if not given.exists():
            raise Failed(f"there is no {given}")
        if not given.is_dir() or not any(given.glob("*.[0-9][0-9]")):
            return str(given)
        whole = self.new_folder("tiny.en")
        for part in sorted(given.iterdir()):
            with (whole / (part.stem if part.suffix[1:].isdigit() else part.name)).open("ab") as file:
                file.write(part.read_bytes())
        files = list(whole.iterdir())
        return str(files[0] if len(files) == 1 else whole)

    def spoken_options(self, **options: Any) -> dict[str, Any]:
        """Return the options for that model, besides these."""
        return {**(PLANTED_OPTIONS if self.quick else {}), **options}

    def recordings(self) -> tuple[Sequence[Spoken], str]:
        """Return speech, and what it is: from `speech`, spoken here, or else the shipped sample again and again."""
        if self.speech is not None:
            found = read_spoken(self.speech)[: len(SPOKEN_S)]
            return found, f"{len(found)} recordings"
        if self.quick:
            return [repeat_sample(1, 0)], "the sample"
        try:
            return list(speak_sentences(TEXT.read_text(), SPOKEN_S)), f"{len(SPOKEN_S)} recordings"
        except Failed:
            some = [repeat_sample(length_s, seed) for seed, length_s in enumerate(SPOKEN_S)]
            return some, f"{len(some)} recordings of the sample again and again, for want of --speech"


def place_of(device: str, **fields: Any) -> Place:
    """Return a place on `cuda`, `cuda:N`, `cpu` or `auto`. Raises `WhisperdError` where there is no such device."""
    return Place(device=choose_device(device), **fields)
