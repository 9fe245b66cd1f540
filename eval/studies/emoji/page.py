"""report.html: the rows of its table, from the numbers of report.json; sentences and markup: report/templates/."""

from __future__ import annotations

from typing import Any

from ...content import steps_in
from ...report.html import Picture, duration, render

COLUMNS = ("Method", "FD-CLIP-mini", "× teacher", "CLIP score", "× teacher", "Time / image", "Faster", "Training")

NEXT = """# your prompts, a line each, in prompts.txt; a GPU helps
accelerate launch -m trainers.distill --config configs/sd15_vardiu.yaml data.file=prompts.txt

# the student in a stock pipeline, one network call
from diffusers import LCMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
pipe.load_lora_weights("outputs/sd15_vardiu/student")
pipe.scheduler = LCMScheduler.from_pretrained("outputs/sd15_vardiu/student", subfolder="scheduler")
image = pipe("a red bicycle", num_inference_steps=1, guidance_scale=1.0).images[0]

# FID and CLIP score of it: docs/evaluation.md
python -m eval run --config configs/eval/coco30k.yaml --model outputs/sd15_vardiu --output outputs/eval/sd15_vardiu"""


def page(report: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """The HTML. report: what report.json holds; pictures: those of each section (samples, time, loss), of which an empty one is
    left out.
    """
    real, teacher, students = report["real"], report["teacher"], report["students"]
    rows = [
        [title, f"{numbers['fd']:.4f}", "", f"{numbers['clip_score']:.3f}", "", "", "", ""]
        for title, numbers in (("Real pictures, two halves", real), ("Real pictures, held out", real["held_out"]))
    ]
    rows.append(_row(f"Teacher, {teacher['call']['num_inference_steps']} steps", teacher))
    rows.append(_row("Teacher, 1 step", report["teacher_one_step"]))
    fds = [numbers["fd"] for numbers in students.values()]
    best = len(rows) + fds.index(min(fds)) if len(fds) > 1 else None
    steps = {name: steps_in(numbers["call"]) or 1 for name, numbers in students.items()}
    rows += [_row(name if steps[name] == 1 else f"{name}, {steps[name]} steps", numbers) for name, numbers in students.items()]
    heading = "One step" if set(steps.values()) <= {1} else "Few steps"
    shown = {"report": report, "pictures": pictures, "columns": COLUMNS, "rows": rows, "best": best, "next": NEXT}
    return render("emoji.html", heading=heading, **shown)


def _row(name: str, numbers: dict[str, Any]) -> list[str]:
    ratios = ("fd_over_teacher", "{:.2f}"), ("clip_score_over_teacher", "{:.2f}"), ("times_faster", "{:.0f} ×")
    fd, score, faster = (form.format(numbers[key]) if key in numbers else "" for key, form in ratios)
    trained = numbers.get("train_seconds")
    cells = [name, f"{numbers['fd']:.4f}", fd, f"{numbers['clip_score']:.3f}", score]
    return [*cells, duration(numbers["seconds_per_image"]), faster, "" if trained is None else duration(trained)]
