"""`python -m torture [--seed N] [--minutes M] [--kills N] [SUBJECT...]`: torture, and print what was lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping

from torture.crowd import crowd
from torture.deaths import deaths
from torture.flood import flood
from torture.fuzz import fuzz_parser, fuzz_socket
from torture.kills import Plan, torture
from torture.media import media
from torture.report import Report, describe_machine
from torture.soak import soak

Subject = Callable[[argparse.Namespace], Report]
SUBJECTS: Mapping[str, Subject] = {
    "kills": lambda a: torture(Plan(seed=a.seed, minutes=a.minutes, kills=a.kills)),
    "deaths": lambda a: deaths(a.seed, a.times, a.minutes),
    "parser": lambda a: fuzz_parser(a.seed, a.frames),
    "socket": lambda a: fuzz_socket(a.seed, a.frames // 20),
    "crowd": lambda a: crowd(a.idle, a.slow, a.minutes * 60),
    "flood": lambda a: flood(a.flooding, a.minutes * 60),
    "media": lambda a: media(a.seed, a.files),
    "soak": lambda a: soak(a.seed, a.jobs, a.minutes),
}


def main() -> int:
    """Run the subjects that the command line names; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m torture", description="Torture whisperd and count what it loses.")
    parser.add_argument("names", nargs="*", metavar="SUBJECT", help=f"{', '.join(SUBJECTS)}; kills by default, or all")
    parser.add_argument("--seed", type=int, default=1, help="the same seed deals the same blows (default 1)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long each subject may take (default 10)")
    parser.add_argument("--kills", type=int, default=10_000, help="kills: end after so many of daemon and helpers")
    parser.add_argument("--times", type=int, default=50, help="deaths: of each helper, in each way (default 50)")
    parser.add_argument("--frames", type=int, default=1_000_000, help="parser: so many; socket: a twentieth of it")
    parser.add_argument("--idle", type=int, default=2000, help="crowd: idle connections (default 2000)")
    parser.add_argument("--slow", type=int, default=200, help="crowd: slow connections (default 200)")
    parser.add_argument("--flooding", type=int, default=900, help="flood: connections (default 900)")
    parser.add_argument("--files", type=int, default=200, help="media: so many (default 200)")
    parser.add_argument("--jobs", type=int, default=10_000, help="soak: spread over the minutes (default 10,000)")
    arguments = parser.parse_args()
    names = list(SUBJECTS) if arguments.names == ["all"] else arguments.names or ["kills"]
    if unknown := [name for name in names if name not in SUBJECTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(SUBJECTS)}")
    print(describe_machine(), flush=True)
    broken = False
    for name in names:
        report = SUBJECTS[name](arguments)
        print(f"\n{report}", flush=True)
        broken |= bool(report.violations)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
