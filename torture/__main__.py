"""`python -m torture [--seed N] [--minutes M] [--kills N] [SUBJECT...]`: torture, and print what was lost."""

from __future__ import annotations

import argparse
import sys

from torture.kills import Plan, torture
from torture.report import describe_machine


def main() -> int:
    """Run the subjects; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m torture", description="Torture whisperd and count what it loses.")
    parser.add_argument("--seed", type=int, default=1, help="the same seed deals the same blows")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--kills", type=int, default=10_000, help="end after so many kills of daemon and helpers")
    arguments = parser.parse_args()
    print(describe_machine(), flush=True)
    report = torture(Plan(seed=arguments.seed, minutes=arguments.minutes, kills=arguments.kills))
    print(report, flush=True)
    return int(bool(report.violations))


if __name__ == "__main__":
    sys.exit(main())
