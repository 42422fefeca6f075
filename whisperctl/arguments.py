"""What a SOURCE on the command line means: a file, standard input, a YouTube id or an address."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whisperctl.client import Client
from whisperctl.errors import SourceUnreadable
from whisperctl.render import source_label
from whisperctl.uploading import Progress
from whisperd.protocol.jobs import Job
from whisperd.protocol.messages import VIDEO_ID

STDIN = "-"
_MAX_STEM_BYTES = 200  # of the 255 that a file's name may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One SOURCE. `kind` is `file`, `stdin`, `video` or `url`; `label` is how messages call it."""

    kind: str
    text: str

    @property
    def label(self) -> str:
        """What the user wrote, in a form that people recognise."""
        return "standard input" if self.kind == "stdin" else self.text

    @property
    def stem(self) -> str:
        """The name of an output file for this source, without its ending."""
        match self.kind:
            case "file":
                return Path(self.text).stem
            case "stdin":
                return "stdin"
        return file_stem(self.text)

    @property
    def is_also_a_file(self) -> bool:
        """True for an id that is the name of a file here, too."""
        return self.kind == "video" and os.path.exists(self.text)  # False, too, where one may not look

    def submit(self, client: Client, *, on_upload: Progress, **request: Any) -> Job:
        """Submit it; raises as `Client.submit` does."""
        match self.kind:
            case "video":
                return client.submit_video(self.text, **request)
            case "url":
                return client.submit_url(self.text, **request)
            case "stdin":
                # A duplicate, so that Python's own buffered object of standard input is never built or closed.
                return client.submit(0, name="stdin", on_upload=on_upload, **request)
        return client.submit(self.text, on_upload=on_upload, **request)


def parse_argument(text: str) -> Argument:
    """Return what `text` means. A file whose name could be an id is written with a path: `./name`."""
    if text == STDIN:
        return Argument(kind="stdin", text=text)
    if VIDEO_ID.fullmatch(text):
        return Argument(kind="video", text=text)
    if re.match(r"https?://", text, re.IGNORECASE):
        return Argument(kind="url", text=text)
    return Argument(kind="file", text=text)


def read_list(path: str) -> list[str]:
    """Return the sources that a file (`-`: standard input) names, one a line; empty lines and `#` lines are skipped.

    Raises `SourceUnreadable`.
    """
    label = "standard input" if path == STDIN else path
    try:
        with open(0 if path == STDIN else path, "rb", closefd=path != STDIN) as file:
            content = file.read()
    except OSError as error:
        raise SourceUnreadable(f"cannot read the list {label}: {error.strerror or error}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceUnreadable(f"the list {label} is UTF-16: save it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = (line.rstrip("\r") for line in content.decode("utf-8", "surrogateescape").split("\n"))
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def source_stem(job: Job) -> str:
    """Return the name of an output file for a job, without its ending."""
    label = source_label(job)
    return file_stem(Path(label).stem if job.source.get("name") else label)


def file_stem(text: str) -> str:
    """Return `text` as a file name that needs no quoting, cannot leave its folder, and has room for an ending."""
    clean = re.sub(r"[^\w.-]+", "_", re.sub(r"^https?://", "", text)).strip("._")
    return clean[:100].encode()[:_MAX_STEM_BYTES].decode(errors="ignore") or "transcript"
