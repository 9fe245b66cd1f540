"""Options of `python -m eval`: each is used, or refused by name; a configuration file in every form; only its own pictures."""

import json
import shutil
from pathlib import Path

import pytest

from eval.__main__ import main, parse
from eval.in_training import make_plan
from eval.studies.runs import find_run
from pipelines.edm import EDMPipeline
from trainers.config.run import Evaluation


@pytest.fixture
def generating(edm, tmp_path):
    """generating(*more): `generate` of 3 images -> exit code."""

    def run(*more: str, model: Path = edm) -> int:
        call = ["generate", "--protocol", "custom", "--num-images", "3", "--steps", "1", "--model", str(model)]
        return main([*call, "--output", str(tmp_path / "made"), *more])

    return run


@pytest.fixture
def running(edm, networks, sets, tmp_path):
    """running(*more): `run` of 5 images of the pipeline against set b -> exit code."""

    def run(*more: str, output: str = "run") -> int:
        call = [
            "run",
            "--protocol",
            "custom",
            "--num-images",
            "5",
            "--steps",
            "1",
            "--model",
            str(edm),
            "--reference",
            str(sets.b),
        ]
        return main([*call, "--inception", str(networks.inception), "--output", str(tmp_path / output), *more])

    return run


# Without effect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "option"),
    [
        *(
            ([f"--{name}", value], name)
            for name, value in (
                ("lora", "x"),
                ("base-model", "x"),
                ("steps", "3"),
                ("guidance-scale", "2"),
                ("image-size", "32"),
                ("dtype", "bfloat16"),
                ("seed", "7"),
                ("batch-size", "3"),
                ("teacher", "x"),
                ("draws", "2"),
                ("teacher-steps", "9"),
                ("latency-batch", "9"),
                ("caption-column", "text"),
                ("start-method", "spawn"),
            )
        ),
        (["--exact"], "exact"),
        (["--no-exact"], "exact"),
    ],
)
def test_an_option_without_effect_on_images_that_are_there(more, option, networks, sets, tmp_path, capsys):
    call = ["run", "--protocol", "custom", "--images", str(sets.a), "--reference", str(sets.b)]
    call += ["--inception", str(networks.inception), "--output", str(tmp_path / "out")]
    assert main([*call, *more]) == 2
    assert f"--{option} has no effect without --" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("more", [["--teacher-steps", "9"], ["--latency-batch", "3"], ["--image-column", "x"]])
def test_an_option_without_effect_on_a_model(more, running, capsys):
    assert running(*more) == 2
    assert f"{more[0]} has no effect without --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", ["--size", "32"]),
        ("generate", ["--metrics", "fid"]),
        ("generate", ["--clip-prefix", "a"]),
        ("reference", ["--num-images", "9"]),
        ("reference", ["--draws", "2"]),
        ("reference", ["--clip-model", "x"]),
        ("compare", ["--config", "x.yaml"]),
    ],
)
def test_an_option_of_another_command(command, option, capsys):
    given = [] if command == "compare" else ["--protocol", "custom"]
    with pytest.raises(SystemExit) as stopped:
        main([command, *given, "--output", "x", *option, *(["a"] if command == "compare" else [])])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option[0]}" in capsys.readouterr().err


def test_a_network_that_no_metric_reads_is_said(command, networks, capsys):
    """One set of options may serve several calls, so it is let be, but not without a word."""
    assert command("--dinov2", str(networks.dinov2)) == 0
    assert "--dinov2 has no effect without --metrics fd_dinov2" in capsys.readouterr().err


def test_a_network_that_a_reference_does_not_hold_is_said(networks, sets, tmp_path, capsys):
    """The protocol has a CLIP score, which looks at no reference."""
    call = ["reference", "--protocol", "coco-30k", "--reference", str(sets.b), "--inception", str(networks.inception), "--force"]
    assert main([*call, "--clip", str(networks.clip), "--output", str(tmp_path / "ref")]) == 0
    assert "eval: --clip has no effect without --metrics clip_score" in capsys.readouterr().err


def test_captions_of_a_model_that_takes_no_text(running, generating, tmp_path, capsys):
    (tmp_path / "c.txt").write_text("a\nb\nc\nd\ne\n")
    for call in (running, generating):
        assert call("--captions", str(tmp_path / "c.txt")) == 2
        assert "--captions has no effect: this model takes no text" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_an_image_size_that_a_model_has_not(generating, capsys):
    assert generating("--image-size", "64") == 2
    assert "--image-size has no effect: a EDMPipeline makes images of one size" in capsys.readouterr().err


def test_a_base_model_of_none(generating, edm, capsys):
    assert generating("--base-model", str(edm)) == 2
    assert "--base-model has no effect: --model" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--image-column", "--reference-column"])
def test_a_column_of_a_folder(option, command, capsys):
    assert command(option, "image") == 2
    assert f"{option} has no effect: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["c.txt", "c.json"])
def test_a_column_of_captions_without_columns(name, command, networks, tmp_path, capsys):
    one = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
    (tmp_path / name).write_text(json.dumps(one))
    more = [
        "--metrics",
        "clip_score",
        "--clip",
        str(networks.clip),
        "--captions",
        str(tmp_path / name),
        "--caption-column",
        "text",
    ]
    assert command(*more) == 2
    assert "--caption-column has no effect without --captions of a file with columns" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--metrics", "fid"], ["--draws", "2"], ["--workers", "2"], ["--lora", "x"]])
def test_the_study_of_the_digits_has_few_options(more, tmp_path, capsys):
    call = ["run", "--protocol", "digits-10k", "--teacher", "t", "--student", "a=b", "--output", str(tmp_path)]
    assert main([*call, *more]) == 2
    assert f"{more[0]} has no effect with protocol digits-10k" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "metrics"),
    [("clip", ["fid"]), ("clip_336", ["fid"]), ("dinov2", ["fid"]), ("reference", ["inception_score"])],
)
def test_an_evaluation_in_training_that_reads_it_not(key, metrics, networks, sets):
    given = {"reference": None if key == "reference" else str(sets.b), "inception": str(networks.inception), key: str(sets.a)}
    options = Evaluation(every=1, metrics=metrics, **given).model_dump()
    with pytest.raises(ValueError, match=f"evaluation.{key} has no effect without metric"):
        make_plan(options)
    make_plan(options | {key: str(sets.b) if key == "reference" else None, "metrics": ["fid"]})


# The configuration file -----------------------------------------------------------------------------------------------


def test_both_forms_of_the_file(networks, sets, tmp_path, values):
    file = tmp_path / "eval.yaml"
    file.write_text(f"protocol: custom\nimages: {sets.a}\nreference: {sets.b}\ninception: {networks.inception}\n")
    assert main(["metrics", "--config", str(file), "--output", str(tmp_path / "one")]) == 0
    assert main(["metrics", f"--config={file}", "--output", str(tmp_path / "two")]) == 0
    assert values(tmp_path / "one") == values(tmp_path / "two")
    assert main(["metrics", f"--config={file}", "--config", str(file), "--output", str(tmp_path / "three")]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("metrics: fid\nmetrics: kid", "line 1: key 'metrics' stands twice in one section"),
        ("steps: false", "steps is false, expected a number"),
        ("lora: true", "lora: Input should be a valid string, got True"),
        ("model: {path: x}", "model: Input should be a valid string"),
        ("seed: [1, 2]", "seed: Input should be a valid integer, got [1, 2]"),
        ("metrics: []", "metrics: List should have at least 1 item after validation, not 0, got []"),
        ("lora: ''", "lora: expected a path; an empty one is what a shell makes of a variable that is not set, got ''"),
        ("runs: [a]", "unknown key 'runs'; known here: output, protocol, force,"),
        ("dtype: float8", "dtype: Input should be 'float32', 'bfloat16' or 'float16', got 'float8'"),
    ],
)
def test_lines_that_say_nothing(line, message, tmp_path, capsys):
    (tmp_path / "eval.yaml").write_text(f"protocol: custom\n{line}\n")
    assert main(["run", "--config", str(tmp_path / "eval.yaml"), "--output", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err


def test_an_option_of_the_file_that_the_file_makes_void(networks, sets, tmp_path, capsys):
    """Refused where the file alone decides; where the command line chose other images, the file's model options wait."""
    common = f"protocol: custom\nreference: {sets.b}\ninception: {networks.inception}\nbatch_size: 3\noutput: {tmp_path / 'x'}\n"
    (tmp_path / "images.yaml").write_text(common + f"images: {sets.a}\n")
    assert main(["run", "--config", str(tmp_path / "images.yaml")]) == 2
    assert "--batch-size has no effect without --model" in capsys.readouterr().err
    (tmp_path / "plain.yaml").write_text(common)
    assert main(["run", "--config", str(tmp_path / "plain.yaml"), "--images", str(sets.a)]) == 0


def test_the_command_line_prevails(tmp_path, capsys):
    """Also for an option that may be given several times."""
    (tmp_path / "study.yaml").write_text("protocol: digits-10k\nteacher: t\nstudent: [a=x]\nseed: 3\n")
    call = ["run", "--config", str(tmp_path / "study.yaml"), "--student", "b=y", "--output", "o", "--student", "c=z", "d=w"]
    _, settings, given = parse(call)
    assert (settings.student, settings.teacher, settings.seed) == (["b=y", "c=z", "d=w"], "t", 3)
    assert (given, settings.model_fields_set - given) == ({"student", "output"}, {"protocol", "teacher", "seed"})


def test_points_read_a_file_too(tmp_path, capsys):
    file = tmp_path / "points.yaml"
    file.write_text(f"model: {tmp_path / 'nothing'}\nnum_points: 1\noutput: {tmp_path / 'out'}\n")
    for form in (["--config", str(file)], [f"--config={file}"]):
        assert main(["points", *form]) == 2
        assert "num_points: Input should be greater than or equal to 2, got 1" in capsys.readouterr().err
        assert main(["points", *form, "--num-points", "7"]) == 2
        assert "nothing" in capsys.readouterr().err
    file.write_text("num_pionts: 1\n")
    assert main(["points", "--config", str(file)]) == 2
    assert "unknown key 'num_pionts'; did you mean 'num_points'" in capsys.readouterr().err


# Paths ----------------------------------------------------------------------------------------------------------------


def test_home_is_meant_by_a_tilde(edm, networks, sets, tmp_path, monkeypatch):
    """In options of both forms, in a file, and after NAME=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, source in {"a": sets.a, "b": sets.b, "small.pt": networks.inception}.items():
        (tmp_path / name).symlink_to(source)
    call = ["metrics", "--protocol", "custom", "--reference=~/b", "--inception", "~/small.pt"]
    assert main([*call, "--images", "~/a", "--output=~/out"]) == 0
    (tmp_path / "eval.yaml").write_text("images: ~/a\noutput: ~/again\n")
    assert main([*call, "--config=~/eval.yaml"]) == 0
    assert main(["compare", "first=~/out", "second=~/again", "--output", "~/compared"]) == 0
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_dir() and not f.is_symlink()) == ["again", "compared", "out"]


@pytest.mark.parametrize("option", ["output", "teacher", "base-model", "captions", "weights-dir"])
def test_a_path_that_is_empty(option, capsys, tmp_path, monkeypatch):
    """`--output "$UNSET"` would write into the working folder, `--teacher "$UNSET"` time no teacher."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--protocol", "custom", "--model", "m", "--output", "x", f"--{option}", ""]) == 2
    assert f"--{option}: expected a path" in capsys.readouterr().err


def test_a_home_that_is_not_there(capsys, tmp_path):
    assert main(["metrics", "--protocol", "custom", "--images", "~nobody_here/x", "--output", str(tmp_path)]) == 2
    assert "--images: '~nobody_here/x': this machine has no such home folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["metrics", "--config=~nobody_here/x.yaml"])
    assert "--config: '~nobody_here/x.yaml': this machine has no such home folder" in capsys.readouterr().err


# Pictures that are not its own ----------------------------------------------------------------------------------------


def test_stray_pictures_are_not_measured(running, tmp_path, measured, capsys):
    """Copies of a viewer, of macOS and of the user, in all places, and a parquet file: said, and never measured."""
    assert running() == 0
    before = measured(tmp_path / "run")
    assert "left out" not in capsys.readouterr().err
    folder = tmp_path / "run" / "images" / "draw0"
    picture = folder / "000000" / "000002.png"
    strays = [
        "000000/.ipynb_checkpoints/000002-checkpoint.png",
        "000000/._000002.png",
        "copy.png",
        "000000/000005.png",
        "a.parquet",
    ]
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, folder / name)
    assert running() == 0
    said = capsys.readouterr().err
    assert f"{folder}: left out, not of this evaluation: 000000/._000002.png" in said
    assert "(5 file(s))" in said
    after = measured(tmp_path / "run")
    assert after["metrics"] == before["metrics"]
    assert after["images"] == before["images"]
    assert after["images"][0]["n"] == 5


def test_a_picture_that_was_removed_is_made_again(running, tmp_path, measured):
    assert running() == 0
    before = measured(tmp_path / "run")
    (tmp_path / "run" / "images" / "draw0" / "000000" / "000003.png").unlink()
    assert running() == 0
    assert measured(tmp_path / "run")["images"] == before["images"]


def test_copies_of_snapshots_are_no_snapshots(tmp_path):
    for name in ("student", *(f"snapshots/step_000000{step}" for step in ("20", "40", "20_good", "20 (copy)"))):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "student.json").write_text('{"steps": 20}')
    assert [run.model.name for run in find_run("x", tmp_path, "student").snapshots] == ["step_00000020", "step_00000040"]


# LoRAs of EDM pipelines -----------------------------------------------------------------------------------------------


def test_a_lora_that_no_layer_of_an_edm_network_has(edm, tmp_path, capsys, generating):
    import torch
    from safetensors.torch import save_file

    name = next(n for n, m in EDMPipeline.from_pretrained(edm).unet.named_modules() if isinstance(m, torch.nn.Conv2d))
    weights = {f"unet.{name}x.lora_A.weight": torch.zeros(2, 3), f"unet.{name}x.lora_B.weight": torch.zeros(3, 2)}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    assert generating("--lora", str(tmp_path)) == 2
    assert "1 of its 1 layers are not there" in capsys.readouterr().err


def test_where_a_lora_is_not(generating, tmp_path, capsys):
    (tmp_path / "x.bin").write_bytes(b"x")
    assert generating("--lora", str(tmp_path / "x.bin")) == 2
    assert "is no .safetensors file" in capsys.readouterr().err
    assert generating("--lora", str(tmp_path / "none" / "such")) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "made" / "images").exists()
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["made", "x.bin"]'


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "0") for option in ("steps", "batch-size", "feature-batch", "draws", "image-size", "teacher-steps", "size")),
        ("workers", "-1"),
        ("seed", "-1"),
        ("guidance-scale", "nan"),
        ("guidance-scale", "inf"),
        ("latency-batch", "1e3"),
    ],
)
def test_numbers_that_cannot_be(option, value, tmp_path, capsys):
    """At once, from the command line and from a file: not after minutes, as a traceback."""
    common = ["run", "--protocol", "custom", "--model", "m", "--output", str(tmp_path / "x")]
    assert main([*common, f"--{option}={value}"]) == 2
    assert f"eval: error: --{option}: Input should be " in capsys.readouterr().err
    key = option.replace("-", "_")
    (tmp_path / "eval.yaml").write_text(f"{key}: '{value}'\n")
    assert main([*common, "--config", str(tmp_path / "eval.yaml")]) == 2
    assert f"eval.yaml: 1 fault(s)\n  {key}: Input should be " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_option_that_is_given_twice(tmp_path, capsys):
    """argparse takes the last: of two sets of images the first is not measured, and that is said."""
    assert main(["metrics", "--protocol", "custom", "--images", "a", "--images=b", "--output", str(tmp_path / "x")]) == 2
    assert "--images is given 2 times; the last one counts" in capsys.readouterr().err


def test_arrays_are_no_images(networks, sets, tmp_path, capsys):
    """A file that is there must not be called missing."""
    (tmp_path / "samples.npz").write_bytes(b"x")
    common = ["metrics", "--protocol", "custom", "--inception", str(networks.inception), "--reference", str(sets.b)]
    assert main([*common, "--images", str(tmp_path / "samples.npz"), "--output", str(tmp_path / "x")]) == 2
    assert "neither a folder nor a .zip or .parquet; save its arrays as pictures" in capsys.readouterr().err
