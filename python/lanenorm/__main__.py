"""Command line: ``python -m lanenorm info | check | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import lanenorm


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the command line by default.

    Returns
    -------
    int
        Exit code: 0, or 1 where `check` found an error too large, `demo` or `bench` could not run.
    """
    parser = argparse.ArgumentParser(prog="python -m lanenorm", description=lanenorm.__doc__)
    parser.add_argument("--version", action="version", version=f"lanenorm {lanenorm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check | demo | bench")
    commands.add_parser("info", help="what this installation consists of")
    commands.add_parser("check", help="verify this installation against independent arithmetic, in seconds")
    commands.add_parser(
        "demo", help="train a network on handwritten digits with and without normalization", add_help=False
    )
    commands.add_parser(
        "bench", help="speed against a copy, NumPy, PyTorch; in a checkout all of bench/", add_help=False
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":  # has arguments of its own
        from lanenorm import demo

        return demo.main(rest)
    if arguments.command == "bench":  # likewise
        from lanenorm import bench

        return bench.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "check":
        from lanenorm import check

        return check.main()
    lanenorm.show_runtime()
    return 0


if __name__ == "__main__":
    sys.exit(main())
