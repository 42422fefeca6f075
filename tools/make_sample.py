"""Make the spoken sample that ships with the package: `python tools/make_sample.py` (needs Debian's `flite`).

It writes whisperd/assets/sample.flac (16 kHz mono) from whisperd/assets/sample.txt, and the same samples decoded as
sample/audio.pcm, which the model helper tries when its process died. `whisperctl selftest`, the demo and the tests use
the others; the text is one that tiny.en, the smallest model, gets right word for word. Run it only to change
the sample: another version of flite speaks a little differently.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import av
from av.audio.stream import AudioStream

ASSETS = Path(__file__).parents[1] / "whisperd" / "assets"
VOICE = "slt"


def main() -> int:
    """Speak the text and encode it; return the exit status."""
    text = " ".join((ASSETS / "sample.txt").read_text().split())
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "sample.wav"
        try:
            subprocess.run(["flite", "-voice", VOICE, "-t", text, "-o", wav], check=True)
        except FileNotFoundError:
            print("flite is not installed: apt-get install flite", file=sys.stderr)
            return 2
        encode_flac(wav, ASSETS / "sample.flac")
        with wave.open(str(wav)) as speech:
            (ASSETS / "sample" / "audio.pcm").write_bytes(speech.readframes(speech.getnframes()))
    print(f"wrote {ASSETS / 'sample.flac'}, {(ASSETS / 'sample.flac').stat().st_size} bytes")
    return 0


def encode_flac(wav: Path, flac: Path) -> None:
    """Encode a 16-bit mono WAV as FLAC, as small as FLAC gets; the samples stay what they are."""
    with av.open(str(wav)) as source, av.open(str(flac), "w") as target:
        speech = source.streams.audio[0]
        stream = target.add_stream("flac", rate=speech.sample_rate, options={"compression_level": "12"})
        assert isinstance(stream, AudioStream)
        stream.layout, stream.format = "mono", "s16"
        for frame in source.decode(speech):
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))


if __name__ == "__main__":
    sys.exit(main())
