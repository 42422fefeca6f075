"""The units with which a user's own systemd runs whisperd, for `whisperd setup`: written, recognised, taken away."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

NAMES = ("whisperd.socket", "whisperd.service")
# Where `make install` puts them, for all users.
_SHARED = [Path(folder) for folder in ("/usr/local/lib/systemd/user", "/usr/lib/systemd/user", "/etc/systemd/user")]
_MARK = "# Written by `whisperd setup`, which writes it anew; `whisperd setup --remove` takes it away.\n"


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where a user's own units lie (systemd.unit(5))."""
    home = Path(environ.get("HOME", "/"))
    own = environ.get("XDG_CONFIG_HOME", "")
    return (Path(own) if own.startswith("/") else home / ".config") / "systemd/user"


def program() -> Path:
    """Return the path of this `whisperd`."""
    return Path(sys.executable).with_name("whisperd")


def shared(units: Path | None = None) -> bool:
    """True when the machine offers units for this very program to every user, so that none need be written."""
    for place in [units] if units is not None else _SHARED:
        try:
            found = re.search(r"^ExecStart=(\S+)", (place / "whisperd.service").read_text(), re.MULTILINE)
            if found and os.path.samefile(found[1], program()):
                return True
        except OSError:
            continue
    return False


def texts() -> dict[str, str]:
    """Return the units by name, as they are to be written."""
    units = {}
    for name in NAMES:
        text = files("whisperd").joinpath("assets/user-units", name).read_text()
        text = re.sub(r"^ExecStart=.*$", lambda _: f"ExecStart={_quoted(program())}", text, flags=re.MULTILINE)
        units[name] = _MARK + re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)
    return units


def write(place: Path) -> list[Path]:
    """Write the units that are not there as they should be; return their paths. Raises `OSError`."""
    written = []
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        path = place / name
        if not path.exists() or path.read_text() != text:
            new = path.with_name(f".{name}.new")
            new.write_text(text)
            new.replace(path)
            written.append(path)
    return written


def remove(place: Path) -> list[Path]:
    """Take away the units that `write` wrote, and no others; return their paths. Raises `OSError`."""
    gone = []
    for name in NAMES:
        path = place / name
        if path.exists() and path.read_text().startswith(_MARK):
            path.unlink()
            gone.append(path)
    return gone


def _quoted(path: Path) -> str:
    """Return a path as a command of a unit (systemd.service(5)): specifiers and variables are not meant."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[\s'\";]", str(path)) else text
