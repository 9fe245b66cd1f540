"""Command line: `python -m eval run --protocol digits-10k --teacher RUN --student NAME=RUN --output DIR`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .digits.evaluate import evaluate
from .digits.protocol import PROTOCOLS, get_protocol
from .digits.report import FILES, write_report
from .digits.runs import find_run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on stderr where the command cannot work as given."""
    args = _parser().parse_args(argv)
    return args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval", description="Measure generators against real images.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="generate, measure and report, by a named protocol",
        description=f"Generate images from a teacher and its students, measure them, write {', '.join(FILES)}.",
    )
    run.set_defaults(command=_run)
    run.add_argument("--protocol", required=True, metavar="NAME", help=f"one of: {', '.join(PROTOCOLS)}")
    run.add_argument("--teacher", required=True, type=Path, metavar="RUN", help="run folder, or its teacher/ folder")
    run.add_argument(
        "--student",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=RUN",
        help="a name for the report and a run folder, or its student/ folder; repeat for several",
    )
    run.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the report goes")
    run.add_argument("--num-images", type=int, metavar="N", help="other than the protocol's; needs --force")
    run.add_argument("--force", action="store_true", help="allow --num-images; the report says so")
    run.add_argument("--seed", type=int, metavar="S", help="first seed of the images (default: the protocol's)")
    return parser


def _run(args: argparse.Namespace) -> int:
    try:  # all that can be known to be wrong before minutes of work; later errors are bugs and keep their traceback
        protocol = get_protocol(args.protocol).adjusted(args.num_images, args.seed, args.force)
        named = _named_students(args.student)
        teacher = find_run("teacher", args.teacher, "teacher")
        students = [find_run(name, path, "student") for name, path in named]
        _require_writable(args.output)
    except (OSError, ValueError) as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 2
    write_report(evaluate(protocol, teacher, students), args.output)
    print(f"wrote {', '.join(str(args.output / name) for name in FILES)}")
    return 0


def _named_students(values: Sequence[str]) -> list[tuple[str, Path]]:
    """["NAME=RUN", ...] -> [(NAME, RUN), ...]; ValueError for a missing part or a name used twice."""
    named: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise ValueError(f"--student {value!r}: expected NAME=RUN, e.g. vardiu=runs/vardiu")
        if name in named:
            raise ValueError(f"--student {name!r} is given twice ({named[name]} and {path}); use two different names")
        named[name] = Path(path)
    return list(named.items())


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"--output {folder}: cannot write there ({reason}); name a folder you may write to") from error


if __name__ == "__main__":
    sys.exit(main())
