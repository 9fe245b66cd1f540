"""report.html: one self-contained file, from the numbers of report.json and pictures that are already bytes."""

from __future__ import annotations

from html import escape
from typing import Any

from ...report.html import Picture, duration, section, study_page

COLUMNS = (
    "Method",
    "FD",
    "&times; base",
    "Energy distance",
    "Pixel std",
    "Right class",
    "Training",
    "Training calls",
    "Calls / image",
    "Sampling / image",
)
NOTHING = "&ndash;"  # in a cell without a value; a column of nothing else is left out

SECTIONS = (
    ("samples", "Samples", "The first 64 of each set (generated: in the order of their seeds), none picked."),
    ("fd", "FD while training", "Of each run's snapshots, on 2,000 images each (so a little above the table's figures)."),
    ("loss", "Losses", "Pale: as logged. Dark: running mean. Losses of different objectives share no scale."),
    (
        "ess",
        "Effective sample size by noise level",
        "How many latents share the weight in VarDiU's importance averages (logarithmic). At 1 only one counts: at those levels "
        "the average says no more than a single sample.",
    ),
    (
        "balance",
        "Class balance",
        "Share of each class, by the classifier's verdict on generated images; black marks: the real images.",
    ),
    (
        "neighbours",
        "Nearest real images",
        "Is anything copied? The first generated images, each above the real image that is nearest to it.",
    ),
)


def page(report: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """report: what report.json holds. pictures: those of each section; a section without any is left out."""
    body = f"""{_table(report)}
{"".join(section(title, text, pictures.get(key, [])) for key, title, text in SECTIONS)}
<h2>What the numbers mean</h2>
{_notes(report)}"""
    return study_page(f"Evaluation: {report['protocol']['name']}", report, "images", body, report["extractor"]["name"])


def _table(report: dict[str, Any]) -> str:
    floor, students = report["floor"], report["students"]
    real = [
        "Real images, two halves",
        f"{floor['fd']:.3f} &plusmn; {floor['fd_std']:.3f}",
        "",
        f"{floor['energy_distance']:.4f}",
        f"{report['protocol']['reference']['pixel_std']:.3f}",
        *[""] * (len(COLUMNS) - 5),
    ]
    rows = [("", real), ("", _row("Teacher", report["teacher"]))]
    best = min(students, key=lambda name: students[name]["fd"], default=None)
    for name, numbers in students.items():
        mark = ' class="best"' if name == best and len(students) > 1 else ""
        rows.append((mark, _row(escape(name), numbers)))
    used = [i for i in range(len(COLUMNS)) if any(cells[i] not in ("", NOTHING) for _, cells in rows)]
    head = "".join(f"<th>{COLUMNS[i]}</th>" for i in used)
    lines = "".join(f"<tr{mark}>{''.join(f'<td>{cells[i]}</td>' for i in used)}</tr>" for mark, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _row(name: str, numbers: dict[str, Any]) -> list[str]:
    calls = numbers["calls"]
    return [
        name,
        f"{numbers['fd']:.3f}",
        f"{numbers['fd_over_base']:.2f}",
        f"{numbers['energy_distance']:.4f}",
        f"{numbers['pixel_std']:.3f}",
        f"{numbers['label_accuracy']:.1%}" if "label_accuracy" in numbers else NOTHING,
        NOTHING if numbers["train_seconds"] is None else duration(numbers["train_seconds"]),
        NOTHING if not calls else _count(sum(calls.values())),
        f"{numbers['calls_per_image']:g}",
        duration(numbers["seconds_per_image"]),
    ]


def _count(number: float) -> str:
    """A number of calls, short.

    >>> _count(950), _count(12_340), _count(1_234_000), _count(5e9)
    ('950', '12.3 k', '1.2 M', '5.0 G')
    """
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= limit:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,.0f}"


def _notes(report: dict[str, Any]) -> str:
    floor, extractor = report["floor"], report["extractor"]
    n, m, half = report["protocol"]["n"], report["protocol"]["reference"]["n"], floor["half_size"]
    # The bias of FD goes with 1/n_a + 1/n_b, so the floor at half size carries over to the sizes compared here.
    perfect = floor["fd"] * (1 / n + 1 / m) / (1 / half + 1 / (m - half))
    notes = {
        "FD (Fréchet distance)": (
            "How far generated images are from real ones as distributions: a Gaussian is fitted to the features of "
            "each set, and the distance of the two is taken. Lower is better. It depends on the extractor and on the "
            "number of images, so compare it only within one protocol. FID is the same formula with another network: "
            f"these numbers are not FIDs. The extractor here recognises {extractor['accuracy']:.1%} of held-out images."
        ),
        "Floor": (
            "Equal distributions do not measure zero either, with finitely many images. Two random halves of the "
            f"real images ({half:,} each, mean of {floor['splits']} splits) are {floor['fd']:.3f} apart. With the numbers "
            f"of images compared in this table ({n:,} and {m:,}) a perfect generator would read about {perfect:.3f}, and "
            "one that repeats its training images still less: see the nearest real images."
        ),
        "× base": (
            "FD divided by the larger of the teacher's FD and the floor: 1 is as good as the teacher. Differences "
            "below the floor's spread mean nothing."
        ),
        "Energy distance": (
            "Compares raw pixels without any network: zero for equal distributions. It is unbiased, so it may fall "
            f"slightly below zero; between halves of the real images it is {floor['energy_distance']:.4f} with a "
            f"spread of {floor['energy_distance_std']:.4f}."
        ),
        "Pixel std": ("How much the images of one set differ from one another. Well below the real images' value: less variety."),
        "Training, training calls": (
            "Seconds the training loop took on its own machine, and how often any network in it was evaluated on one image."
        ),
        "Calls and sampling per image": (
            "Network evaluations for one image, as counted, and the time for one image in batches on the machine that "
            "made this report."
        ),
        "Nearest real images": (
            "A model that copied its training images would be nearer to real images than these are to each other. Of "
            "new images from the same distribution about 1% are nearer than the 1st percentile of real to real."
        ),
    }
    if any("label_accuracy" in numbers for numbers in (report["teacher"], *report["students"].values())):
        notes["Right class"] = (
            "How often the classifier sees the class that was asked for, where a model takes one; labels are drawn evenly."
        )
    items = "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in notes.items())
    return f"<dl>{items}</dl>"
