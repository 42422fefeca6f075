"""What whisperd costs, measured: `python -m bench` prints a table. No test measures time; here nothing is tested."""

import os

os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # read when numba is imported; the model helper sets it for itself
