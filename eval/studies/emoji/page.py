"""report.html: one self-contained file, from the numbers of report.json and pictures that are already bytes."""

from __future__ import annotations

from html import escape
from typing import Any

from ...report.html import Picture, duration, section, study_page

COLUMNS = ("Method", "FD-CLIP-mini", "&times; teacher", "CLIP score", "&times; teacher", "Time / image", "Faster", "Training")

SECTIONS = (
    ("samples", "Samples", "The first prompts, none picked, and for each column the same noise in all rows."),
    ("time", "Quality against time", "Seconds an image on one core; left of the teacher is faster."),
    ("loss", "Losses", "Pale: as logged. Dark: running mean. Losses of different objectives share no scale."),
)

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
    """report: what report.json holds. pictures: those of each section; a section without any is left out."""
    body = f"""{_table(report)}
{"".join(section(title, text, pictures.get(key, [])) for key, title, text in SECTIONS)}
<h2>What the numbers mean</h2>
{_notes(report)}
<h2>Next: your own Stable Diffusion</h2>
<pre>{escape(NEXT)}</pre>"""
    return study_page(
        f"One step instead of {report['teacher']['call']['num_inference_steps']}",
        report,
        "pictures",
        body,
        report["extractor"]["network"],
    )


def _table(report: dict[str, Any]) -> str:
    real, students = report["real"], report["students"]
    held_out = real["held_out"]
    rows = [
        ("", ["Real pictures, two halves", f"{real['fd']:.4f}", "", f"{real['clip_score']:.3f}", "", "", "", ""]),
        ("", ["Real pictures, held out", f"{held_out['fd']:.4f}", "", f"{held_out['clip_score']:.3f}", "", "", "", ""]),
        ("", _row(f"Teacher, {report['teacher']['call']['num_inference_steps']} steps", report["teacher"])),
        ("", _row("Teacher, 1 step", report["teacher_one_step"])),
    ]
    best = min(students, key=lambda name: students[name]["fd"], default=None)
    for name, numbers in students.items():
        mark = ' class="best"' if name == best and len(students) > 1 else ""
        rows.append((mark, _row(escape(name), numbers)))
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    lines = "".join(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for mark, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _row(name: str, numbers: dict[str, Any]) -> list[str]:
    ratios = ("fd_over_teacher", "{:.2f}"), ("clip_score_over_teacher", "{:.2f}"), ("times_faster", "{:.0f} &times;")
    fd, score, faster = (form.format(numbers[key]) if key in numbers else "" for key, form in ratios)
    trained = numbers.get("train_seconds")
    cells = [name, f"{numbers['fd']:.4f}", fd, f"{numbers['clip_score']:.3f}", score]
    return [*cells, duration(numbers["seconds_per_image"]), faster, "" if trained is None else duration(trained)]


def _notes(report: dict[str, Any]) -> str:
    real, teacher, machine = report["real"], report["teacher"], report["machine"]
    call = teacher["call"]
    kept = (
        f"Its FD and CLIP score are kept in {teacher['measured']}: measured once, in {duration(teacher['seconds_to_measure'])}, "
        "with the weights, prompts and settings of this page."
        if teacher["measured"] != "now"
        else f"Its FD and CLIP score were measured for this page, in {duration(teacher['seconds_to_measure'])}; they are kept."
    )
    notes = {
        "FD-CLIP-mini": (
            "How far the pictures are from real ones as distributions: a Gaussian is fitted to the embedded CLIP's features of "
            "each set, and the Fréchet distance of the two is taken. Lower is better. It is the formula of FID with another, "
            "small network: no FID, and to be compared only within this protocol."
        ),
        "CLIP score": "The mean cosine of a picture and its caption, by the same network. Higher is better.",
        "Real pictures": (
            f"For scale. Two random halves of the {real['n']:,} reference pictures (mean of {real['splits']} splits; CLIP score: "
            f"of all, with their own captions), and {real['held_out']['n']:,} of emoji that neither the teacher nor CLIP "
            "has learned from. With finitely many pictures no set measures zero."
        ),
        f"Teacher, {call['num_inference_steps']} steps": (
            f"{teacher['scheduler']} with guidance {call['guidance_scale']:g}. {kept} Its time and its pictures are of now."
        ),
        "Teacher, 1 step": "The teacher called as its students are: their scheduler, one network call, no guidance.",
        "Time / image": (
            f"Text encoder, network calls and decoder on one core, {report['protocol']['batch_size']} rows a network call, "
            "measured in this run for all rows of the table, with nothing beside it. Of it "
            f"{duration(machine['text_seconds_per_image'])} are the text encoder's, "
            f"{duration(machine['decoder_seconds_per_image'])} the decoder's."
        ),
    }
    items = "".join(f"<dt>{escape(title)}</dt><dd>{text}</dd>" for title, text in notes.items())
    return f"<dl>{items}</dl>"
