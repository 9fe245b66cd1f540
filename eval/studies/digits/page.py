"""report.html: the rows of its table, from the numbers of report.json; sentences and markup: report/templates/."""

from __future__ import annotations

from typing import Any

from ...report.html import Picture, duration, render

NOTHING = "–"  # in a cell without a value; a column of nothing else is left out


def page(report: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """The HTML. report: what report.json holds; pictures: those of each section (samples, fd, loss, ess, balance, neighbours), of
    which an empty one is left out.
    """
    floor, students, protocol = report["floor"], report["students"], report["protocol"]
    real = {"Method": "Real images, two halves", "FD": f"{floor['fd']:.3f} ± {floor['fd_std']:.3f}"}
    real |= {"Energy distance": f"{floor['energy_distance']:.4f}", "Pixel std": f"{protocol['reference']['pixel_std']:.3f}"}
    rows = [real, _row("Teacher", report["teacher"])]
    fds = [numbers["fd"] for numbers in students.values()]
    best = len(rows) + fds.index(min(fds)) if len(fds) > 1 else None
    rows += [_row(name, numbers) for name, numbers in students.items()]
    columns = [column for column in rows[1] if any(row.get(column, NOTHING) != NOTHING for row in rows)]
    # The bias of FD goes with 1/n_a + 1/n_b, so the floor at half size carries over to the sizes compared here.
    n, m, half = protocol["n"], protocol["reference"]["n"], floor["half_size"]
    return render(
        "digits.html",
        report=report,
        pictures=pictures,
        columns=columns,
        rows=[[row.get(column, "") for column in columns] for row in rows],
        best=best,
        perfect=floor["fd"] * (1 / n + 1 / m) / (1 / half + 1 / (m - half)),
    )


def _row(name: str, numbers: dict[str, Any]) -> dict[str, str]:
    """Column -> cell."""
    calls, trained = numbers["calls"], numbers["train_seconds"]
    return {
        "Method": name,
        "FD": f"{numbers['fd']:.3f}",
        "× base": f"{numbers['fd_over_base']:.2f}",
        "Energy distance": f"{numbers['energy_distance']:.4f}",
        "Pixel std": f"{numbers['pixel_std']:.3f}",
        "Right class": f"{numbers['label_accuracy']:.1%}" if "label_accuracy" in numbers else NOTHING,
        "Training": NOTHING if trained is None else duration(trained),
        "Training calls": _count(sum(calls.values())) if calls else NOTHING,
        "Calls / image": f"{numbers['calls_per_image']:g}",
        "Sampling / image": duration(numbers["seconds_per_image"]),
    }


def _count(number: float) -> str:
    """A number of calls, short.

    >>> _count(950), _count(12_340), _count(1_234_000), _count(5e9)
    ('950', '12.3 k', '1.2 M', '5.0 G')
    """
    for limit, divisor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= limit:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,.0f}"
