"""Where transcripts go: to stdout, each headed where there are several, or whole into files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from whisperctl.errors import SourceUnreadable
from whisperctl.results import Result, Transcript
from whisperctl.terminal import Screen
from whisperctl.words import safe, to_json

_ENDINGS = {"text": "txt"}


class OutputError(SourceUnreadable):
    """What `-o` names cannot be written (exit 2)."""


def format_transcript(transcript: Transcript, form: str) -> str:
    """Return a transcript in a format of `--format`, ending in a newline unless it is empty."""
    from whisperctl import subtitles

    writers: Mapping[str, Callable[[Transcript], str]] = {
        "text": subtitles.to_text,
        "json": lambda transcript: to_json(transcript.to_wire()) + "\n",
        "srt": subtitles.to_srt,
        "vtt": subtitles.to_vtt,
        "tsv": subtitles.to_tsv,
    }
    return writers[form](transcript)


class Output:
    """Takes the results of one command, one after the other.

    `several` says that more than one may come: each is then headed on stdout, and `path` is a folder.
    Construction checks what can be known before any work is done, and raises `OutputError`.
    """

    def __init__(
        self,
        screen: Screen,
        *,
        form: str,
        path: str | None,
        force: bool,
        wrapped: bool,
        several: bool,
        stems: Sequence[str] = (),
    ) -> None:
        self._screen = screen
        self._form = form
        self._force = force
        self._wrapped = wrapped  # --json: job and transcript in one object
        self._several = several
        self._path = None if path in (None, "-") else Path(str(path))
        self._is_folder = False
        self._taken: set[Path] = set()
        self._headings = 0
        if self._path is not None:
            self._prepare(str(path), stems)

    @property
    def is_live(self) -> bool:
        """True when segments are shown as they come: plain text, on a terminal."""
        return self._path is None and self._form == "text" and not self._wrapped and self._screen.is_terminal

    def _prepare(self, written: str, stems: Sequence[str]) -> None:
        assert self._path is not None
        self._is_folder = os.path.isdir(self._path) or written.endswith("/") or self._several
        if not self._is_folder:
            check_place(self._path, force=self._force)
            return
        try:
            self._path.mkdir(exist_ok=True)
        except FileExistsError:
            raise OutputError(f"-o {self._path} is a file; several transcripts need a folder") from None
        except OSError as error:
            raise _cannot_write(self._path, error) from None
        names: set[Path] = set()
        for stem in stems:
            check_place(self._free_name(stem, names), force=self._force)
        _check_folder(self._path / f"NAME.{self._ending}")  # of jobs, the names are not known yet

    @property
    def _ending(self) -> str:
        return "json" if self._wrapped else _ENDINGS.get(self._form, self._form)

    def head(self, label: str, job_id: int) -> None:
        """Say on stdout whose transcript follows, where there are several."""
        if self._several and self._path is None and not self._wrapped and self._form != "json":
            gap = "\n" if self._headings else ""
            self._headings += 1
            self._screen.data(f"{gap}== {safe(label)} (job {job_id}) ==")

    def write(self, result: Result, *, label: str, stem: str) -> None:
        """Write one result, also of a job without a transcript where `--json` was asked for. Raises `OutputError`."""
        content = self._content(result, label)
        if content is None:
            return
        if self._path is None:
            self._to_stdout(content)
            return
        path = self._free_name(stem, self._taken) if self._is_folder else self._path
        try:
            write_whole(path, content, force=self._force)
        except OutputError as error:
            raise OutputError(f"{error}; 'whisperctl result {result.job.id}' still has it") from None
        self._screen.note(f"wrote {path}")

    def _content(self, result: Result, label: str) -> str | None:
        if self._wrapped:
            transcript = None if result.transcript is None else result.transcript.to_wire()
            return to_json({"job": result.job.to_wire(), "transcript": transcript}) + "\n"
        if result.transcript is None:
            return None
        if self._form == "json" and self._several and self._path is None:
            return to_json({"job": result.job.id, "source": label, **result.transcript.to_wire()}) + "\n"
        return format_transcript(result.transcript, self._form)

    def _to_stdout(self, content: str) -> None:
        if self._form == "text" and not self._wrapped:
            for line in content.split("\n")[:-1]:
                self._screen.text(line)
        elif self._screen.is_terminal:
            for line in content.split("\n")[:-1]:
                self._screen.data("\t".join(map(safe, line.split("\t"))))
        elif content:
            self._screen.data(content.removesuffix("\n"))

    def _free_name(self, stem: str, taken: set[Path]) -> Path:
        """Return the file for a source, and take it; two sources of one name get `name.txt` and `name-2.txt`."""
        assert self._path is not None
        path, count = self._path / f"{stem}.{self._ending}", 1
        while path in taken:
            count += 1
            path = self._path / f"{stem}-{count}.{self._ending}"
        taken.add(path)
        return path


def check_place(path: Path, *, force: bool) -> None:
    """Raise the `OutputError` that `write_whole` would raise, as far as it can be known before there are words."""
    try:
        kind = _kind(path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    if kind in (None, stat.S_IFREG):
        if not force and os.path.lexists(path):
            raise _there_already(path)
        _check_folder(path)
    elif kind == stat.S_IFDIR:
        raise OutputError(f"cannot write {path}: it is a folder")
    elif not os.access(path, os.W_OK):
        raise OutputError(f"cannot write {path}: you are not allowed to")


def _check_folder(path: Path) -> None:
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: nothing can be put into {path.parent}")


def _kind(path: Path) -> int | None:
    """Return which kind of file (`stat.S_IF...`) a path leads to; None where there is none. Raises `OSError`."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL in the name of a source, which says so itself
        return None


def write_whole(path: Path, content: str, *, force: bool) -> None:
    """Write a file whole or not at all, and never over another one without `force`. Raises `OutputError`."""
    data = content.encode("utf-8", "backslashreplace")
    # A short name, not made of the file's: that may be as long as a name can be.
    temporary = path.with_name(f".whisperctl.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        if _kind(path) not in (None, stat.S_IFREG):
            path.write_bytes(data)  # /dev/null, a named pipe: nothing there to keep whole
            return
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(temporary, path)
            else:
                _move_to_new(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except FileExistsError:
        raise _there_already(path) from None
    except OSError as error:
        raise _cannot_write(path, error) from None


def _move_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # fails where the name is taken, unlike a rename
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links: as near as it gets
            raise FileExistsError(path) from None
        os.rename(temporary, path)


def _there_already(path: Path) -> OutputError:
    return OutputError(f"{path} is there already; --force writes over it")


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}")
