"""The published layer figures: `lighthouse bench` over lengths and head layouts, results and picture into the repository.

    python benchmarks/layer.py                      on the GPU that the figures shall be from; minutes
    python benchmarks/layer.py --quick              the lengths that have targets only
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lighthouse_fx.cli.main import main

HERE = Path(__file__).resolve().parent
TARGETS = ["8192", "98304", "524288"]


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the lengths that have targets")
    parser.add_argument("--lengths", nargs="+", metavar="N", help="these lengths only")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for JSON and picture")
    parser.add_argument("rest", nargs="*", help="more options for `lighthouse bench`, after --")
    return parser.parse_args()


def run() -> int:
    args = flags()
    lengths = args.lengths or (TARGETS if args.quick else [])
    some = ["--lengths", *lengths] if lengths else []
    figures = ["--json", str(args.out / "layer.json"), "--picture", str(args.out / "layer.png")]
    status = main(["bench", *some, *figures, *args.rest])
    for name, layout in (
        ("grouped heads", ["--heads", "32", "--groups", "8"]),
        ("narrow heads", ["--heads", "16", "--dim", "64"]),
    ):
        print(f"\n{name}")
        where = ["--json", str(args.out / f"layer_{name.replace(' ', '_')}.json")]
        status |= main(["bench", "--lengths", lengths[0] if args.lengths else "98304", *layout, *where, *args.rest])
    return status


if __name__ == "__main__":
    sys.exit(run())
