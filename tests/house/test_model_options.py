"""Options of a command that a strict model makes: flags, help, defaults; a file of the same keys below the command line."""

import argparse
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest

from eval.__main__ import COMMANDS, parse
from pipelines.common.errors import UserError
from pipelines.common.options import POSITIONAL, REPEATED, add_options, finite, option, path, path_option, read_options, whole
from pipelines.common.strict import PositiveInt, Strict, UserPath


class Baking(Strict):
    """Bread."""

    loaves: Annotated[list[UserPath], POSITIONAL] = option("LOAF", "what is baked", ...)
    minutes: PositiveInt = option("N", "100 % of the time", 40)
    flour: Literal["rye", "wheat"] | None = option(None, "the kind (default: what is there)")
    seeds: list[str] | None = option("S", "on top")
    guests: Annotated[list[str], REPEATED] = option("G", "who come", [])
    fan: bool | None = option(None, "hot air (default: the oven's)")
    salt: bool = option(None, "salted", False)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bake", allow_abbrev=False)
    add_options(made, Baking, config=True)
    return made


def read(*argv: str) -> tuple[Baking, set[str]]:
    return read_options(Baking, vars(parser().parse_args(argv)), {*Baking.model_fields, "cake"})


def test_what_is_not_given_is_the_models():
    assert read("a") == (Baking(loaves=["a"]), {"loaves"})


def test_each_form(capsys):
    words = "a b --minutes 7 --flour rye --seeds x y --seeds z --guests p q --guests r --no-fan --salt --salt"
    settings, given = read(*words.split())
    lists = {"loaves": ["a", "b"], "seeds": ["z"], "guests": ["p", "q", "r"]}
    assert settings == Baking(minutes=7, flour="rye", fan=False, salt=True, **lists)
    assert given == {*Baking.model_fields}
    assert capsys.readouterr().err == "--seeds is given 2 times; the last one counts\n"


def test_help_is_the_models():
    said = " ".join(parser().format_help().split())
    for line in ("LOAF what is baked (needed)", "--minutes N 100 % of the time (default: 40)", "--flour {rye,wheat} the kind"):
        assert line in said
    assert "--fan hot air (default: the oven's) --no-fan not --fan --salt salted" in said


def test_a_file_below_the_command_line(tmp_path):
    file = tmp_path / "bread.yaml"
    file.write_text("minutes: 0\nseeds: poppy\nflour:\ncake: {of: [another, command]}\nsalt: yes\nguests: [p]\n")
    settings, given = read("a", "--config", str(file), "--minutes", "3", "--guests", "q")
    assert settings == Baking(loaves=["a"], minutes=3, seeds=["poppy"], salt=True, guests=["q"])
    assert (given, settings.model_fields_set - given) == ({"loaves", "minutes", "guests"}, {"seeds", "salt"})


def test_faults_are_said_as_they_were_written(tmp_path):
    file = tmp_path / "bread.yaml"
    file.write_text("minutes: 0\n")
    expected = (
        rf"^{file}: 2 fault\(s\)\n  minutes: Input should be greater than 0, got 0\n  --flour: Input should be 'rye' or 'wheat'"
    )
    with pytest.raises(UserError, match=expected):
        read("a", "--config", str(file), "--flour", "oat")
    with pytest.raises(UserError, match=r"^--minutes: Input should be a valid integer, unable to parse .*, got 'x'$"):
        read("a", "--minutes", "x")
    file.write_text("minuets: 1\nbred: 2\n")
    with pytest.raises(
        UserError, match=r"2 fault\(s\)\n  unknown key 'minuets'; did you mean 'minutes'\?\n  unknown key 'bred'; known"
    ):
        read("a", "--config", str(file))


@pytest.mark.parametrize(
    ("read_as", "good", "value", "bad"),
    [
        (whole(2), "2", 2, "1"),
        (whole(0), "010", 10, "1.5"),
        (finite, "1e3", 1000.0, "nan"),
        (path_option, "a", "a", "$NOT_THERE/a"),
        (path_option, "~", str(Path.home()), ""),
        (path, "~/a", Path.home() / "a", "~nobody_here/a"),
    ],
)
def test_types_of_commands_without_a_model(read_as, good, value, bad):
    assert read_as(good) == value
    with pytest.raises(argparse.ArgumentTypeError, match=r"got '"):
        read_as(bad)


def test_paths_of_scripts_are_the_users():
    """`--output=~/x`, which no shell replaces, would make a folder named ~."""
    scripts = Path(__file__).parents[2] / "scripts"
    assert not [file.name for file in scripts.rglob("*.py") if re.search(r"type=Path\b", file.read_text())]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_an_evaluation_says_what_it_is(command, capsys):
    fields = COMMANDS[command][0].model_fields
    assert all(field.description for field in fields.values())
    with pytest.raises(SystemExit, match="0"):
        parse([command, "--help"])
    said = capsys.readouterr().out
    assert all(f"--{key.replace('_', '-')}" in said for key in fields if key != "runs")
