"""`make demo`: one daemon with OpenAI's tiny.en, and two programs that hand it speech at once.

Everything lives in a temporary folder and ends with this process, whether it goes well, fails, or is interrupted.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import av

import whisperd
from whisperctl import Client, WhisperdError

SAMPLE = Path(whisperd.__file__).parent / "assets" / "sample.flac"
BIN = Path(sys.executable).parent
READY_S = 120
REPEATS = 4
# Whisper takes speech that repeats itself inside one of its windows for a loop of its own, and tries it again.
WINDOW_S = 30


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Run the demo and return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what stands below as clean-up is done
    folder = Path(tempfile.mkdtemp(prefix="whisperd-demo-"))
    try:
        with ExitStack() as stack:
            run(folder, stack)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (DemoFailed, WhisperdError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        log = folder / "log"
        if log.exists():
            print(f"the daemon's log:\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)
    print("\nThe daemon is stopped, its folder deleted.")
    return 0


def run(folder: Path, stack: ExitStack) -> None:
    """Start the daemon and two programs, print what they get; `stack` stops them in the opposite order."""
    talk, talk_s = write_talk(folder / "talk.wav")
    waiters = stack.enter_context(ThreadPoolExecutor())
    started = time.monotonic()
    start_daemon(folder, stack)
    print(f"whisperd has loaded OpenAI's tiny.en in {time.monotonic() - started:.1f} s.")
    print("Two programs hand it speech at once:\n")
    programs = {}
    started = time.monotonic()
    for priority, source, words in (
        ("background", talk, f"a talk of {talk_s:.0f} s"),
        ("interactive", SAMPLE, "a few sentences"),
    ):
        command = [str(BIN / "whisperctl"), "transcribe", "--priority", priority, str(source)]
        print(f"$ whisperctl transcribe --priority {priority} {source.name:12}  # {words}", flush=True)
        process = subprocess.Popen(command, env=environment(folder), stdout=subprocess.PIPE, text=True)
        stack.callback(stop, process)
        programs[waiters.submit(process.communicate)] = (priority, process)
    for answer in as_completed(programs):
        priority, process = programs[answer]
        print(f"\nThe {priority} program has its words after {time.monotonic() - started:.1f} s:\n")
        print(transcript(answer, process), flush=True)
    print("\n$ whisperctl stats\n", flush=True)
    subprocess.run([BIN / "whisperctl", "stats"], env=environment(folder), check=True)


def transcript(answer: Future[tuple[str, str]], process: subprocess.Popen[str]) -> str:
    """Return what a program printed. Raises `DemoFailed` when it did not end well."""
    output, _ = answer.result()
    if process.returncode != 0:
        raise DemoFailed(f"whisperctl ended with exit code {process.returncode}")
    return output.strip()


def start_daemon(folder: Path, stack: ExitStack) -> None:
    """Start whisperd and wait until its model is loaded. Raises `DemoFailed`."""
    command = [str(BIN / "whisperd"), "--model", "demo", "--device", "cpu", "--socket", str(folder / "socket")]
    command += ["--state-dir", str(folder / "state"), "--cache-dir", str(folder / "cache")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(folder), stdin=subprocess.DEVNULL, stderr=log)
    stack.callback(stop, process)
    deadline = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with Client(folder / "socket", reconnect_s=0) as client:
                health = client.health()
        except WhisperdError:  # it is not listening yet
            pass
        else:
            if health["status"] == "ready":
                return
            if health["status"] == "degraded":
                raise DemoFailed("; ".join(health["problems"]))
        time.sleep(0.1)
    raise DemoFailed("the daemon is not ready" if process.poll() is None else "the daemon did not start")


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which nothing of the user's own whisperd is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WHISPERD_")}
    return kept | {"WHISPERD_SOCKET": str(folder / "socket"), "XDG_CONFIG_HOME": str(folder)}


def write_talk(path: Path) -> tuple[Path, float]:
    """Write a longer recording, the sample several times with pauses; return its path and its length in seconds."""
    with av.open(str(SAMPLE)) as source, wave.open(str(path), "wb") as talk:
        rate = source.streams.audio[0].rate
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        frames = [frame for packet in source.decode(audio=0) for frame in resampler.resample(packet)]
        samples = b"".join(bytes(frame.planes[0])[: 2 * frame.samples] for frame in frames)
        talk.setnchannels(1)
        talk.setsampwidth(2)
        talk.setframerate(rate)
        talk.writeframes(samples.ljust(2 * WINDOW_S * rate, b"\0") * REPEATS)
    return path, WINDOW_S * REPEATS


def stop(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process that is still there, kindly at first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
