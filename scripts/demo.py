"""A page to play with: a student beside its teacher, from the same noise, with the seconds each takes.

    pip install -e ".[demo]"
    python -m scripts.demo outputs/sd15_vardiu

It is served to this machine alone (127.0.0.1), and its own policy forbids the browser to ask any other host for anything.
"""

from __future__ import annotations

import argparse
import html
import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from eval.content import steps_in
from eval.images.sampler import DTYPES, Sampler, load_sampler
from pipelines.common.errors import USER_ERRORS, UserError, message, shown
from pipelines.common.launch import user_errors
from pipelines.common.options import finite, path_option, whole
from pipelines.edm import PointNet
from pipelines.kinds import KINDS, kind_named, kind_of, network_of
from pipelines.peft_layers import layers_with_adapters
from pipelines.students import find_student, read_info
from pipelines.text_to_image import levels_of, overlong, steps_text

HOST = "127.0.0.1"
LAST_PORT = 2**16 - 1
MOST_SEED = 2**32 - 1  # what PyTorch's generator on the CPU keeps of a seed
MOST_SCALE = 2.0
GRADIO = 'pip install "gradio>=6.31,<7" (or: pip install -e ".[demo]")'
# What the browser may load: from this server, or written in the page itself. Gradio's own scripts are inline.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
FONTS = (("system-ui", "sans-serif"), ("ui-monospace", "monospace"))  # the reader's own
# A small picture fills its frame too; enlarged smoothly, as the browser does it.
CSS = """
.gradio-container { max-width: 880px !important; margin: 0 auto !important; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain; }
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=path_option, help="a run's output_dir, a student/ folder or a hub id")
    parser.add_argument("--prompt", action="append", default=[], help="one to start with; several: to choose from")
    parser.add_argument("--base-model", type=path_option, help="where the teacher lies now, if not where it was")
    parser.add_argument("--teacher-steps", type=whole(1), help="default: its pipeline's own, 50 of a Stable Diffusion")
    parser.add_argument("--teacher-guidance", type=finite, help="default: what the student was distilled from, if that is known")
    parser.add_argument("--port", type=whole(0), default=7860, help="of 127.0.0.1; 0: any that is free")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    with user_errors(), tempfile.TemporaryDirectory(prefix=f"demo_{os.getpid()}_") as pictures:
        prepare_gradio(Path(pictures))
        with listen(args.port) as listening:
            serve(application(load_pair(args), args.prompt), listening)


def prepare_gradio(pictures: Path) -> None:
    """Import it with telemetry off, and with a folder for the pictures it serves that ends with this process (its own default is
    one for all users of the machine). UserError where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and again for each page
    os.environ["GRADIO_TEMP_DIR"] = str(pictures)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "gradio"
        reason = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise UserError(f"the page needs gradio, {reason}: {GRADIO}") from error


def listen(port: int) -> socket.socket:
    """The socket of the page: taken before models are loaded, on 127.0.0.1, which no other machine reaches."""
    other = "give another --port, or --port 0 for any that is free"
    if port > LAST_PORT:
        raise UserError(f"--port {port}: expected at most {LAST_PORT}; {other}")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"--port {port} of {HOST} cannot be had ({os.strerror(error.errno or 0)}); {other}") from error


@dataclass
class Pair:
    """A student and its teacher. about: a line of Markdown on each."""

    student: Sampler
    teacher: Sampler
    about: dict[str, str]

    @property
    def has_scale(self) -> bool:
        """Whether the student is a LoRA, which can be put on by more or less than as it was trained."""
        return "student" in getattr(network_of(self.student.pipe), "peft_config", {})

    @property
    def student_steps(self) -> int:
        """Those that it was trained for."""
        return steps_in(self.student.call) or 1

    @property
    def num_classes(self) -> int:
        return self.student.num_classes

    @property
    def takes_prompt(self) -> bool:
        return self.student.takes == "prompt"

    def draw(self, prompt: str = "", label: int | None = None, seed: Any = 0, scale: Any = 1.0) -> Iterator[tuple]:
        """(picture, seconds, note) of the student, then of the teacher, from the noise of that seed. UserError for a seed, scale
        or label that is none, before anything is drawn.
        """
        seed = whole_seed(seed)
        if self.num_classes and not (isinstance(label, int) and 0 <= label < self.num_classes):
            raise UserError(f"class: {shown(label)}, expected a whole number from 0 to {self.num_classes - 1}")
        if self.has_scale:
            strength = lora_scale(scale)
            for layer in layers_with_adapters(network_of(self.student.pipe)).values():
                layer.set_scale("student", strength)
        note = self._note(prompt) if self.takes_prompt else ""
        for sampler in (self.student, self.teacher):
            yield *timed(sampler, prompt, label, seed), note

    def _note(self, prompt: str) -> str:
        if not overlong(self.student.pipe, [prompt]):
            return ""
        most = kind_of(self.student.pipe).most_tokens(self.student.pipe)[1]
        return f"The prompt is longer than the {most} tokens that are read; the rest is cut off."


def timed(sampler: Sampler, prompt: str, label: int | None, seed: int) -> tuple[Image.Image, float]:
    """(the picture of that seed, seconds). It ends with a copy to the CPU, which waits for the device."""
    captions = [prompt] if sampler.takes == "prompt" else None
    labels = [label] if sampler.num_classes else None
    start = time.perf_counter()
    pixels = sampler([0], seed, captions, labels)[0]
    return to_pil_image(pixels), time.perf_counter() - start


def whole_seed(value: Any) -> int:
    """A number of the page as a seed. UserError where it is empty, no whole number or out of range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= MOST_SEED or value != int(value):
        found = "is empty" if value is None else f"is {shown(value)}"
        raise UserError(f"Seed {found}; expected a whole number from 0 to {MOST_SEED}")
    return int(value)


def lora_scale(value: Any) -> float:
    """A number of the page as the strength of a LoRA: 0 leaves the teacher's weights, 1 is the student as trained."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MOST_SCALE:
        found = "is empty" if value is None else f"is {shown(value)}"
        raise UserError(f"LoRA scale {found}; expected a number from 0 to {MOST_SCALE:g}")
    return float(value)


def teacher_guidance(given: float | None, info: dict[str, Any]) -> tuple[float | None, str]:
    """(guidance scale of the teacher, None for its pipeline's own; why that one). info: student.json.

    VarFlow matches data: its teacher's scale plays no part in it.
    """
    if given is not None:
        return given, "as asked for"
    stored = info.get("guidance_scale")
    if stored is None or info.get("objective") == "varflow":
        return None, "its pipeline's default"
    if isinstance(stored, bool) or not isinstance(stored, int | float) or not math.isfinite(stored):
        raise UserError(f"student.json: guidance_scale is {shown(stored)}, no number; give --teacher-guidance")
    family = info.get("family")
    scale = kind_named(family).stock_guidance(stored) if family in KINDS else float(stored)
    return scale, "as the student was distilled"


def load_pair(args: argparse.Namespace) -> Pair:
    """Both models, the student's first picture drawn: what is slow once only is not part of the seconds shown."""
    folder = find_student(args.student)
    info = read_info(folder, "student")
    base = args.base_model or info.get("base_model")
    if "teacher" in info:
        exact = f"distilled from an exact teacher ({shown(info['teacher'])})"
        origin = "trained from scratch" if info["teacher"] is None else exact
        raise UserError(f"{str(folder)!r} was {origin}: there is no model to show beside it")
    if not isinstance(base, str):
        raise UserError(f"{str(folder / 'student.json')!r} does not say 'base_model'; save or copy the student again")
    own_network = info.get("family") == "edm" and info.get("weights") != "lora"
    how = {"dtype": args.dtype, "device": args.device}
    student = load_sampler(str(folder), base_model=None if own_network else args.base_model, **how)
    if isinstance(getattr(student.pipe, "unet", None), PointNet):
        raise UserError(f"{str(folder)!r} makes points, not pictures; `python -m eval points` draws them")
    guidance, why = teacher_guidance(args.teacher_guidance, info)
    if args.teacher_guidance is not None and not (student.num_classes or student.takes == "prompt"):
        raise UserError("--teacher-guidance has no effect: the teacher is unconditional; remove it")
    if args.prompt and student.takes != "prompt":
        raise UserError(f"--prompt has no effect: {str(folder)!r} takes no prompts; remove it")
    try:
        size = info.get("image_size") if student.takes == "prompt" else None
        teacher = load_sampler(base, steps=args.teacher_steps, guidance_scale=guidance, image_size=size, **how)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the teacher of {str(folder)!r}: {message(error)}; give --base-model") from error
    pair = Pair(student, teacher, {"student": about_student(info), "teacher": about_teacher(base, teacher, why)})
    timed(student, "", 0, 0)
    return pair


def about_student(info: dict[str, Any]) -> str:
    how = "a LoRA" if info.get("weights") == "lora" else "a network of its own"
    trained = f"distilled by `{info.get('objective')}` in {info.get('steps')} updates"
    return f"**Student**: {how}, {trained}; draws in {steps_text(len(levels_of(info)))}."


def about_teacher(base: str, teacher: Sampler, why: str) -> str:
    steps, guidance = teacher.call["num_inference_steps"], teacher.call.get("guidance_scale")
    guided = f", guidance scale {guidance:g} ({why})" if teacher.takes != "nothing" and guidance is not None else ""
    return f"**Teacher**: `{base}`; {steps} steps of {type(teacher.pipe.scheduler).__name__}{guided}."


def seconds_text(seconds: float) -> str:
    return f"**{seconds:.3f} s**" if seconds < 1 else f"**{seconds:.1f} s**"


def page(pair: Pair, prompts: list[str]) -> Any:
    """The gradio.Blocks. prompts: the first stands in the box, all of them below it."""
    import gradio as gr

    with gr.Blocks(title="Student and teacher", analytics_enabled=False) as blocks:
        about = "".join(f"- {line}\n" for line in (*pair.about.values(), "Both start from the same noise, the seed's."))
        gr.Markdown(f"# {steps_text(pair.student_steps).capitalize()} beside many\n\n{about}")
        inputs: dict[str, Any] = {}
        if pair.takes_prompt:
            box = {"label": "Prompt", "max_lines": 4, "autofocus": True, "elem_id": "prompt"}
            inputs["prompt"] = gr.Textbox(value=prompts[0] if prompts else "", placeholder="what to draw", **box)
        with gr.Row():
            if pair.num_classes:
                inputs["label"] = gr.Dropdown(list(range(pair.num_classes)), value=0, label="Class", elem_id="class")
            inputs["seed"] = gr.Number(value=0, label="Seed", info="a whole number", elem_id="seed")
            if pair.has_scale:
                info = "1: as trained; 0: the teacher's weights"
                inputs["scale"] = gr.Slider(0, MOST_SCALE, 1, step=0.05, label="LoRA scale", info=info, elem_id="scale")
        if len(prompts) > 1:
            gr.Examples(prompts, inputs["prompt"], label="Prompts")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        outputs = []
        with gr.Row():
            for name in ("Student", "Teacher"):
                with gr.Column():
                    shape = {"height": 384, "format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                    said = gr.Markdown(elem_id=f"{name.lower()}_seconds")
                    outputs += [gr.Image(label=name, elem_id=name.lower(), elem_classes="picture", **shape), said]
        triggers = [button.click, *([inputs["prompt"].submit] if pair.takes_prompt else [])]
        options = {"api_visibility": "private", "concurrency_limit": 1, "trigger_mode": "once"}
        gr.on(triggers, drawing(pair, list(inputs)), list(inputs.values()), outputs, **options)
    return blocks


def drawing(pair: Pair, names: list[str]) -> Any:
    """What the button does: the student's picture and seconds as soon as they are there, then the teacher's beside them."""
    import gradio as gr

    def draw(*values: Any) -> Iterator[tuple]:
        try:
            pictures = pair.draw(**dict(zip(names, values, strict=True)))
            picture, quick, note = next(pictures)
            said = f"{steps_text(pair.student_steps)}: {seconds_text(quick)}"
            yield picture, f"{said} {note}", None, "drawing ..."
            other, slow, _ = next(pictures)
            steps = pair.teacher.call["num_inference_steps"]
            yield picture, f"{said}, {slow / quick:.0f} times as fast. {note}", other, f"{steps} steps: {seconds_text(slow)}"
        except USER_ERRORS as error:
            # gradio shows the text of an error as HTML
            raise gr.Error(html.escape(message(error)), duration=None, print_exception=False) from error

    return draw


class OwnHostOnly:
    """ASGI middleware: every answer carries POLICY."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def with_policy(event: dict) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", POLICY.encode())]
            await send(event)

        await self.app(scope, receive, with_policy)


def application(pair: Pair, prompts: list[str]) -> Any:
    """The page as an ASGI application: no links to other sites, no fonts of theirs, no record of what was drawn."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    app.add_middleware(OwnHostOnly)
    # A page of another site, whose name somebody has pointed at 127.0.0.1, is not answered.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    font, font_mono = ([gr.themes.Font(name) for name in names] for names in FONTS)
    theme = gr.themes.Base(font=font, font_mono=font_mono)
    off = dict.fromkeys(("run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False) | {"footer_links": []}
    return gr.mount_gradio_app(app, page(pair, prompts), path="/", server_name=HOST, theme=theme, css=CSS, **off)


def serve(app: Any, listening: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    import uvicorn

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends and then raises it again: no file is left behind

    print(f"http://{HOST}:{listening.getsockname()[1]}/ (for this machine only; Ctrl-C ends it)", flush=True)
    # An open page keeps a connection open: not waited for at the end.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
