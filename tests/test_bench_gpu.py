"""The bench for a GPU, in small on the CPU: every subject comes to its end, and none is in another's way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import gpu

# The two sizes of a subject are one piece of code.
NAMES = [name for name in gpu.SUBJECTS if not name.endswith("-turbo")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_subject_comes_to_its_end(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([name, "--quick", "--device", "cpu", "--folder", str(folder)]) == 0
    rows = [line for line in capfd.readouterr().out.splitlines() if line]
    assert rows
    assert all(line.startswith("| ") and line.count(" | ") == 4 for line in rows)
    assert "MISSED" not in str(rows), "what is left of the verdicts is about what is right"
    if name in ("recording", "fidelity"):
        assert all("| met |" in line for line in rows)
        assert len(rows) == 3


def test_a_subject_that_fails_stops_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--device", "cpu", "--tiny-en", str(tmp_path / "none")]
    assert gpu.main(["words", "peer", *options]) == 1
    out = capfd.readouterr().out
    assert f"| words |  | NOT MEASURED: Failed: there is no {tmp_path / 'none'} |" in out
    assert "| not measured: no peer here (--peer-python) |" in out
    assert gpu.main(["peer", *options, "--minutes", "0.1"]) == 1
    assert "| peer |  | NOT MEASURED: no time left (--minutes) |" in capfd.readouterr().out
