"""Tests: bytes first, then rooms, then whole daemons."""

import os

from whisperd.model.main import SPINS

# Read when torch is imported. Tests run side by side: a core that one of them spins on is another's.
os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
