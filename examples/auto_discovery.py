"""A background program: have many videos transcribed whenever there is time, and pick the texts up.

    python examples/auto_discovery.py IDS.txt TEXTS     # one id a line; TEXTS/ID.txt for each

Stop it and start it again as you like: what it had asked for goes on meanwhile, and is found again by its key.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from whisperctl import Client, JobCancelled, JobFailed, QueueFull


def discover(whisper: Client, todo: list[str], folder: Path) -> None:
    """Have all videos transcribed, as many at a time as the daemon takes from us."""
    jobs: dict[str, int] = {}
    while todo or jobs:
        while todo:
            try:
                # The key makes it the same job after a restart: nothing is queued twice.
                jobs[todo[0]] = whisper.submit_video(todo[0], key=f"auto-discovery {todo[0]}").id
            except QueueFull:
                break  # the rest when there is room again
            del todo[0]
        if not jobs:
            time.sleep(10)  # the queue is full of other programs' work
            continue
        video_id = next(iter(jobs))
        pick_up(whisper, video_id, jobs.pop(video_id), folder)


def pick_up(whisper: Client, video_id: str, job_id: int, folder: Path) -> None:
    """Wait for a job and write what became of it: ID.txt, or ID.failed (delete it, and the next start tries anew)."""
    result = whisper.result(job_id, wait=True)
    try:
        write(folder / f"{video_id}.txt", result.text)
    except (JobFailed, JobCancelled) as error:
        whisper.forget(job_id)  # and its key with it
        write(folder / f"{video_id}.failed", f"{error.code}: {error}\n")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: if it is there, that video is done."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)
    print(path.name, flush=True)


def main(list_file: str, folder_name: str) -> None:
    """Do what is not done yet of a list of ids."""
    folder = Path(folder_name)
    folder.mkdir(parents=True, exist_ok=True)
    done = {path.stem for path in folder.iterdir() if path.suffix in (".txt", ".failed")}
    ids = Path(list_file).read_text().split()
    # A daemon that restarts is waited for, however long its upgrade takes.
    with Client(reconnect_s=24 * 3600) as whisper:
        discover(whisper, [video_id for video_id in dict.fromkeys(ids) if video_id not in done], folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} IDS.txt FOLDER")
    main(sys.argv[1], sys.argv[2])
