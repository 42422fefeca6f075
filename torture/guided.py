"""`python -m torture.guided [libFuzzer options]`: the same targets under atheris, which looks for new branches.

Atheris is no dependency: `pip install atheris` first. Try `-runs=1000000` or `-max_total_time=600`, and a folder to
keep what it finds.
"""

from __future__ import annotations

import sys
from random import Random


def main() -> None:
    """Fuzz until told otherwise; atheris ends the process by itself."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris, or use `python -m torture fuzz`, which needs nothing")
    # Only what is imported in here is instrumented, and nothing of it may have been imported before.
    with atheris.instrument_imports(include=["whisperd.protocol", "whisperd.daemon.wire.connection"]):
        from torture import mutating, targets

    def one(data: bytes) -> None:
        targets.feed_connection(data, Random(len(data)))
        targets.feed_helper_link(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """Blind changes seldom leave a frame's length right: half of the time a frame of our own making."""
        if seed % 2:
            return mutating.mutated_frame(Random(seed))[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    options = ["-max_len=4096", "-len_control=0", *sys.argv[1:]]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
