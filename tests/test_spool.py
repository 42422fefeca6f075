"""The spool's folders: swept at the start, deleted on demand, never anything outside."""

from __future__ import annotations

from pathlib import Path

from tests.support import requires_root, small_disk, wait_until
from whisperd.daemon.state.spool import Spool


def test_a_start_sweeps_what_no_row_names_whatever_it_is(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("not ours")
    spool = Spool(tmp_path / "spool")
    spool.make()
    for name in ("named", "unnamed", "half.partial"):
        (spool.path / name / "deeper").mkdir(parents=True)
        (spool.path / name / "deeper" / "source").write_bytes(b"x")
    (spool.path / "file").write_bytes(b"x")
    (spool.path / "link").symlink_to(outside)
    (spool.path / "unnamed" / "link").symlink_to(outside)
    (spool.path / "dangling").symlink_to(tmp_path / "nowhere")
    (spool.downloads / "left").mkdir()
    spool.start({"named"})
    wait_until(lambda: [path.name for path in spool.path.iterdir()] == ["named"])
    wait_until(lambda: not list(spool.downloads.iterdir()))
    assert (spool.path / "named" / "deeper" / "source").exists()
    assert (outside / "precious").read_text() == "not ours"
    spool.stop()


@requires_root
def test_what_cannot_be_deleted_now_is_deleted_later(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", again_s=0.05)
    spool.start(())
    busy, other = spool.path / "busy", spool.path / "other"
    busy.mkdir()
    other.mkdir()
    with small_disk(busy / "mounted", "1m"):  # a folder that is in use cannot go
        spool.remove("busy")
        spool.remove("other")
        wait_until(lambda: not other.exists())
        assert (busy / "mounted").is_mount()
    wait_until(lambda: not busy.exists())
    spool.stop()
