"""`python -m eval run` of the studies, whose options have been checked: a teacher and named students, one report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..output_folder import require_writable
from ..settings import Run
from .protocols import PROTOCOLS


def digits(args: Run, named: Sequence[tuple[str, Path]]) -> int:
    """The study of the digits."""
    from .digits.evaluate import evaluate
    from .digits.report import FILES, write_report
    from .runs import find_run

    protocol = PROTOCOLS[args.protocol].adjusted(args.num_images, args.seed, args.force)
    teacher = find_run("teacher", Path(_teacher(args)), "teacher")
    students = [find_run(name, path, "student") for name, path in named]
    output = Path(args.output)
    require_writable(output)
    write_report(evaluate(protocol, teacher, students), output)
    print(f"wrote {', '.join(str(output / name) for name in FILES)}")
    return 0


def emoji(args: Run, named: Sequence[tuple[str, Path]]) -> int:
    """The study of the emoji. Files are checked before anything heavy is imported."""
    from pipelines.assets import EMOJI as PICTURES
    from pipelines.assets import EMOJI_CLIP, EMOJI_SD, check_assets

    started = time.perf_counter()
    protocol = PROTOCOLS[args.protocol].adjusted(args.num_images, args.seed, args.force)
    teacher = _teacher(args)
    embedded = [EMOJI_SD] if Path(teacher).resolve() == EMOJI_SD.resolve() else []
    check_assets(PICTURES, EMOJI_CLIP, *embedded)
    output = Path(args.output)
    require_writable(output)

    from .emoji.evaluate import evaluate
    from .emoji.report import FILES, write_report
    from .runs import find_run

    students = [find_run(name, path, "student") for name, path in named]
    evaluation = evaluate(protocol, teacher, students, kept_in=output / "teacher.json", started=started)
    write_report(evaluation, output)
    print(f"wrote {', '.join(str(output / name) for name in FILES)}")
    return 0


def _teacher(args: Run) -> str:
    if args.teacher is None:
        raise ValueError(f"protocol {args.protocol} is that of a study, which needs a teacher")
    return args.teacher
