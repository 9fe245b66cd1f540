"""What the documents point at is there: files, headings, recipes, targets of make, modules. Nothing is imported.

Each rule is a function (path of a document, its text) -> what is wrong, tried on a text that it must reject, then on all.
"""

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "assets").rglob("*.md"),
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
INLINE = re.compile(r"`[^`\n]+`")


def code(text: str) -> str:
    return "\n".join(part for kind in (FENCED, INDENTED, INLINE) for part in kind.findall(text))


def prose(text: str) -> str:
    return INLINE.sub("", FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """Of headings as GitHub makes them; of two that are alike the second gets -1."""
    seen, found = Counter(), set()
    for title in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"\]\([^)]*\)", "", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def dead_links(path: Path, text: str) -> list[str]:
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        target, _, anchor = link.partition("#")
        file = (path.parent / target) if target else path
        if re.match(r"[a-z]+:", link):
            continue
        if not file.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(text if not target else file.read_text(encoding="utf-8")):
            wrong.append(f"{link}: no such heading")
    return wrong


def expanded(pattern: str) -> list[str]:
    """a{b,c} -> ab, ac."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def missing_recipes(path: Path, text: str) -> list[str]:
    named = re.findall(r"\bconfigs/[\w/{},.*-]*[\w}*]\.yaml", text)
    return [name for pattern in named for name in expanded(pattern) if name != "configs/X.yaml" and not any(ROOT.glob(name))]


def missing_targets(path: Path, text: str) -> list[str]:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return sorted({t for t in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code(text)) if t not in targets})


def missing_modules(path: Path, text: str) -> list[str]:
    named = set(re.findall(r"-m ((?:trainers|eval|scripts|pipelines)(?:\.\w+)*)", code(text)))
    files = {name: ROOT / name.replace(".", "/") for name in named}
    return sorted(n for n, f in files.items() if not (f.with_suffix(".py").is_file() or (f / "__main__.py").is_file()))


RULES = {
    dead_links: "[a](#here) [b](docs/nowhere.md) [c](CONTRIBUTING.md#nowhere)\n# There\n",
    missing_recipes: "`configs/sd15_{vardiu,nothing}.yaml`",
    missing_targets: "    make coffee\n",
    missing_modules: "`accelerate launch -m trainers.nothing`",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_rejects(rule):
    assert len(rule(ROOT / "README.md", RULES[rule])) == (3 if rule is dead_links else 1)


def test_anchors_are_those_of_github():
    text = "# SD1.5's step, `x_0`: time\n## Is it so?\n```\n# no heading\n```\n## Is it so?\n"
    assert anchors(text) == {"sd15s-step-x_0-time", "is-it-so", "is-it-so-1"}
    assert dead_links(ROOT / "README.md", text + "[a](#is-it-so-1) [b](docs/results.md) [c](https://x.y/#z)") == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.parametrize("rule", RULES)
def test_documents(rule, document):
    assert rule(document, document.read_text(encoding="utf-8")) == []


def test_the_readme_is_short_and_its_table_names_recipes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    rows = [line for line in text.splitlines() if re.match(r"\| \*\*(VarDiU|VarFlow|Diff-Instruct)\*\*", line)]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(rows) == 3
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "configs" / f"{name}.yaml").is_file()] == []


def test_the_readme_has_a_line_for_each_room():
    """Of two levels; what is deeper stands in the line of the room that it is in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^ {4}((?:pipelines|trainers|eval|scripts)/[\w/]*) {2,}\S", text, re.MULTILINE)
    rooms = [
        f.parent.relative_to(ROOT)
        for top in ("pipelines", "trainers", "eval", "scripts")
        for f in ROOT.glob(f"{top}/**/__init__.py")
    ]
    assert sorted(named) == sorted(f"{room}/" for room in rooms if len(room.parts) <= 2)
    deeper = [room.name for room in rooms if len(room.parts) > 2]
    assert [name for name in deeper if f"{name}/" not in text] == []


def test_the_index_names_every_document():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert named == {file.name for file in (ROOT / "docs").glob("*.md")} - {"README.md"}
