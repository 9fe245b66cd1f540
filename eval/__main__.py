"""Command line: `python -m eval run | generate | metrics | reference | compare | points`, by named protocols."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.common.errors import USER_ERRORS, UserError
from pipelines.common.launch import end_processes, say
from pipelines.common.numbers import finite, whole
from pipelines.common.paths import path_option, user_path
from pipelines.common.reading import parse_yaml, read_text

from .idle import refuse_idle
from .output_folder import require_writable
from .protocols import EMOJI, INCEPTION_MODES, METRICS, PROTOCOLS, STUDIES, get_protocol


class Parser(argparse.ArgumentParser):
    """Reads --config FILE, a YAML of the same options, before the command line, which goes before it. The result's `given` has
    the options that stood on the command line itself, `listed` those of the file.
    """

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        argv = list(sys.argv[1:] if argv is None else argv)
        words, rest = with_config(argv)
        args = super().parse_args(argv[:1] + words + rest)
        say_twice(rest)
        args.given, args.listed = options_in(rest), options_in(words)
        return args


def options_in(words: Sequence[str]) -> set[str]:
    """Those of OPTIONS that stand in a command line."""
    flags = {word.partition("=")[0] for word in words}
    return {key_of(flag) for flag in OPTIONS if flag in flags or flag.replace("--", "--no-", 1) in flags}


def say_twice(words: Sequence[str]) -> None:
    """Name an option that stands twice in a command line: as everywhere the last one counts, which scripts rely on."""
    flags = [word.partition("=")[0].replace("--no-", "--", 1) for word in words]
    for flag, option in OPTIONS.items():
        if flags.count(flag) > 1 and option.get("action") not in ("append", "extend", "store_true"):
            print(f"{flag} is given {flags.count(flag)} times; the last one counts", file=sys.stderr)


def key_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def with_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """(Options of a --config file as words, the words of the command line without the command and the file).

    A file describes a whole evaluation: of its options each command takes its own. UserError for what is no option of any.
    """
    command, rest = argv[:1], argv[1:]
    places = [i for i, word in enumerate(rest) if word == "--config" or word.startswith("--config=")]
    if not places or "config" not in COMMANDS.get(command[0], ()):
        return [], rest
    i = places[0]
    _, inline, name = rest[i].partition("=")
    after = i + 1 if inline else i + 2
    if len(places) > 1 or after > len(rest):
        raise UserError("--config takes one file, once")
    try:
        file = Path(user_path(name if inline else rest[i + 1]))
    except ValueError as error:
        raise UserError(f"--config: {error}") from error
    rest = rest[:i] + rest[after:]
    return file_words(read_options(file), file, command[0], options_in(rest)), rest


def read_options(file: Path) -> dict:
    """`option: value` lines of a YAML file, each option once."""
    import yaml

    if not file.is_file():
        raise FileNotFoundError(f"--config: no such file {str(file)!r}")
    source = f"--config: {file}"
    text = read_text(file, source)
    options = parse_yaml(text, source)
    if not isinstance(options, dict):
        raise UserError(f"--config: {file} must hold `option: value` lines")
    keys = [key.value for key, _ in yaml.compose(text, yaml.SafeLoader).value]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"--config: {file} has {twice!r} twice; keep one")
    return options


def file_words(options: dict, file: Path, command: str, given: set[str]) -> list[str]:
    """The words of a command line that say the same, for the options that the command has and that are not `given` there."""
    known = {key_of(flag) for flag in OPTIONS}
    words: list[str] = []
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"--config: {file} has an unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        flag = f"--{key.replace('_', '-')}"
        action = OPTIONS[flag].get("action")
        if (isinstance(value, bool) and action in (None, "extend")) or isinstance(value, dict):
            raise UserError(f"--config: {file}: {key} is {value!r}, expected a value; leave the line out for the default")
        if key not in COMMANDS[command] or key in given or value is None or (value is False and action == "store_true"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")  # in one word: a value may start with a dash
    return words


def named_path(text: str) -> str:
    """NAME=PATH or PATH."""
    name, equals, path = text.partition("=")
    return f"{name}={path_option(path)}" if equals else path_option(text)


OPTIONS: dict[str, dict] = {
    # what
    "--protocol": {"required": True, "metavar": "NAME", "help": f"one of: {', '.join((*PROTOCOLS, *STUDIES))}"},
    "--metrics": {"nargs": "+", "metavar": "M", "help": f"of: {', '.join(METRICS)} (default: the protocol's)"},
    "--num-images": {"type": int, "metavar": "N", "help": "other than the protocol's; needs --force"},
    "--draws": {"type": whole(1), "metavar": "D", "help": "how many sets of seeds (default: the protocol's)"},
    "--force": {"action": "store_true", "help": "allow another number of images; every report says so"},
    "--output": {"type": path_option, "required": True, "metavar": "DIR", "help": "where results go"},
    "--config": {
        "type": path_option,
        "metavar": "FILE",
        "help": "a YAML file of these options; those on the command line prevail",
    },
    # the model
    "--model": {"type": path_option, "metavar": "M", "help": "pipeline or student: a folder, a run's output_dir or a hub id"},
    "--lora": {"type": path_option, "metavar": "L", "help": "a LoRA to put on it: a file, a folder, a student or a hub id"},
    "--base-model": {"type": path_option, "metavar": "M", "help": "where a LoRA student's base model lies now"},
    "--steps": {"type": whole(1), "metavar": "N", "help": "sampling steps (default: the pipeline's; a student's is 1)"},
    "--guidance-scale": {"type": finite, "metavar": "W", "help": "default: the pipeline's; a student's is 1"},
    "--image-size": {"type": whole(1), "metavar": "PX", "help": "height and width to ask for"},
    "--dtype": {"choices": ("float32", "bfloat16", "float16"), "default": "float32"},
    "--seed": {"type": whole(0), "default": 0, "metavar": "S", "help": "0 gives image i the seed i"},
    "--batch-size": {"type": whole(1), "default": 64, "metavar": "B", "help": "images drawn at a time"},
    "--exact": {
        "action": argparse.BooleanOptionalAction,
        "help": "one image a call, so that bytes do not depend on the batch size (default: on a CPU)",
    },
    "--teacher": {"type": path_option, "metavar": "M", "help": "also time this model against --model"},
    "--teacher-steps": {"type": whole(1), "default": 50, "metavar": "N"},
    "--student": {
        "action": "extend",
        "nargs": "+",
        "type": named_path,
        "metavar": "NAME=RUN",
        "help": f"{', '.join(STUDIES)}: a name for the report and a run folder, or its student/ folder; repeat for several",
    },
    "--latency-batch": {"type": whole(1), "default": 8, "metavar": "B", "help": "images at a time when timing"},
    # a model of points
    "--num-points": {"type": whole(1), "default": 10_000, "metavar": "N"},
    "--law": {
        "type": path_option,
        "metavar": "FILE",
        "help": "a configuration with the mixture as `data` (default: the run's own)",
    },
    # images that are there
    "--images": {"type": path_option, "metavar": "SRC", "help": "folder, .zip, .parquet or hub data set (owner/name:split)"},
    "--image-column": {"metavar": "C", "help": "of --images, where it has several"},
    "--reference": {
        "type": path_option,
        "metavar": "SRC",
        "help": "real images, or statistics (a folder made by `reference`, EDM's .npz)",
    },
    "--reference-column": {"metavar": "C"},
    "--captions": {"type": path_option, "metavar": "FILE", "help": ".txt, .csv, .jsonl, .parquet, or COCO's captions_*.json"},
    "--caption-column": {"default": "caption", "metavar": "C"},
    # networks
    "--weights-dir": {"type": path_option, "metavar": "DIR", "help": "where weights are looked for first (or $ONE_STEP_WEIGHTS)"},
    "--inception": {
        "type": path_option,
        "metavar": "FILE",
        "help": "this TorchScript file (or .pth for legacy_pytorch) instead of the published one",
    },
    "--clip": {"type": path_option, "metavar": "PATH", "help": "the CLIP score's network, instead of the protocol's"},
    "--clip-336": {"type": path_option, "metavar": "DIR", "help": "CMMD's network"},
    "--dinov2": {"type": path_option, "metavar": "DIR", "help": "FD-DINOv2's network"},
    "--clip-aesthetic": {"type": path_option, "metavar": "DIR", "help": "the aesthetic score's CLIP"},
    "--aesthetic": {"type": path_option, "metavar": "FILE", "help": "the aesthetic score's last layers"},
    "--feature-batch": {"type": whole(1), "default": 64, "metavar": "B", "help": "images a network sees at a time"},
    "--workers": {"type": whole(0), "default": 0, "metavar": "W", "help": "processes that decode images"},
    "--start-method": {"choices": ("fork", "spawn", "forkserver"), "help": "of those processes"},
    "--baselines": {"type": path_option, "metavar": "FILE", "help": "published numbers (default: docs/baselines.yaml)"},
    # protocol custom
    "--size": {"type": whole(1), "metavar": "PX", "help": "custom: the side images must have"},
    "--crop-to": {"type": whole(1), "metavar": "PX", "help": "custom: largest centred square, Lanczos to this side"},
    "--inception-mode": {"choices": INCEPTION_MODES, "help": "custom: how images reach 299 pixels"},
    "--clip-model": {"metavar": "ID", "help": "custom: hub id or open_clip:model:tag"},
    "--clip-prefix": {"metavar": "TEXT", "help": "custom: put before each caption"},
    "--grayscale": {"action": "store_true", "help": "custom: take grey photographs as grey RGB"},
}
MODEL = ("model", "lora", "base_model", "steps", "guidance_scale", "image_size", "dtype", "seed", "batch_size", "exact")
NETWORKS = ("weights_dir", "inception", "clip", "clip_336", "dinov2", "clip_aesthetic", "aesthetic")
READING = ("feature_batch", "workers", "start_method")
CUSTOM = ("size", "crop_to", "inception_mode", "clip_model", "clip_prefix", "grayscale")
COMMON = ("protocol", "force", "output", "config")
SIZE = ("metrics", "num_images", "draws")
CAPTIONS, REFERENCE = ("captions", "caption_column"), ("reference", "reference_column")
TIMING, IMAGES = ("teacher", "teacher_steps", "latency_batch"), ("images", "image_column")
MEASURE = (*COMMON, *SIZE, *IMAGES, *REFERENCE, *CAPTIONS, *NETWORKS, *READING, "baselines", *CUSTOM)
COMMANDS = {
    "run": (*MEASURE, *MODEL, *TIMING, "student"),
    "metrics": MEASURE,
    "generate": (*COMMON, "num_images", "draws", *MODEL, *CAPTIONS),
    "reference": (*COMMON, "metrics", *REFERENCE, *NETWORKS, *READING, *(key for key in CUSTOM if not key.startswith("clip"))),
    "points": ("model", "num_points", "law", "seed", "output", "config"),
}
REQUIRED = {"points": ("model",)}  # beside those that every command needs
HELP = {
    "run": "generate images, measure them, report",
    "metrics": "measure images that are there, report",
    "generate": "the images of a protocol alone; resumable, any number of processes",
    "reference": "statistics of real images, for many evaluations",
    "compare": "evaluations beside each other and beside published numbers",
    "points": "a model of points against the mixture it should be",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with the fault on stderr where the command cannot work as given."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        return args.function(args)
    except USER_ERRORS as error:
        say(error, "eval: error")
        return 2
    finally:
        end_processes()


def _parser() -> Parser:
    parser = Parser(prog="python -m eval", description="Measure generators against real images.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, keys in COMMANDS.items():
        command = commands.add_parser(name, help=HELP[name], description=HELP[name], allow_abbrev=False)
        for key in keys:
            flag = f"--{key.replace('_', '-')}"
            required = {"required": True} if key in REQUIRED.get(name, ()) else {}
            command.add_argument(flag, **OPTIONS[flag] | required)
        defaults = {key_of(flag): option.get("default") for flag, option in OPTIONS.items()}
        command.set_defaults(function=FUNCTIONS[name], **{k: v for k, v in defaults.items() if k not in keys})
    compare = commands.add_parser("compare", help=HELP["compare"], description=HELP["compare"], allow_abbrev=False)
    compare.add_argument(
        "runs", nargs="+", type=named_path, metavar="DIR", help="--output folders of evaluations; NAME=DIR to name them"
    )
    compare.add_argument("--output", **OPTIONS["--output"])
    compare.add_argument(
        "--force", action="store_true", help="put numbers side by side that are not comparable; the report says so"
    )
    compare.add_argument("--baselines", **OPTIONS["--baselines"])
    compare.set_defaults(function=_compare)
    return parser


def _run(args: argparse.Namespace) -> int:
    if args.protocol in STUDIES:
        return _study(args)
    get_protocol(args.protocol)
    if args.student:
        raise UserError(f"--student is for {', '.join(STUDIES)}; give the student as --model (or its folder as --lora)")
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from .run import check, run

    refuse_idle(args)
    job = check(args)  # all that can be known to be wrong before minutes of work
    require_writable(Path(args.output))
    content = run(job)
    if content:
        print(content["protocol"]["computed"])
        for name, numbers in content["metrics"].items():
            print(f"{name} {numbers['value']:.6g}")
        print(f"wrote {args.output}/{{metrics.json,report.html,metrics.png,samples.png}}")
    return 0


def _reference(args: argparse.Namespace) -> int:
    from .run import make_reference

    if not args.reference:
        raise UserError("--reference is needed: the real images, a folder, .zip, .parquet or hub data set")
    refuse_idle(args, command="reference")
    require_writable(Path(args.output))
    facts = make_reference(args)
    if "extractors" in facts:  # the main process
        print(f"wrote {args.output}: {', '.join(facts['extractors'])} of {facts['images']['n']:,} images")
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .run import make_only

    if not args.model:
        raise UserError("--model is needed: a pipeline or student, a folder, a run's output_dir or a hub id")
    refuse_idle(args, command="generate")
    require_writable(Path(args.output))
    folder = make_only(args)
    if os.environ.get("RANK", "0") == "0":
        print(f"images are in {folder}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .report.evaluation import write_comparison
    from .report.results import comparable
    from .run import load_results

    named = [(a, b) if b else (Path(a).name, a) for a, _, b in (run.partition("=") for run in args.runs)]
    contents = [(name, load_results(path)) for name, path in named]
    if len(dict(contents)) < len(contents):
        raise UserError(f"two runs have one name ({', '.join(name for name, _ in named)}); name them: NAME=DIR")
    faults = comparable(contents)
    if faults and not args.force:
        raise UserError("these evaluations are not comparable: " + "; ".join(faults) + "; --force compares them and says so")
    require_writable(Path(args.output))
    files = {name: Path(path) / "samples.png" for name, path in named}
    samples = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    print(write_comparison(contents, Path(args.output), samples, args.baselines))
    return 0


def _points(args: argparse.Namespace) -> int:
    from .studies.points.report import measure_points, table

    require_writable(Path(args.output))
    print(table(measure_points(args.model, args.num_points, args.seed, args.law, Path(args.output))))
    print(f"wrote {args.output}/points.json")
    return 0


def _study(args: argparse.Namespace) -> int:
    """A teacher and its students in one report."""
    from .studies import commands as studies

    if not args.teacher:
        raise UserError(f"--teacher is needed for {args.protocol}: a pipeline folder, or the run that trained it")
    idle = sorted((args.given | args.listed) - {*COMMON, "num_images", "seed", "teacher", "student"})
    if idle:
        raise UserError(f"--{idle[0].replace('_', '-')} has no effect with protocol {args.protocol}; remove it")
    named = _named_students(args.student or [])
    return (studies.emoji if args.protocol == EMOJI else studies.digits)(args, named)


def _named_students(values: Sequence[str]) -> list[tuple[str, Path]]:
    """["NAME=RUN", ...] -> [(NAME, RUN), ...]; ValueError for a missing part or a name used twice."""
    named: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        if not name or not path:
            raise UserError(f"--student {value!r}: expected NAME=RUN, e.g. vardiu=runs/vardiu")
        if name in named:
            raise UserError(f"--student {name!r} is given twice ({named[name]} and {path}); use two different names")
        named[name] = Path(path)
    return list(named.items())


FUNCTIONS = {"run": _run, "metrics": _measure, "generate": _generate, "reference": _reference, "points": _points}

if __name__ == "__main__":
    sys.exit(main())
