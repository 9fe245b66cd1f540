"""House rules on imports and calls, read from the syntax tree: nothing is imported, so no dependency is needed.

A rule is a pure function (path relative to the repository, source) -> problems. Each is tried on code that it must
reject and on code that it must accept, then on every file.
"""

import ast
import importlib.machinery
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "trainers", "eval", "scripts")
SOURCES = sorted(p.relative_to(ROOT) for folder in (*PACKAGES, "tests") for p in (ROOT / folder).rglob("*.py"))

# Folder -> top-level modules that nothing below it may import. `tests` is barred everywhere: torch-fidelity installs a
# package of that name, so the import would find either one.
FORBIDDEN = {
    "pipelines": {"trainers", "eval", "scripts", "tests"},
    "trainers": {"eval", "scripts", "tests"},
    "trainers/objectives": {"accelerate", "diffusers", "yaml"},  # an objective is mathematics on tensors
    "eval": {"trainers", "scripts", "tests"},
    "scripts": {"tests"},
    "tests": {"tests"},
}

# What may be imported all the same: the command that puts a run together, evaluations in it included; and the page of a run,
# since charts and pages are made in eval/ alone, and this one shows what was measured on the way.
ALLOWED = {("trainers/distill.py", "eval.in_training"), ("trainers/command.py", "eval.report.run_page")}

# Room -> what of this project it may import besides itself. A room that is not named here may import what FORBIDDEN leaves.
# The engine runs updates, whatever they are: of objectives and families it knows the interfaces alone.
ROOMS = {
    "pipelines/common": (),
    "pipelines/data": ("pipelines.common",),
    "pipelines/edm/conversion": ("pipelines.common", "pipelines.edm.layout"),
    "trainers/config": ("pipelines", "trainers.objectives"),
    "trainers/data": ("pipelines", "trainers.config"),
    "trainers/engine": ("pipelines", "trainers.config", "trainers.data", "trainers.objectives.base", "trainers.families.base"),
    "trainers/posteriors": ("pipelines", "trainers.config"),
    "eval/networks": ("pipelines", "eval.content"),
    "eval/images": ("pipelines", "eval.content", "eval.protocols"),
    "eval/metrics": ("pipelines", "eval.content", "eval.protocols", "eval.images", "eval.networks"),
    "eval/report": ("pipelines", "eval.content", "eval.protocols", "eval.images"),
}

OBJECTIVES = sorted(p.stem for p in (ROOT / "trainers" / "objectives").glob("*.py"))

# Loading a pickle runs whatever code it names.
UNPICKLERS = {f"{m}.{f}" for m in ("pickle", "_pickle", "dill", "cloudpickle") for f in ("load", "loads")}
UNPICKLERS |= {"joblib.load", "pandas.read_pickle"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c; "" for what is not a chain of names."""
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, absolute module or module.name, name it binds or "") for every import, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                yield node.lineno, a.name, a.asname or a.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: max(0, len(path.parent.parts) + 1 - node.level)] if node.level else ()
            for a in node.names:
                yield node.lineno, ".".join((*package, *filter(None, [node.module]), a.name)), a.asname or a.name
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in {"import_module", "__import__"}:
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), ""


def import_direction(path: Path, source: str) -> list[str]:
    folders = {p.as_posix() for p in path.parents}
    return [
        f"{path}:{line} imports {name}: {folder}/ must not import {name.partition('.')[0]}"
        for line, name, _ in imports(path, ast.parse(source))
        for folder, barred in FORBIDDEN.items()
        if folder in folders and name.partition(".")[0] in barred and (path.as_posix(), name.rpartition(".")[0]) not in ALLOWED
    ]


def is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def room_arrows(path: Path, source: str) -> list[str]:
    folders = {p.as_posix() for p in path.parents}
    return [
        f"{path}:{line} imports {name}: {room}/ may import {', '.join(allowed) or 'nothing'} of this project"
        for line, name, _ in imports(path, ast.parse(source))
        for room, allowed in ROOMS.items()
        if room in folders and name.partition(".")[0] in (*PACKAGES, "tests")
        if not any(is_in(name, module) for module in (room.replace("/", "."), *allowed))
    ]


def seams(path: Path, source: str) -> list[str]:
    """An objective knows no family, a family no objective: they meet in the interfaces of base.py. The engine: see ROOMS."""
    tree, room = ast.parse(source), path.parts[:2]
    barred = {
        ("trainers", "objectives"): ("trainers.families", "trainers.config.run", "trainers.engine", "trainers.distill"),
        ("trainers", "families"): ("trainers.objectives",),
    }
    problems = [
        f"{path}:{line} imports {name}: objectives and families know each other by base.py alone"
        for line, name, _ in imports(path, tree)
        for other in barred.get(room, ())
        if is_in(name, other) and not is_in(name, f"{other}.base")
    ]
    for node in ast.walk(tree):  # objective.name == "foo", o.name != "foo"
        if room[0] == "trainers" and isinstance(node, ast.Compare) and getattr(node.left, "attr", "") == "name":
            named = {getattr(c, "value", None) for c in node.comparators} & set(OBJECTIVES)
            problems += [f"{path}:{node.lineno} asks for the objective {name!r}" for name in named if path.stem != name]
    return problems


def eval_stays_builtin(path: Path, source: str) -> list[str]:
    """`import eval` and `import eval.x` bind the name `eval`: eval("1+1") in that module then calls a module."""
    return [
        f"{path}:{line} binds the name eval; write `from eval.x import y` or `import eval.x as x`"
        for line, _, bound in imports(path, ast.parse(source))
        if bound == "eval"
    ]


def script_shadows_nothing(path: Path, source: str) -> list[str]:
    """`python scripts/x.py` puts scripts/ first on sys.path: `import datasets` would then find scripts/datasets.py."""
    if path.parent.as_posix() not in ("scripts", "scripts/bench") or path.stem.startswith("__"):
        return []
    site_packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    taken = (
        path.stem in sys.stdlib_module_names
        or path.stem in {*PACKAGES, "tests", "evaluate"}  # evaluate: Hugging Face's, which a user may well have
        or importlib.machinery.PathFinder.find_spec(path.stem, site_packages) is not None
    )
    return [f"{path} hides the module {path.stem}; give the script another name"] if taken else []


def no_unsafe_calls(path: Path, source: str) -> list[str]:
    if path.parts[0] not in PACKAGES:
        return []
    tree = ast.parse(source)
    origin = {bound: name for _, name, bound in imports(path, tree) if bound not in {"", name.partition(".")[0]}}
    problems = []
    for node in ast.walk(tree):
        head, dot, rest = dotted(node).partition(".")
        name = origin.get(head, head) + dot + rest
        if name.rpartition(".")[2] in {"nan_to_num", "nan_to_num_"} or getattr(node, "attr", "") == "nan_to_num_":
            problems.append(f"{path}:{node.lineno} nan_to_num hides divergence; stop on a non-finite value instead")
        if name in UNPICKLERS:
            problems.append(f"{path}:{node.lineno} {name} executes code from the file; use safetensors, JSON or npz")
        if not isinstance(node, ast.Call):
            continue
        head, dot, rest = dotted(node.func).partition(".")
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if origin.get(head, head) + dot + rest == "torch.load" and given.get("weights_only") is not True:
            problems.append(f"{path}:{node.lineno} torch.load executes code from the file; pass weights_only=True")
        for flag in {"trust_remote_code", "allow_pickle"} & given.keys():
            if given[flag] is not False:
                problems.append(f"{path}:{node.lineno} {flag} executes downloaded code; leave it out")
    return problems


def options_have_ranges(path: Path, source: str) -> list[str]:
    """A bare int takes -3 for a number of images, a bare float NaN for a rate, a bare Path leaves ~ as it is."""
    return [
        f"{path}:{node.lineno} type={keyword.value.id}: say what it may be, by pipelines.common.options (whole, typed, path)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and dotted(node.func).endswith("add_argument")
        for keyword in node.keywords
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and keyword.value.id in {"int", "float", "Path"}
    ]


def no_markup(path: Path, source: str) -> list[str]:
    """A page put together from strings is one forgotten escape() away from showing a run's name as a tag. Docstrings may say
    <folder>/report.html.
    """
    if path.parts[0] != "eval":
        return []
    tree = ast.parse(source)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    problems = [
        f"{path}:{node.lineno} {node.value[:40]!r} has markup: pages are templates in eval/report/templates/"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents
        if re.search(r"</|<!|<[a-z]\w*[\s>]|&#?\w+;", node.value)
    ]
    return problems + [
        f"{path}:{line} imports {name}: templates escape what they are given"
        for line, name, _ in imports(path, tree)
        if name.partition(".")[0] in {"html", "markupsafe", "xml"}
    ]


REJECTED = [
    (no_markup, "eval/report/x.py", "page = f'<h2>{title}</h2>'"),
    (no_markup, "eval/studies/emoji/x.py", "cell = '<td>' + name"),
    (no_markup, "eval/x.py", "image = f'<img alt=\"{name}\">'"),
    (no_markup, "eval/x.py", "text = '3 &plusmn; 1'"),
    (no_markup, "eval/x.py", "from html import escape"),
    (no_markup, "eval/x.py", "import html"),
    (no_markup, "eval/x.py", "from markupsafe import Markup"),
    (options_have_ranges, "scripts/bench/x.py", "parser.add_argument('--images', type=int)"),
    (options_have_ranges, "scripts/x.py", "p.add_argument('--rate', help='x', type=float)"),
    (options_have_ranges, "trainers/x.py", "p.add_argument('--output', type=Path)"),
    (import_direction, "pipelines/noise.py", "import trainers.config.run"),
    (import_direction, "pipelines/edm/net.py", "from ...trainers.engine import loop"),
    (import_direction, "pipelines/edm/__init__.py", "from ... import eval as e"),
    (import_direction, "pipelines/noise.py", "def f():\n    from scripts.quickstart import main"),
    (import_direction, "pipelines/noise.py", "importlib.import_module('eval.metrics.frechet')"),
    (import_direction, "trainers/engine/loop.py", "from eval.metrics.frechet import frechet"),
    (import_direction, "trainers/engine/loop.py", "from eval.in_training import InTraining"),
    (import_direction, "trainers/distill.py", "from eval.metrics.frechet import frechet"),
    (import_direction, "trainers/engine/loop.py", "from eval.report.run_page import write_page"),
    (import_direction, "trainers/objectives/vardiu.py", "from ...scripts import quickstart"),
    (import_direction, "trainers/objectives/vardiu.py", "from diffusers import UNet2DModel"),
    (import_direction, "trainers/objectives/vardiu.py", "import accelerate.utils as u"),
    (import_direction, "trainers/objectives/deeper/x.py", "import yaml"),
    (import_direction, "eval/images/generation.py", "from ...trainers import command"),
    (import_direction, "scripts/quickstart.py", "from tests.conftest import SHAPE"),
    (room_arrows, "pipelines/common/errors.py", "from pipelines.noise import Level"),
    (room_arrows, "pipelines/common/errors.py", "from ..data import walk"),
    (room_arrows, "pipelines/common/launch.py", "def f():\n    from trainers.distill import main"),
    (room_arrows, "pipelines/data/images.py", "from ..students import load_student"),
    (room_arrows, "pipelines/edm/conversion/convert.py", "from ..unet import EDMUNet"),
    (room_arrows, "trainers/data/shards.py", "from ..engine.loop import Trainer"),
    (room_arrows, "trainers/engine/loop.py", "from ..objectives.vardiu import VarDiU"),
    (room_arrows, "trainers/engine/loop.py", "from ..objectives import CONFIGS"),
    (room_arrows, "trainers/engine/loop.py", "from ..families import family_for"),
    (room_arrows, "trainers/engine/ema.py", "from .. import command"),
    (room_arrows, "eval/metrics/frechet.py", "from ..report import figures"),
    (room_arrows, "eval/images/files.py", "from ..metrics.one_pass import one_pass"),
    (seams, "trainers/objectives/foo.py", "from ..families.edm import Family"),
    (seams, "trainers/objectives/foo.py", "from ..config.run import DistillConfig"),
    (seams, "trainers/objectives/foo.py", "from ..config import run"),
    (seams, "trainers/objectives/foo.py", "from ..engine.draws import derive_seed"),
    (seams, "trainers/families/foo.py", "from ..objectives.varflow import VarFlow"),
    (seams, "trainers/families/foo.py", "from ..objectives import CONFIGS"),
    (seams, "trainers/config/run.py", "x = self.objective.name == 'varflow'"),
    (seams, "trainers/families/edm.py", "if o.name != 'vardiu':\n    pass"),
    (eval_stays_builtin, "scripts/quickstart.py", "import eval"),
    (eval_stays_builtin, "scripts/quickstart.py", "import torch, eval.metrics.frechet"),
    (eval_stays_builtin, "eval/__main__.py", "from .. import eval"),
    (script_shadows_nothing, "scripts/profile.py", ""),
    (script_shadows_nothing, "scripts/trace.py", ""),
    (script_shadows_nothing, "scripts/evaluate.py", ""),
    (script_shadows_nothing, "scripts/eval.py", ""),
    (script_shadows_nothing, "scripts/pytest.py", ""),
    (script_shadows_nothing, "scripts/bench/eval.py", ""),
    (no_unsafe_calls, "trainers/x.py", "import pickle\npickle.load(f)"),
    (no_unsafe_calls, "trainers/x.py", "import pickle as p\nnetwork = p.loads(b)"),
    (no_unsafe_calls, "trainers/x.py", "from pickle import load as read\nread(f)"),
    (no_unsafe_calls, "trainers/x.py", "import torch\ntorch.load(f)"),
    (no_unsafe_calls, "trainers/x.py", "from torch import load\nload(f, weights_only=False)"),
    (no_unsafe_calls, "trainers/x.py", "torch.load(f, weights_only=flag)"),
    (no_unsafe_calls, "eval/x.py", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
    (no_unsafe_calls, "eval/x.py", "np.load(f, allow_pickle=True)"),
    (no_unsafe_calls, "trainers/x.py", "torch.nan_to_num(grad, nan=0)"),
    (no_unsafe_calls, "trainers/x.py", "p.grad.nan_to_num_()"),
    (no_unsafe_calls, "trainers/x.py", "loss().grad.nan_to_num_()"),
    (no_unsafe_calls, "trainers/x.py", "from torch import nan_to_num as clean\nclean(grad)"),
]

ACCEPTED = [
    (no_markup, "eval/report/x.py", "def f(a):\n    '<folder>/report.html'\n    return '± 3' if a < 3 else 'a -> b < c & d'"),
    (no_markup, "eval/report/x.py", "from .html import Picture, render\nfrom . import html"),
    (no_markup, "scripts/assets/clip.py", "end = '</w>'"),
    (options_have_ranges, "scripts/x.py", "p.add_argument('--images', type=whole(1))\np.add_argument('--vae')"),
    (
        import_direction,
        "pipelines/edm/net.py",
        "from ..noise import Level\nfrom . import precond\nimport torch, diffusers",
    ),
    (import_direction, "trainers/engine/loop.py", "import accelerate\nfrom pipelines.noise import Level\nfrom .eval import f"),
    (
        import_direction,
        "trainers/objectives/vardiu.py",
        "import torch\nfrom pipelines.noise import Level\nfrom .base import P",
    ),
    (import_direction, "trainers/objectives/vardiu.py", "from . import yaml, eval_posterior"),
    (import_direction, "scripts/quickstart.py", "from trainers.distill import main\nfrom eval.metrics.frechet import frechet"),
    (
        eval_stays_builtin,
        "scripts/quickstart.py",
        "import eval.metrics.frechet as frechet\nfrom eval.report.evaluation import html\nimport evaluate",
    ),
    (
        seams,
        "trainers/objectives/foo.py",
        "from .base import Parts\nfrom ..config.data import Data\nfrom ..config.level_range import sampler",
    ),
    (seams, "trainers/families/foo.py", "from ..objectives.base import Need\nfrom ..config.run import DistillConfig"),
    (room_arrows, "pipelines/common/reading.py", "import torch\nfrom . import atomic\nfrom .errors import UserError"),
    (
        room_arrows,
        "trainers/engine/loop.py",
        "from . import ema\nfrom ..objectives.base import Phase\nfrom ..families import base\nfrom ..config.run import Run",
    ),
    (room_arrows, "trainers/distill.py", "from .families import family_for\nfrom .engine.loop import Trainer"),
    (seams, "trainers/objectives/vardiu.py", "x = o.name == 'vardiu'"),
    (seams, "trainers/data/examples.py", "x = data.name == 'digits'"),
    (import_direction, "trainers/distill.py", "from eval.in_training import InTraining"),
    (import_direction, "trainers/command.py", "from eval.report.run_page import write_page"),
    (script_shadows_nothing, "scripts/run_eval.py", ""),
    (script_shadows_nothing, "scripts/bench/evaluation.py", ""),
    (script_shadows_nothing, "scripts/__init__.py", ""),
    (script_shadows_nothing, "eval/profile.py", ""),
    (no_unsafe_calls, "scripts/x.py", "import pickle, pickletools\npickletools.genops(f)\npickle.dumps(x)"),
    (
        no_unsafe_calls,
        "trainers/x.py",
        "torch.load(f, weights_only=True)\njson.load(f)\nnp.load(f, allow_pickle=False)",
    ),
]


@pytest.mark.parametrize(("rule", "path", "source"), REJECTED)
def test_rule_rejects(rule, path, source):
    assert rule(Path(path), source)


@pytest.mark.parametrize(("rule", "path", "source"), ACCEPTED)
def test_rule_accepts(rule, path, source):
    assert rule(Path(path), source) == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_there(room):
    assert any(path.is_relative_to(room) for path in SOURCES)


@pytest.mark.parametrize(
    "rule",
    [
        import_direction,
        room_arrows,
        seams,
        eval_stays_builtin,
        script_shadows_nothing,
        no_unsafe_calls,
        options_have_ranges,
        no_markup,
    ],
)
def test_repository_keeps(rule):
    assert Path("tests/house/test_imports.py") in SOURCES  # else the search looked in the wrong place and found nothing to check
    problems = [problem for path in SOURCES for problem in rule(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not problems, "\n".join(problems)


def test_what_is_no_python_is_packaged():
    """Templates of pages, the digits: an import finds modules alone."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    named = {file for room, names in declared.items() for n in names for file in (ROOT / room.replace(".", "/")).glob(n)}
    files = (file for room in ("pipelines", "trainers", "eval") for file in (ROOT / room).rglob("*") if file.is_file())
    assert named == {file for file in files if file.suffix not in (".py", ".pyc")}
