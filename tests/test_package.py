"""The archive of sources that is handed on is whole: who unpacks it can do all that a clone can."""

from __future__ import annotations

import tarfile
from pathlib import Path

from tests.installed import pack

FOLDERS = ".ci bench docs examples requirements systemd tests tools torture whisperctl whisperd".split()
FILES = "CHANGELOG.md LICENSE MANIFEST.in Makefile README.md pyproject.toml setup.cfg setup.py".split()


def test_an_archive_of_the_sources_holds_all_of_them(tmp_path: Path) -> None:
    with tarfile.open(pack(tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    source = tmp_path / "source"
    # A link to a folder is another name for what is there anyhow; `make install` reads none.
    files = [path for folder in FOLDERS for path in (source / folder).rglob("*") if path.is_file()]
    assert {*FILES, *(str(path.relative_to(source)) for path in files)} - held == set()
