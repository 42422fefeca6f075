"""An interactive program: transcribe a video now, and print the words as they come.

    python examples/manual_analyzer.py dQw4w9WgXcQ      # or without an id: it asks for one after the other

Its work goes before all background work. Ctrl-C cancels the video at hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from whisperctl import Client, WhisperdError


def analyze(whisper: Client, video_id: str) -> None:
    """Print a video's words. Raises `WhisperdError` with the reason when there are none."""
    # Attached: should this program go away, its job goes too.
    job = whisper.submit_video(video_id, priority="interactive", attached=True)
    printed = 0
    for event in whisper.follow(job.id):
        if event.discard:
            print("(the work begins anew)", flush=True)
            printed = 0
        if event.segment is not None:
            print(f"{event.segment.start:8.1f} {event.segment.text}", flush=True)
            printed += 1
    transcript = whisper.result(job.id).require()
    for segment in transcript.segments[printed:]:  # a video that was known already comes without events
        print(f"{segment.start:8.1f} {segment.text}")
    print(f"-- {video_id}: {len(transcript.text.split())} words in {transcript.language}", flush=True)


def asked_for() -> Iterator[str]:
    """Yield the ids of the command line, else those that are typed in."""
    if sys.argv[1:]:
        yield from sys.argv[1:]
        return
    while True:
        print("video id: ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        if video_id := line.strip():
            yield video_id


def main() -> int:
    """Analyze one video after the other; one that fails does not stop the others."""
    failed = 0
    with Client() as whisper:
        for video_id in asked_for():
            try:
                analyze(whisper, video_id)
            except WhisperdError as error:
                print(f"{video_id}: {error}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
