"""The JavaScript runtime that YouTube needs, and how old yt-dlp is: both are reported in `stats`."""

from __future__ import annotations

import datetime
import shutil
import sysconfig
from typing import Any

from yt_dlp.globals import supported_js_runtimes
from yt_dlp.version import __version__ as YT_DLP_VERSION

# In yt-dlp's own order of trust: deno runs what it is given without network and files.
_PROGRAMS = {"deno": "deno", "node": "node", "quickjs": "qjs", "bun": "bun"}


def find_programs() -> dict[str, str]:
    """Return the paths of the JavaScript runtimes on this machine, by yt-dlp's name for them.

    The folder of this Python's own programs comes first: the package of Deno, in `whisperd[server]`, puts it there.
    """
    found = {}
    for name, program in _PROGRAMS.items():
        path = shutil.which(program, path=sysconfig.get_path("scripts")) or shutil.which(program)
        if path is not None:
            found[name] = path
    return found


def describe(programs: dict[str, str], today: datetime.date) -> dict[str, Any]:
    """Return `yt_dlp`, `yt_dlp_age_days` and `js_runtime` for `stats`.

    `js_runtime` is a name with its version; None where there is none, or none that is new enough.
    """
    runtime = None
    for name, path in programs.items():
        info = supported_js_runtimes.value[name](path=path).info
        if info is not None and info.supported:
            runtime = f"{info.name} {info.version}"
            break
    return {"yt_dlp": YT_DLP_VERSION, "yt_dlp_age_days": _age_days(today), "js_runtime": runtime}


def _age_days(today: datetime.date) -> int | None:
    try:
        year, month, day = map(int, YT_DLP_VERSION.split(".")[:3])
        return max(0, (today - datetime.date(year, month, day)).days)
    except ValueError:
        return None
