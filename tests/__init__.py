"""Tests: bytes first, then rooms, then whole daemons."""

import os
from pathlib import Path

from whisperd.model.main import SPINS

# Read when torch is imported. Tests run side by side: a core that one of them spins on is another's.
os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
# Every model's process compiles the alignment of words, unless one before it did: a core's three seconds a start.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "numba"))
