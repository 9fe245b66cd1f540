"""What a user can mend is one message and exit status 2, whichever command met it; a defect of ours keeps its traceback."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError

from eval import __main__ as evaluation
from eval.images.captions import read_captions
from eval.metrics.measure import compute
from eval.metrics.one_pass import Gathered
from eval.protocols import PROTOCOLS
from eval.report.baselines import read_baselines
from eval.run import load_results
from eval.studies.points.report import read_law
from pipelines.common.config import load_config
from pipelines.common.errors import LONGEST, UserError, message, printable, shown
from pipelines.common.reading import loading, read_json, read_text, read_yaml
from pipelines.data.prompts import read_rows
from pipelines.students import find_student
from pipelines.text_to_image import read_index
from scripts import convert_edm, export_kohya, jobs, sample
from trainers import cache, distill, train_teacher
from trainers.config.run import DistillConfig, TeacherConfig
from trainers.families import family_of
from trainers.families.edm import load_edm_teacher

# Every command: where its work begins, and words that get it there.
OUT = ["--output", "{tmp}/out"]
COMMANDS: dict[str, tuple[Callable, object, str, list[str]]] = {
    "distill": (distill.main, distill, "run", ["--config", "configs/digits_vardiu.yaml"]),
    "train_teacher": (train_teacher.main, train_teacher, "run", ["--config", "configs/digits_teacher.yaml"]),
    "cache": (cache.main, cache.command, "make_accelerator", ["--config", "configs/sd15_vardiu.yaml"]),
    "eval run": (evaluation.main, evaluation, "get_protocol", ["run", "--protocol", "custom", *OUT]),
    "eval metrics": (evaluation.main, evaluation, "parse", ["metrics", "--protocol", "custom", *OUT]),
    "eval generate": (
        evaluation.main,
        evaluation,
        "require_writable",
        ["generate", "--protocol", "custom", "--model", "y", *OUT],
    ),
    "eval reference": (
        evaluation.main,
        evaluation,
        "require_writable",
        ["reference", "--protocol", "custom", "--reference", "y", *OUT],
    ),
    "eval compare": (evaluation.main, evaluation, "parse", ["compare", "x", *OUT]),
    "eval points": (evaluation.main, evaluation, "parse", ["points", "--model", "x", *OUT]),
    "sample": (sample.main, sample, "draw", ["x", "--prompt", "y"]),
    "export_kohya": (export_kohya.main, export_kohya, "read_lora", ["x", "{tmp}/y.safetensors"]),
    "convert_edm": (convert_edm.main, convert_edm, "convert", ["x.pkl", "{tmp}/y"]),
    "benchmarks": (lambda argv: jobs.exit_cleanly(lambda: jobs.run(argv, 1)), jobs, "show", []),
}


def run(command: str, error: BaseException, tmp_path: Path, monkeypatch) -> int:
    """The command's exit status where its work ends in `error`."""
    main, where, name, words = COMMANDS[command]

    def work(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, name, work)
    try:
        return main([word.format(tmp=tmp_path) for word in words])
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("steps: -3, expected more"), "steps: -3, expected more"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/model.bin"), "/data/model.bin: No space left on device"),
        (FileNotFoundError("--captions: no such file 'x'"), "--captions: no such file 'x'"),
        (SafetensorError("Error while deserializing header"), "Error while deserializing header"),
        (UserError("a name \x1b[31mred\r\n and \u202ebackwards"), "a name \\x1b[31mred\\r\n and \\u202ebackwards"),
    ],
    ids=["user", "full disk", "missing", "safetensors", "hostile name"],
)
def test_what_a_user_can_mend_is_one_message(command, error, said, tmp_path, monkeypatch, capsys):
    assert run(command, error, tmp_path, monkeypatch) == 2
    written = capsys.readouterr().err
    assert "Traceback" not in written
    assert re.fullmatch(rf"\n?(eval: )?error(: x\.pkl)?: {re.escape(said)}\n", written)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, RuntimeError, AssertionError])
def test_a_defect_of_ours_keeps_its_traceback(command, kind, tmp_path, monkeypatch, capsys):
    with pytest.raises(kind, match="shape") as raised:
        run(command, kind("shape (3, 5)"), tmp_path, monkeypatch)
    assert type(raised.value) is kind
    assert "error:" not in capsys.readouterr().err


def test_the_table_has_every_command():
    """Of the packages whose modules are started with python -m, and of eval's own."""
    root = Path(__file__).parents[2]
    started = {f.stem for f in (root / "trainers").glob("*.py") if "__main__" in f.read_text(encoding="utf-8")}
    assert started <= COMMANDS.keys()
    assert {f"eval {name}" for name in evaluation.COMMANDS} <= COMMANDS.keys()
    for file in (root / "scripts").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "__main__" in text:  # through one of the two doors
            assert "user_errors(" in text or "exit_cleanly(main)" in text, file


# Messages ------------------------------------------------------------------------------------------------------------------


def test_messages_are_bounded_and_printable():
    said = message(UserError("x" * 10**6))
    assert len(said) < LONGEST + 50
    assert said.endswith("... (996000 more characters)")
    assert message(OSError(errno.EACCES, "Permission denied", b"/a/\xff")) == "b'/a/\\xff': Permission denied"
    assert message(OSError(errno.EACCES, "Permission denied", "/a/\udcff\x07")) == "/a/\\udcff\\x07: Permission denied"
    assert message(ValueError()) == "ValueError"
    assert printable("Tür, 図, \t") == "Tür, 図, \\t"
    assert shown("a" * 1000, 20) == "'" + "a" * 19 + "..."
    assert len(shown({"key": [1] * 10**5})) < 90
    laughs: list = ["ha"]
    for _ in range(60):  # 2^60 of them, were all written
        laughs = [laughs, laughs]
    assert len(shown(laughs)) < 90
    assert shown(16**9000) == "<int>"
    assert shown([16**9000, 7, True]) == "[<int>, 7, True]"
    assert shown("a cat") == "'a cat'"
    assert shown(["id", 2.5, None]) == "['id', 2.5, None]"


def test_a_long_value_does_not_hide_the_other_faults(tmp_path):
    file = tmp_path / "c.yaml"
    content = yaml.safe_load(Path("configs/digits_teacher.yaml").read_text()) | {"steps": "y" * 10**5, "batch_size": -1}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as raised:
        load_config(TeacherConfig, str(file), [])
    assert len(str(raised.value)) < 1000
    assert "batch_size" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    ["a: &a [x, x]\nb: &b [*a, *a]\nsteps: [*b, *b]", "steps: &a [*a]"],
    ids=["anchors", "loop"],
)
def test_values_without_end_are_refused_like_others(text, tmp_path):
    file = tmp_path / "c.yaml"
    base = yaml.safe_load(Path("configs/digits_teacher.yaml").read_text())
    del base["steps"]
    file.write_text(yaml.safe_dump(base) + text + "\n")
    with pytest.raises(UserError, match="steps"):
        load_config(TeacherConfig, str(file), [])


def test_only_the_reason_is_taken_of_a_librarys_error():
    expected = r"^model 'x' cannot be loaded: size mismatch for a+\.\.\.; copy it$"
    with pytest.raises(UserError, match=expected) as raised, loading("model 'x' cannot be loaded", "copy it"):
        raise RuntimeError("size mismatch for " + "a" * 9000 + "\n" + "b" * 9000)
    assert len(str(raised.value)) < 500
    with pytest.raises(UserError, match=r"^m: 'in_channels' is missing$"), loading("m"):
        raise KeyError("in_channels")
    with pytest.raises(KeyboardInterrupt), loading("m"):
        raise KeyboardInterrupt


# Files that users have -----------------------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# für\nsteps: 3\n".encode("latin-1"), "is not UTF-8 text: line 1 has the byte 0xfc; save it as UTF-8"),
        (b"a: 1\nb: 2\nc: \xe9\n", "is not UTF-8 text: line 3 has the byte 0xe9"),
        ("steps: 3\n".encode("utf-16"), "is UTF-16 text"),
        (b"[" * 20_000, "is not valid YAML: it is nested too deeply"),
        (b"a: " + b"9" * 9000, "is not valid YAML: Exceeds the limit"),
        (b"a: \x00\n", "is not valid YAML: unacceptable character"),
        (b"a: *b\n", "is not valid YAML: found undefined alias"),
        (b"? {a: 1}\n: 2\n", "is not valid YAML: while constructing a mapping"),
    ],
    ids=["latin-1", "line 3", "utf-16", "deep", "digits", "nul", "alias", "key"],
)
@pytest.mark.slow
def test_a_configuration_that_cannot_be_read_is_named(content, said, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    for main in (train_teacher.main, distill.main, cache.main):
        with pytest.raises(SystemExit, match="2"):
            main(["--config", str(file)])
        assert re.search(rf"^error: '?{file}'? {re.escape(said)}", capsys.readouterr().err)
    assert evaluation.main(["run", "--config", str(file), "--protocol", "custom", "--output", str(tmp_path / "out")]) == 2
    assert f"eval: error: {file} {said}" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"^'{file}' {re.escape(said)}"):
        read_law(str(file), tmp_path)
    with pytest.raises(UserError, match=rf"^--baselines: {file} {re.escape(said)}"):
        read_baselines(str(file), "custom")


def test_a_byte_order_mark_is_accepted_everywhere(tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_bytes(BOM + b"pipeline: somewhere\n" + b"output_dir: x\n")
    assert cache.kind_of(["--config", str(teacher)]) is TeacherConfig
    teacher.write_bytes(b"# a comment\n{'pipeline': somewhere}\n")  # however the key is written
    assert cache.kind_of(["--config", str(teacher)]) is TeacherConfig
    student = tmp_path / "student.yaml"
    student.write_bytes(BOM + Path("configs/digits_vardiu.yaml").read_bytes())
    assert load_config(DistillConfig, str(student), []) == load_config(DistillConfig, "configs/digits_vardiu.yaml", [])
    options = tmp_path / "eval.yaml"
    options.write_bytes(BOM + b"protocol: custom\n")
    assert evaluation.parse(["metrics", "--config", str(options), "--output", "x"])[1].protocol == "custom"
    for name, text in (("a.txt", "a cat\n"), ("a.csv", "caption\na cat\n"), ("a.jsonl", '{"caption": "a cat"}\n')):
        (tmp_path / name).write_bytes(BOM + text.encode())
        assert read_rows(str(tmp_path / name), "caption", "data.file", "data.column") == ["a cat"]
    coco = {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    (tmp_path / "coco.json").write_bytes(BOM + json.dumps(coco).encode())
    assert read_captions(str(tmp_path / "coco.json")).texts == ("a cat",)
    (tmp_path / "baselines.yaml").write_bytes(BOM + b"- {protocol: custom, name: x, metrics: {fid: 1}, source: y}\n")
    assert read_baselines(str(tmp_path / "baselines.yaml"), "custom")[0]["name"] == "x"
    (tmp_path / "model_index.json").write_bytes(BOM + b'{"_class_name": "EDMPipeline"}')
    assert family_of(str(tmp_path)) == "edm"
    (tmp_path / "law.yaml").write_bytes(BOM + b"data: {name: mixture, means: [[0, 0], [3, 1]], std: 0.5}\n")
    assert read_law(str(tmp_path / "law.yaml"), tmp_path).shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a list"),
        (b"\xff{}", "is not UTF-8 text"),
    ],
    ids=["cut", "deep", "list", "bytes"],
)
def test_a_json_file_that_cannot_be_read_is_named(content, said, tmp_path):
    (tmp_path / "model_index.json").write_bytes(content)
    (tmp_path / "metrics.json").write_bytes(content)
    (tmp_path / "coco.json").write_bytes(content)
    for read in (
        lambda: read_json(tmp_path / "model_index.json", "copy it again"),
        lambda: read_index(str(tmp_path)),
        lambda: load_results(str(tmp_path)),
        lambda: read_captions(str(tmp_path / "coco.json")),
    ):
        with pytest.raises(UserError, match=rf"'{tmp_path}/\w+\.json' {said}"):
            read()


def test_results_of_another_version_are_said_to_be(tmp_path):
    (tmp_path / "metrics.json").write_text('{"metrics": {}, "protocol": {"name": "custom"}}')
    with pytest.raises(UserError, match=r"metrics.json is no metrics.json of an evaluation: 'extractors' is missing; give"):
        load_results(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("v1-5-pruned.safetensors", r"StableDiffusionPipeline.from_single_file\(\".*v1-5-pruned.safetensors\"\).save_pretrained"),
        ("model.ckpt", "from_single_file"),
        ("edm-cifar10.pkl", r"python -m scripts.convert_edm .*edm-cifar10.pkl <folder>"),
        ("sd/unet/diffusion_pytorch_model.safetensors", r"give the pipeline that it is a part of: '.*/sd'"),
        ("student/pytorch_lora_weights.safetensors", "give the folder that it lies in"),
    ],
)
def test_a_single_file_in_place_of_a_folder_is_told_the_way(name, way, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    (tmp_path / "sd").mkdir(exist_ok=True)
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    for load, key in ((family_of, "teacher.path"), (load_edm_teacher, "teacher.path"), (read_index, "the model")):
        with pytest.raises(UserError, match=f"^{key} is a single file, '{file}', expected a pipeline folder; .*{way}"):
            load(str(file))
    with pytest.raises(UserError, match=f"^the student is a single file, .*{way}"):
        find_student(file)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(OSError, match="Is a directory") as raised:
        read_text(tmp_path)
    assert message(raised.value) == f"{tmp_path}: Is a directory"
    with pytest.raises(OSError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")


# Few images ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "least"), [("fid", 2), ("kid", 2), ("fd_dinov2", 2), ("precision_recall", 4), ("inception_score", 10)]
)
def test_too_few_images_are_refused_before_they_are_measured(metric, least):
    protocol = PROTOCOLS["custom"].adjusted(None, None, [metric], force=True)
    protocol.require_images(least, "--images x")
    with pytest.raises(UserError, match=rf"^--images x: {least - 1} images?, {metric} needs at least {least}; add images"):
        protocol.require_images(least - 1, "--images x")


def test_one_image_has_a_score_and_no_spread():
    """The mean over one image is its score; a standard deviation over one is none, and JSON has no NaN."""
    gathered = Gathered(1, {})
    gathered.single["cosine"] = torch.tensor([0.25])
    found = compute(("clip_score",), gathered, None)
    assert found == {"clip_score": {"value": 0.25, "std_over_images": None}}
    json.dumps(found, allow_nan=False)
