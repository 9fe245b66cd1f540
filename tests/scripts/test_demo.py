"""scripts/demo.py: what it draws, on the embedded teacher and a small EDM one; the page, where gradio and a browser are."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms.functional import pil_to_tensor

from eval.images.seeds import image_generator
from pipelines.common.errors import UserError
from pipelines.edm import EDMPipeline, EDMScheduler, EDMUNet
from pipelines.students import load_student, save_edm_student, save_text_to_image
from pipelines.text_to_image import load_pipeline
from pipelines.variance_preserving import one_step_scheduler
from scripts import demo
from trainers import distill

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "assets" / "emoji_sd"
APPLE = "red apple, noto style, on light blue"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CLASSES = 5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a real run: a LoRA of rank 2 on the embedded teacher, far enough from it to tell."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{APPLE}\n")
    sizes = ["steps=1", "batch_size=2", "micro_batch_size=2", "student.lora.rank=2", "objective.fake_score.lora.rank=2"]
    sizes += ["objective.fake_score.updates=1", "objective.fake_score.warmup_updates=0", "gradient_checkpointing=false"]
    changes = ["teacher.dtype=float32", "teacher.guidance_scale=2", "student.optimizer={lr: 0.1}", "sample_every=null"]
    where = [f"teacher.path={TEACHER}", f"data.file={prompts}", f"output_dir={folder / 'out'}"]
    AcceleratorState._reset_state(reset_partial_state=True)
    distill.main(["--config", str(ROOT / "configs/sd15_diff_instruct.yaml"), *where, *sizes, *changes])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "out"


@pytest.fixture(scope="module")
def whole_network(tmp_path_factory) -> Path:
    """A student with a network of its own: the teacher's."""
    pipe = load_pipeline(str(TEACHER))
    info = {"family": "sd", "weights": "unet", "readout_t": 999, "image_size": 32, "base_model": str(TEACHER)}
    info |= {"objective": "varflow", "guidance_scale": 1.0, "steps": 0}
    folder = tmp_path_factory.mktemp("whole") / "student"
    save_text_to_image(folder, StableDiffusionPipeline, one_step_scheduler(pipe.scheduler), info, network=pipe.unet)
    return folder


@pytest.fixture(scope="module")
def edm_student(tmp_path_factory) -> Path:
    """A student with classes and a network of its own beside its teacher, which is another network."""
    folder = tmp_path_factory.mktemp("edm")
    torch.manual_seed(5)
    for name, steps in (("teacher", 3), ("student", 1)):
        unet = EDMUNet(sample_size=8, model_channels=16, num_blocks=1, channel_mult=(1,), num_classes=CLASSES).eval()
        for weights in unet.parameters():
            if weights.abs().max() < 1e-3:  # zeros at the end of each block would hide the class
                torch.nn.init.normal_(weights, std=0.3)
        sampler = {"sampler": "renoise", "sigma_min": 2.5, "sigma_max": 2.5} if steps == 1 else {}
        pipe = EDMPipeline(unet, EDMScheduler(num_inference_steps=steps, **sampler))
        if name == "teacher":
            pipe.save_pretrained(folder / name)
    info = {
        "family": "edm",
        "weights": "unet",
        "base_model": str(folder / "teacher"),
        "objective": "varflow",
        "steps": 0,
        "readout_sigma": 2.5,
    }
    save_edm_student(folder / "student", pipe, info)
    return folder / "student"


def options(student: Path, **changes) -> Namespace:
    given = {"student": str(student), "prompt": [], "base_model": None, "teacher_steps": 2, "teacher_guidance": None}
    return Namespace(**given | {"dtype": "float32", "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def pair(run) -> demo.Pair:
    return demo.load_pair(options(run))


@pytest.fixture(scope="module")
def classes(edm_student) -> demo.Pair:
    return demo.load_pair(options(edm_student, teacher_steps=None))


def pixels(picture: Image.Image) -> torch.Tensor:
    """(c, h, w), whole numbers from 0 to 255 in float32."""
    return pil_to_tensor(picture).float()


def drawn(pair: demo.Pair, **inputs) -> list[torch.Tensor]:
    return [pixels(picture) for picture, _, _ in pair.draw(**inputs)]


# What a page may ask for -----------------------------------------------------------------------------------------------


def test_a_seed_is_a_whole_number():
    assert [demo.whole_seed(v) for v in (0, 7, 7.0, 2**32 - 1)] == [0, 7, 7, 2**32 - 1]
    for value in (1.5, -1, 2**32, 10**400, float("nan"), float("inf"), True, "7"):
        with pytest.raises(UserError, match=r"Seed is .*; expected a whole number from 0 to 4294967295"):
            demo.whole_seed(value)
    with pytest.raises(UserError, match="Seed is empty"):
        demo.whole_seed(None)


def test_a_lora_scale_has_a_range():
    assert [demo.lora_scale(v) for v in (0, 0.5, 1, 2)] == [0.0, 0.5, 1.0, 2.0]
    for value in (-0.1, 2.01, float("nan"), True, "1"):
        with pytest.raises(UserError, match=r"LoRA scale is .*; expected a number from 0 to 2"):
            demo.lora_scale(value)
    with pytest.raises(UserError, match="LoRA scale is empty"):
        demo.lora_scale(None)


def test_guidance_of_the_teacher():
    """As asked for; as distilled; VarFlow matches data, so what its teacher was told says nothing."""
    stored = {"objective": "vardiu", "guidance_scale": 1.75}
    assert demo.teacher_guidance(4.0, stored) == (4.0, "as asked for")
    assert demo.teacher_guidance(None, stored) == (1.75, "as the student was distilled")
    assert demo.teacher_guidance(None, stored | {"objective": "varflow"}) == (None, "its pipeline's default")
    assert demo.teacher_guidance(None, {"objective": "vardiu"}) == (None, "its pipeline's default")
    for value in ("3", True, float("inf")):
        with pytest.raises(UserError, match=r"guidance_scale is .*, no number; give --teacher-guidance"):
            demo.teacher_guidance(None, stored | {"guidance_scale": value})


def test_seconds_are_readable():
    assert [demo.seconds_text(s) for s in (0.0213, 0.9994, 1.26, 120.04)] == [
        "**0.021 s**",
        "**0.999 s**",
        "**1.3 s**",
        "**120.0 s**",
    ]


# Stable Diffusion ------------------------------------------------------------------------------------------------------


def test_both_start_from_the_noise_of_the_seed(pair):
    """What the networks are given first, not what the page says of it; the teacher with its guidance, so twice."""
    inputs: dict[str, list[torch.Tensor]] = {"student": [], "teacher": []}
    hooks = [
        getattr(pair, name).pipe.unet.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
        for name, seen in inputs.items()
    ]
    found = list(pair.draw(APPLE, seed=11, scale=1))
    for hook in hooks:
        hook.remove()
    z = torch.randn(1, *inputs["student"][0].shape[1:], generator=image_generator(11, 0))
    assert len(inputs["student"]) == 1
    assert len(inputs["teacher"]) >= 2
    assert_close(inputs["student"][0], z, rtol=0, atol=0)
    assert_close(inputs["teacher"][0], z.repeat(2, 1, 1, 1), rtol=0, atol=0)
    assert [picture.size for picture, _, _ in found] == [(32, 32), (32, 32)]
    assert all(seconds > 0 and note == "" for _, seconds, note in found)
    assert pair.teacher.call["guidance_scale"] == 2.0
    assert "2 steps of PNDMScheduler, guidance scale 2 (as the student was distilled)" in pair.about["teacher"]
    assert "a LoRA, distilled by `diff_instruct` in 1 updates; draws in one step" in pair.about["student"]


def test_the_scale_goes_from_the_teacher_to_the_student(pair, run):
    """0: one step of the teacher's own weights; 1: the student as `load_student` gives it; then the same again."""
    student, teacher = load_student(run), load_pipeline(str(TEACHER))
    teacher.scheduler = student.scheduler
    for scale, pipe in ((0, teacher), (1, student), (0, teacher)):
        call = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32, "generator": image_generator(3, 0)}
        expected = pixels(pipe(APPLE, **call).images[0])
        assert_close(drawn(pair, prompt=APPLE, seed=3, scale=scale)[0], expected, rtol=0, atol=1)
    assert (drawn(pair, prompt=APPLE, seed=3, scale=1)[0] - expected).abs().max() > 5


def test_prompts_may_be_empty_and_are_not_cut_in_silence(pair):
    assert len(list(pair.draw("", seed=0, scale=1))) == 2
    note = next(pair.draw("red apple " * 40, seed=0, scale=1))[2]
    most = pair.student.pipe.tokenizer.model_max_length
    assert note == f"The prompt is longer than the {most} tokens that are read; the rest is cut off."


def test_nothing_is_drawn_for_what_is_refused(pair):
    calls = []
    hook = pair.student.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for wrong in ({"seed": 0.5}, {"scale": 3}):
        with pytest.raises(UserError):
            next(pair.draw(APPLE, **wrong))
    hook.remove()
    assert not calls


def test_a_whole_network_has_no_scale(whole_network):
    """VarFlow's student: its teacher is guided as its pipeline would."""
    pair = demo.load_pair(options(whole_network, teacher_steps=None))
    assert not pair.has_scale
    assert pair.teacher.call["guidance_scale"] == 7.5
    assert "50 steps of PNDMScheduler, guidance scale 7.5 (its pipeline's default)" in pair.about["teacher"]


# EDM -------------------------------------------------------------------------------------------------------------------


def test_classes_in_place_of_prompts(classes):
    """Both networks draw the class that was chosen, from the seed's noise."""
    assert not classes.takes_prompt
    assert not classes.has_scale
    assert "3 steps of EDMScheduler, guidance scale 1 (its pipeline's default)" in classes.about["teacher"]
    pictures = []
    for label in (0, CLASSES - 1):
        found = drawn(classes, label=label, seed=7)
        for sampler, picture in zip((classes.student, classes.teacher), found, strict=True):
            expected = sampler.pipe(class_labels=[label], generator=image_generator(7, 0)).images[0]
            assert_close(picture, pixels(expected), rtol=0, atol=1)
        pictures.append(found)
    assert all((a - b).abs().max() > 5 for a, b in zip(*pictures, strict=True))


@pytest.mark.parametrize("label", [-1, CLASSES, None, 1.5])
def test_a_class_is_one_of_the_teachers(classes, label):
    with pytest.raises(UserError, match=r"class: .*, expected a whole number from 0 to 4"):
        next(classes.draw(label=label))


# Refused before anything is drawn --------------------------------------------------------------------------------------


def test_what_cannot_be_shown(edm_student, tmp_path):
    with pytest.raises(UserError, match=r"--prompt has no effect: .* takes no prompts"):
        demo.load_pair(options(edm_student, prompt=["a cat"]))
    with pytest.raises(FileNotFoundError, match="holds no student"):
        demo.load_pair(options(tmp_path))
    (tmp_path / "student.json").write_text('{"family": "edm", "teacher": "density", "base_model": "exact density"}')
    with pytest.raises(UserError, match="distilled from an exact teacher \\('density'\\): there is no model to show"):
        demo.load_pair(options(tmp_path))
    (tmp_path / "student.json").write_text('{"family": "edm"}')
    with pytest.raises(UserError, match="does not say 'base_model'"):
        demo.load_pair(options(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"the teacher of .*; give --base-model"):
        demo.load_pair(options(edm_student, base_model=str(tmp_path / "nowhere")))


def test_without_gradio(run, monkeypatch, capsys):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as left:
        demo.main([str(run)])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [
        'error: the page needs gradio, which is not installed: pip install "gradio>=6.31,<7" (or: pip install -e ".[demo]")'
    ]


def test_a_port_of_this_machine_alone():
    with demo.listen(0) as first:
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port {port} of 127.0.0.1 cannot be had .*--port 0"):
            demo.listen(port)
    with pytest.raises(UserError, match="--port 65536: expected at most 65535"):
        demo.listen(65536)


# The page --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gradio(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "")
    module = pytest.importorskip("gradio", reason="the page needs the extra `demo`")
    demo.prepare_gradio(tmp_path)
    return module


def fields(pair: demo.Pair, prompts: list[str]) -> set[str]:
    """The names of what can be filled in."""
    components = demo.page(pair, prompts).config["components"]
    return {c["props"].get("elem_id") for c in components} & {"prompt", "class", "seed", "scale"}


def test_the_page_asks_for_what_the_student_takes(gradio, pair, classes, whole_network):
    assert fields(pair, [APPLE]) == {"prompt", "seed", "scale"}
    assert fields(classes, []) == {"class", "seed"}
    assert fields(demo.load_pair(options(whole_network)), []) == {"prompt", "seed"}


def test_mistakes_are_words_on_the_page(gradio, pair):
    draw = demo.drawing(pair, ["prompt", "seed", "scale"])
    with pytest.raises(gradio.Error) as shown:
        next(draw(APPLE, 1.5, 1))
    assert shown.value.message == "Seed is 1.5; expected a whole number from 0 to 4294967295"
    first, last = list(draw(APPLE, 1, 1))
    assert first[2:] == (None, "drawing ...")
    assert re.fullmatch(r"one step: \*\*[\d.]+ s\*\*, \d+ times as fast. ", last[1])
    assert re.fullmatch(r"2 steps: \*\*[\d.]+ s\*\*", last[3])


def test_the_page_names_no_other_host(gradio, pair):
    """Nothing that a browser would load: no script, style, font or picture of elsewhere, and a policy that forbids all of it."""
    from starlette.testclient import TestClient

    elsewhere = r"""\s*["']?\s*(?:https?:)?//"""
    loads = rf"""(?:src|href)\s*={elsewhere}|url\({elsewhere}|@import|rel=["']?(?:preconnect|dns-prefetch)"""
    with TestClient(demo.application(pair, [APPLE]), base_url="http://127.0.0.1") as client:
        for path in ("/", "/theme.css"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert not re.findall(loads, answer.text)
            assert answer.headers["content-security-policy"].startswith("default-src 'self' ")
            assert "http" not in answer.headers["content-security-policy"]
        config = client.get("/config").json()
        assert config["footer_links"] == []
        assert config["run_history"] is False
        assert config["analytics_enabled"] is False
        assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
        assert client.get("/docs").status_code == 404


def test_two_pictures_in_a_browser(run, tmp_path):
    """The command as it is typed, a headless Chromium as the user: a prompt, a press, two pictures; a wrong seed, a sentence."""
    pytest.importorskip("gradio", reason="the page needs the extra `demo`")
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is steered by playwright")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}")
    command = [sys.executable, "-m", "scripts.demo", str(run), "--port", "0", "--teacher-steps", "3"]
    log = tmp_path / "log"
    with open(log, "w") as said, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=said, text=True) as server:
        try:
            address = re.match(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert address, log.read_text()
            hosts = look(playwright, browser, address[0])
            assert hosts == {address[0].split("/")[2]}
            pictures = list(Path(tempfile.gettempdir()).glob(f"demo_{server.pid}_*/**/*.png"))
            assert len(pictures) == 2
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()
    assert "Traceback" not in log.read_text()
    assert not list(Path(tempfile.gettempdir()).glob(f"demo_{server.pid}_*"))


def look(playwright, browser: str, address: str) -> set[str]:
    """Draws once, then asks for half a seed. -> the hosts that the browser has asked."""
    hosts: set[str] = set()
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as chromium:
        page = chromium.new_page()
        page.on("request", lambda request: hosts.update(re.findall(r"^\w+://([^/]+)", request.url)))
        page.goto(address)
        page.fill("#prompt textarea", APPLE)
        page.click("#draw")
        page.wait_for_selector("#teacher_seconds strong")
        for name in ("student", "teacher"):
            assert re.search(r"[\d.]+ s", page.inner_text(f"#{name}_seconds"))
            page.wait_for_function(f"document.querySelector('#{name} img')?.naturalWidth === 32")
            box = page.locator(f"#{name} img").bounding_box()
            assert min(box["width"], box["height"]) > 300
        page.fill("#seed input", "0.5")
        page.click("#draw")
        page.wait_for_selector(".toast-body")
        assert "Seed is 0.5; expected a whole number" in page.inner_text(".toast-body")
    return hosts
