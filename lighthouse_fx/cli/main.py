"""The command line, `lighthouse COMMAND`. Each command is a file of its own, `command_*.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lighthouse_fx.report.report import NotRewritten
from lighthouse_fx.report.text import printable

from . import bench, explain, profile, report, tune, validate

_COMMANDS = (explain, tune, bench, profile, report, validate)


def new_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="lighthouse",
        description="Lighthouse attention for models that you have: look before you train, choose, measure, check.",
        epilog="lighthouse COMMAND --help explains a command, with examples.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status.
    """
    options = new_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, TypeError, OSError, ImportError, NotRewritten) as error:  # the input's fault; its words say how
        print(f"lighthouse: {printable(str(error))}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
