"""`whisperd setup`: what it proposes, and the units that it writes. The whole is tried in test_systemd_setup.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from whisperd.daemon.setup import user_units
from whisperd.daemon.setup.steps import Device
from whisperd.protocol.catalogue import CHECKPOINTS

GIB = 2**30


@pytest.mark.parametrize(
    ("cuda", "memory_gib", "cores", "model"),
    [
        (True, 80, 16, "large-v3"),
        (True, 8, 4, "turbo"),
        (True, 3, 4, "small"),
        (True, 1, 4, "base"),
        (False, 64, 32, "small"),
        (False, 16, 8, "base"),
        (False, 16, 2, "tiny"),
    ],
)
def test_the_model_suits_the_device(cuda: bool, memory_gib: int, cores: int, model: str) -> None:
    assert model in CHECKPOINTS
    assert Device(cuda=cuda, name="it", memory_bytes=memory_gib * GIB, cores=cores).proposal() == model


def test_units_are_written_once_and_only_ours_are_taken_away(tmp_path: Path) -> None:
    assert {path.name for path in user_units.write(tmp_path)} == set(user_units.NAMES)
    assert user_units.write(tmp_path) == [], "nothing to do"
    service, socket = tmp_path / "whisperd.service", tmp_path / "whisperd.socket"
    assert f"\nExecStart={user_units.program()}\n" in service.read_text()
    assert "/usr/local" not in service.read_text()
    assert user_units.shared(tmp_path), "units of the machine for this very program would be recognised"
    socket.write_text("[Socket]\nListenStream=/somebody/elses\n")
    assert user_units.remove(tmp_path) == [service]
    assert socket.exists()
