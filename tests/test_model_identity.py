"""What tells one model's results from another's: what a path leads to, as it was when the model was started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from whisperd.daemon.config import Config
from whisperd.daemon.lanes.model_process import model_identity
from whisperd.protocol.catalogue import Checkpoint

FILES = {
    "ctranslate2": ["model.bin", "config.json"],
    "transformers": ["model.safetensors", "config.json", "generation_config.json"],
    "pieces": ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors", "config.json"],
}


def identity(model: str | Path, named: Checkpoint | None = None, dtype: str = "auto") -> list[Any]:
    places = {"socket": Path("/s"), "state_dir": Path("/state"), "cache_dir": Path("/cache")}
    return model_identity(Config(**places, model=str(model), dtype=dtype), named)  # type: ignore[arg-type]


def overwrite(file: Path) -> None:
    """Put other bytes of the same length into a file, a minute later; its folder does not change by that."""
    before, folder = file.stat(), file.parent.stat()
    file.write_bytes(b"after!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 60 * 10**9))
    assert file.parent.stat().st_mtime_ns == folder.st_mtime_ns


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_each_file_of_a_folder_that_is_overwritten_in_place_makes_another_model(
    tmp_path: Path, files: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in [*files, "README.md"]:
        (folder / name).write_bytes(b"before")
    seen = [identity(folder)]
    assert identity(folder) == seen[0]
    for name in files:
        overwrite(folder / name)
        assert identity(folder) not in seen, name
        seen.append(identity(folder))
    overwrite(folder / "README.md")
    assert identity(folder) == seen[-1], "nothing of it is read"


def test_a_checkpoint_is_found_below_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "mine.pt"
    file.write_bytes(b"before")
    before = identity("~/mine.pt")
    assert before[2:] == identity(file)[2:] != []
    overwrite(file)
    assert identity("~/mine.pt") != before


@pytest.mark.parametrize("model", ["demo", "smal", "/nowhere/mine.pt", "~nobody-of-this-name/mine.pt"])
def test_what_is_not_there_is_its_name(model: str) -> None:
    assert identity(model) == [model, "auto"]
    assert identity(model) != identity(model, dtype="float32")


def test_a_name_is_what_the_daemons_list_says() -> None:
    mine = Checkpoint(file_name="mine.pt", sha256="9e" * 32)
    assert identity("mine", mine) == ["mine", "auto", mine.sha256]
    assert identity("base", mine) == ["base", "auto"], "openai-whisper's list never changes"
