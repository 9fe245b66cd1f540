"""Command line: `python -m eval run | generate | metrics | reference | compare | points`, by named protocols."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.common.errors import USER_ERRORS, UserError
from pipelines.common.launch import end_processes, say
from pipelines.common.options import add_options, flag, read_options

from .idle import refuse_idle
from .output_folder import require_writable
from .protocols import EMOJI, STUDIES, get_protocol
from .settings import Compare, Generate, Metrics, Output, Points, Reference, Run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with the fault on stderr where the command cannot work as given."""
    try:
        command, settings, given = parse(argv)
        return COMMANDS[command][1](settings, given)
    except USER_ERRORS as error:
        say(error, "eval: error")
        return 2
    finally:
        end_processes()


def parse(argv: Sequence[str] | None = None) -> tuple[str, Any, set[str]]:
    """(Command, its settings, the keys of those that stood on the command line itself, and not in a --config file). UserError for
    a value or a --config file that cannot be; SystemExit where argparse refuses the words.
    """
    parser = argparse.ArgumentParser(prog="python -m eval", description="Measure generators against real images.")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    models = {name: model for name, (model, _) in COMMANDS.items()}
    in_files = [model for model in models.values() if model is not Compare]
    for name, model in models.items():
        command = parsers.add_parser(name, help=model.__doc__, description=model.__doc__, allow_abbrev=False)
        add_options(command, model, config=model in in_files)
    words = vars(parser.parse_args(argv))
    name = words.pop("command")
    return name, *read_options(models[name], words, dict.fromkeys(key for model in in_files for key in model.model_fields))


def _run(settings: Run, given: set[str]) -> int:
    if settings.protocol in STUDIES:
        return _study(settings)
    get_protocol(settings.protocol)
    if settings.student:
        raise UserError(f"--student is for {', '.join(STUDIES)}; give the student as --model (or its folder as --lora)")
    return _measure(settings, given)


def _measure(settings: Run | Metrics, given: set[str]) -> int:
    from .run import check, run

    refuse_idle(settings, given)
    job = check(settings)  # all that can be known to be wrong before minutes of work
    require_writable(Path(settings.output))
    content = run(job)
    if content:
        print(content["protocol"]["computed"])
        for name, numbers in content["metrics"].items():
            print(f"{name} {numbers['value']:.6g}")
        print(f"wrote {settings.output}/{{metrics.json,report.html,metrics.png,samples.png}}")
    return 0


def _reference(settings: Reference, given: set[str]) -> int:
    from .run import make_reference

    refuse_idle(settings, given)
    require_writable(Path(settings.output))
    facts = make_reference(settings)
    if "extractors" in facts:  # the main process
        print(f"wrote {settings.output}: {', '.join(facts['extractors'])} of {facts['images']['n']:,} images")
    return 0


def _generate(settings: Generate, given: set[str]) -> int:
    from .run import make_only

    refuse_idle(settings, given)
    require_writable(Path(settings.output))
    folder = make_only(settings)
    if os.environ.get("RANK", "0") == "0":
        print(f"images are in {folder}")
    return 0


def _compare(settings: Compare, given: set[str]) -> int:
    from .report.evaluation import write_comparison
    from .report.results import comparable
    from .run import load_results

    named = [(a, b) if b else (Path(a).name, a) for a, _, b in (run.partition("=") for run in settings.runs)]
    contents = [(name, load_results(path)) for name, path in named]
    if len(dict(contents)) < len(contents):
        raise UserError(f"two runs have one name ({', '.join(name for name, _ in named)}); name them: NAME=DIR")
    faults = comparable(contents)
    if faults and not settings.force:
        raise UserError("these evaluations are not comparable: " + "; ".join(faults) + "; --force compares them and says so")
    require_writable(Path(settings.output))
    files = {name: Path(path) / "samples.png" for name, path in named}
    samples = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    print(write_comparison(contents, Path(settings.output), samples, settings.baselines))
    return 0


def _points(settings: Points, given: set[str]) -> int:
    from .studies.points.report import measure_points, table

    require_writable(Path(settings.output))
    print(table(measure_points(settings.model, settings.num_points, settings.seed, settings.law, Path(settings.output))))
    print(f"wrote {settings.output}/points.json")
    return 0


def _study(settings: Run) -> int:
    """A teacher and its students in one report."""
    from .studies import commands as studies

    if not settings.teacher:
        raise UserError(f"--teacher is needed for {settings.protocol}: a pipeline folder, or the run that trained it")
    used = {"protocol", "force", "output", "num_images", "seed", "teacher", "student"}
    if idle := sorted(settings.model_fields_set - used):
        raise UserError(f"{flag(idle[0])} has no effect with protocol {settings.protocol}; remove it")
    return (studies.emoji if settings.protocol == EMOJI else studies.digits)(settings, _named_students(settings.student))


def _named_students(values: Sequence[str]) -> list[tuple[str, Path]]:
    """["NAME=RUN", ...] -> [(NAME, RUN), ...]; UserError for a missing part or a name used twice."""
    named: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise UserError(f"--student {value!r}: expected NAME=RUN, e.g. vardiu=runs/vardiu")
        if name in named:
            raise UserError(f"--student {name!r} is given twice ({named[name]} and {path}); use two different names")
        named[name] = Path(path)
    return list(named.items())


COMMANDS: dict[str, tuple[type[Output], Callable[[Any, set[str]], int]]] = {
    "run": (Run, _run),
    "metrics": (Metrics, _measure),
    "generate": (Generate, _generate),
    "reference": (Reference, _reference),
    "points": (Points, _points),
    "compare": (Compare, _compare),
}

if __name__ == "__main__":
    sys.exit(main())
