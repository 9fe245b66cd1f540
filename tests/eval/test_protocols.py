"""What a protocol fixes, what may be changed and what then is said; captions; weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.images.captions import read_captions
from eval.networks import weights
from eval.networks.weights import FILES, File, find, weights_dir
from eval.protocols import METRICS, PROTOCOLS, get_protocol
from eval.report.results import TITLES

ROOT = Path(__file__).parents[2]


def test_published_protocols():
    cifar, coco, sdxl = (PROTOCOLS[name] for name in ("cifar10-50k", "coco-30k", "coco-10k-512"))
    assert (cifar.num_images, cifar.size, cifar.inception, cifar.draws, cifar.report) == (
        50_000,
        32,
        "legacy_tensorflow",
        3,
        "min",
    )
    assert (coco.num_images, coco.crop_to, coco.inception, coco.clip_prefix) == (30_000, 256, "clean", "A photo depicts ")
    assert (sdxl.num_images, sdxl.crop_to, sdxl.clip_crop) == (10_000, 512, 256)
    assert "patch_fid" in sdxl.metrics
    # DMD2, both on SD 1.5 and on SDXL: the cosine of ViT-g-14 with the caption behind these words
    assert {(p.clip_model, p.clip_prefix) for p in (coco, sdxl)} == {("open_clip:ViT-g-14:laion2b_s12b_b42k", "A photo depicts ")}
    assert (PROTOCOLS["coco-5k"].clip_prefix, PROTOCOLS["custom"].clip_prefix) == ("", "")
    for protocol in PROTOCOLS.values():
        assert set(protocol.metrics) <= METRICS.keys()
        assert protocol.departures() == []


def test_every_number_has_a_title():
    assert {*METRICS} - {"precision_recall"} <= TITLES.keys()


def test_departures_are_said():
    protocol = get_protocol("coco-30k").adjusted(5_000, 2, None, force=True)
    assert protocol.departures(1_000) == [
        "5,000 images instead of 30,000",
        "2 of 1 draws",
        "a reference of 1,000 images instead of 40,504",
    ]


def test_another_number_needs_force():
    with pytest.raises(ValueError, match=r"--num-images is 5,000 but protocol coco-30k has 30,000.*add --force"):
        get_protocol("coco-30k").adjusted(5_000, None, None, force=False)
    assert get_protocol("custom").adjusted(7, None, None, force=False).num_images == 7
    with pytest.raises(ValueError, match="--num-images is 1; statistics need at least 2"):
        get_protocol("custom").adjusted(1, None, None, force=False)


def test_names_are_suggested():
    with pytest.raises(ValueError, match="unknown protocol 'coco30k'; did you mean 'coco-30k'"):
        get_protocol("coco30k")
    with pytest.raises(ValueError, match="--metrics: unknown 'fido'; did you mean 'fid'"):
        get_protocol("custom").adjusted(7, None, ["fido"], force=False)


# Captions --------------------------------------------------------------------------------------------------------------


def test_coco_captions_by_image_and_annotation_id(tmp_path):
    file = tmp_path / "captions_val2017.json"
    images = [{"id": 9}, {"id": 2}]
    annotations = [
        {"id": 31, "image_id": 9, "caption": "later"},
        {"id": 30, "image_id": 9, "caption": "nine"},
        {"id": 40, "image_id": 2, "caption": "two"},
    ]
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert read_captions(str(file)).texts == ("two", "nine")


def test_numbers_are_captions(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"caption": 7}\n{"caption": [1984, "x"]}\n')
    assert read_captions(str(tmp_path / "x.jsonl")).texts == ("7", "1984")
    (tmp_path / "x.csv").write_text("caption\n7\n007\n")
    assert read_captions(str(tmp_path / "x.csv")).texts == ("7", "007")


def test_first_of_several_captions(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"caption": ["a", "b"]}\n{"caption": "c"}\n')
    captions = read_captions(str(file))
    assert captions.texts == ("a", "c")
    assert captions.first(1).texts == ("a",)
    with pytest.raises(ValueError, match="has captions for 2 images, 3 are needed"):
        captions.first(3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"caption": "a"}\n{"caption": []}\n', "image 1 of .* has no caption"),
        ("x.jsonl", '{"text": "a"}\n', "--caption-column: no column 'caption'"),
        ("x.txt", "a\n\nb\n", "image 1 of .* has no caption"),
        ("x.txt", "", "has no captions in it"),
        ("x.csv", "caption,id\na cat, on a mat,1\n", "--captions: cannot read .* line 2 has more cells than the header"),
        ("x.jsonl", '{"caption": true}\n', "image 0 of .* has no caption"),
        ("x.json", "{}", "is no COCO captions file"),
        ("x.json", "half", "is no COCO captions file"),
        ("x.pkl", "", "is none of .txt, .csv, .jsonl, .parquet"),
    ],
)
def test_captions_that_are_none(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="--captions: no such file"):
        read_captions(str(tmp_path / "absent.json"))


# Weights ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_where_weights_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv(weights.WEIGHTS_DIR, raising=False)
    assert weights_dir() == Path.home() / ".cache" / "one-step-distill"
    monkeypatch.setenv(weights.WEIGHTS_DIR, str(tmp_path))
    assert weights_dir() == tmp_path
    assert weights_dir("given") == Path("given")


def test_known_file_is_checked(monkeypatch, tmp_path, offline):
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of "test"
    monkeypatch.setitem(FILES, "inception", File("net.pt", "https://x.invalid/net.pt", digest, ("{torch}/net.pt",)))
    (tmp_path / "net.pt").write_text("test")
    assert find("inception", None, tmp_path).describe() == {"file": "net.pt", "sha256": digest, "published": True}
    (tmp_path / "net.pt").write_text("toast")
    with pytest.raises(ValueError, match=f"the published file {digest}: it is damaged or another one"):
        find("inception", None, tmp_path)
    (tmp_path / "net.pt").unlink()
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "net.pt").write_text("test")
    assert find("inception", None, tmp_path).path == cache / "net.pt"  # another library's copy


def test_a_download_is_checked(monkeypatch, tmp_path):
    """What arrives is another file's bytes, as a login page or a broken copy would be: it is not taken for the published one."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    there, here = tmp_path / "there.pt", tmp_path / "here"
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of "test"
    monkeypatch.setitem(FILES, "inception", File("net.pt", there.as_uri(), digest, ()))
    there.write_text("<html>")
    with pytest.raises(ValueError, match=f"the published file {digest}: it is damaged or another one. Remove it"):
        find("inception", None, here)
    (here / "net.pt").unlink()
    there.write_text("test")
    assert find("inception", None, here).describe() == {"file": "net.pt", "sha256": digest, "published": True}
    assert [f.name for f in here.iterdir()] == ["net.pt"]


@pytest.mark.parametrize("key", ["inception", "inception_pytorch", "aesthetic"])
def test_missing_file_offline(key, tmp_path, offline):
    with pytest.raises(FileNotFoundError) as error:
        find(key, None, tmp_path / "weights")
    message = str(error.value)
    for part in (
        FILES[key].name,
        FILES[key].url,
        FILES[key].sha256,
        str(tmp_path / "weights"),
        "ONE_STEP_WEIGHTS",
        "HF_HUB_OFFLINE",
    ):
        assert part in message
    assert len(FILES[key].sha256) == 64


@pytest.mark.parametrize("name", [*weights.MODELS, *weights.OPEN_CLIP_FILES])
def test_missing_model_offline(name, tmp_path, offline):
    with pytest.raises(FileNotFoundError, match=r"https://huggingface.co/.*, sha256 [0-9a-f]{64}\. Put it there .*weights-dir"):
        find(name, None, tmp_path)


def test_model_in_the_folder(networks, tmp_path, offline):
    (tmp_path / "openai--clip-vit-large-patch14").symlink_to(networks.clip)
    found = find("openai/clip-vit-large-patch14", None, tmp_path)
    assert found.path.name == "openai--clip-vit-large-patch14"
    assert not found.published  # by its name, but not by its sha256
    (tmp_path / "ViT-g-14-laion2b_s12b_b42k.bin").write_text("x")
    assert find("open_clip:ViT-g-14:laion2b_s12b_b42k", None, tmp_path).path.name == "ViT-g-14-laion2b_s12b_b42k.bin"


def test_given_files(networks, tmp_path):
    assert find("inception", str(networks.inception), tmp_path).published is False
    with pytest.raises(FileNotFoundError, match="no such file or folder 'absent'"):
        find("inception", "absent", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor pytorch_model.bin"):
        find("facebook/dinov2-large", str(tmp_path), tmp_path)


def test_missing_weights_are_said_at_once(tmp_path):
    """Before torch is imported, let alone anything generated."""
    code = f"""
import sys
from eval.__main__ import main
options = "run --protocol coco-30k --model a/b --reference c --captions {tmp_path}/c.txt --output {tmp_path}/out"
assert main(options.split()) == 2
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    (tmp_path / "c.txt").write_text("a cat\n" * 30_000)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ONE_STEP_WEIGHTS": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "inception-2015-12-05.pt is in none of" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(f.name for f in (ROOT / "configs" / "eval").glob("*.yaml")))
def test_shipped_configurations(name, monkeypatch, tmp_path, capsys, offline):
    """Every option is known and fits its protocol: all that is missing here are files, and the first of them is named."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ONE_STEP_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert main(["run", "--config", f"configs/eval/{name}", "--model", "a/b", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    wanted = "--captions: no such file" if "coco" in name else "inception-2015-12-05.pt is in none of"
    assert wanted in error
    assert not (tmp_path / "out").exists()


def test_the_prefix_of_a_protocol_reaches_its_network(networks, tmp_path):
    """CLIP is asked for DMD2's words and the caption, not for the caption alone."""
    from eval.metrics.measure import build, plan

    protocol = replace(PROTOCOLS["coco-10k-512"], metrics=("clip_score",), clip_model="openai/clip-vit-large-patch14")
    made = build(plan(protocol, {"clip": str(networks.clip)}, tmp_path), "cpu")
    assert made["clip"].describe()["prefix"] == "A photo depicts "
