"""A run's journal: what the model answered, call by call, so that a run that was cut off goes on where it was.

`whisper.transcribe` is a function of the audio's length, the options and the model's answers (windows, the language,
word times) and of nothing else. Given the same answers again it arrives in the same state, without the model.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgpack
import torch
from whisper.version import __version__ as WHISPER_VERSION

from whisperd import __version__
from whisperd.model.loading import LoadedModel

_VALUES_A_WEIGHT = 64


class VoidJournal(Exception):
    """The journal is not that of this work: the run must begin anew."""


class Journal:
    """The answers of one run. `recorded` ones, of earlier starts, are given again; new ones go to `record`.

    A strand is a sequence of calls that one thread makes: a run has one, or one for each window in mode fast. `record`
    is called from the strands' threads.
    """

    def __init__(self, recorded: Iterable[bytes], record: Callable[[bytes], None]) -> None:
        self._record = record
        self._recorded: dict[str, deque[tuple[int, Any]]] = defaultdict(deque)
        for entry in recorded:
            try:
                name, check, answer = msgpack.unpackb(entry)
                self._recorded[name].append((check, answer))
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise VoidJournal(f"an entry cannot be read: {error!r}") from None

    def strand(self, name: str) -> Strand:
        """Return the strand of this name. Names must be the same at every start of the run."""
        return Strand(name, self._recorded[name], self._record)


class Strand:
    """One thread's calls, in their order."""

    def __init__(self, name: str, recorded: deque[tuple[int, Any]], record: Callable[[bytes], None]) -> None:
        self._name, self._recorded, self._record = name, recorded, record
        self._calls = 0

    def seed(self, question: str) -> int:
        """Return the seed for the call to come: the same recording and options draw the same, also when resumed."""
        return zlib.crc32(f"{self._calls} {question}".encode())

    def ask(self, question: str, answer: Callable[[], Any]) -> Any:
        """Return what was recorded for this call, or else what `answer` returns, once that is on its way to the disk.

        Answers are plain values. New ones are packed and unpacked too: whether an answer is given for the first time
        or again makes no difference to who asked. Raises `VoidJournal` when the record is of another question.
        """
        check = zlib.crc32(question.encode())
        if self._recorded:
            recorded_check, value = self._recorded.popleft()
            if recorded_check != check:
                raise VoidJournal(f"call {self._calls} of strand {self._name!r} is another one than that recorded")
        else:
            entry = msgpack.packb([self._name, check, answer()])
            self._record(entry)
            value = msgpack.unpackb(entry)[2]
        self._calls += 1
        return value


def read_journal(path: Path, count: int) -> list[bytes]:
    """Return the `count` entries that the daemon laid out in a file. Raises `VoidJournal` when they are not there."""
    if not count:
        return []
    try:
        with path.open("rb") as file:
            entries = list(msgpack.Unpacker(file, max_buffer_size=0))
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise VoidJournal(f"it cannot be read: {error!r}") from None
    if len(entries) != count or not all(isinstance(entry, bytes) for entry in entries):
        raise VoidJournal(f"it holds {len(entries)} entries instead of {count}")
    return entries


def fingerprint(model: LoadedModel) -> str:
    """Return what tells this model's answers from another's: versions, device, number format and the weights.

    Of each weight some values only: training changes all of them, and gigabytes need not be hashed at each load.
    """
    dims = model.whisper.dims
    digest = hashlib.sha256(
        repr(
            (
                *(__version__, WHISPER_VERSION, str(torch.__version__), model.device.type, model.dtype_name),
                *(sorted(vars(dims).items()), model.whisper.alignment_heads.indices().tolist()),
            )
        ).encode()
    )
    for name, weight in model.whisper.state_dict().items():
        digest.update(name.encode())
        step = max(1, weight.numel() // _VALUES_A_WEIGHT)
        digest.update(weight.reshape(-1)[::step][:_VALUES_A_WEIGHT].float().cpu().numpy().tobytes())
    return digest.hexdigest()
