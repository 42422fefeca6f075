"""`python -m whisperctl` is the command line."""

import sys

from whisperctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
