"""How a training is doing, in words, from the numbers that it logs: pure functions of (steps, values), each with its threshold.

A curve is (steps, values), ascending, one point a log line or sample step. Every rule needs a few points: "too early to say" is a
verdict too. What the numbers cannot tell (a student that is sharp, diverse and wrong) is left to the pictures and to evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

Kind = Literal["bad", "warn", "open", "good"]  # worst first; open: nothing can be said yet
KINDS: tuple[Kind, ...] = ("bad", "warn", "open", "good")

# A log line is a mean over log_every steps, and one low mean happens: a posterior that is behind for a moment, a bad draw of
# levels. Three in a row at random, each with probability 1/4, is 1 in 64.
IN_A_ROW = 3
PART_OF_A_RUN = 0.05  # in a long log, so often that three low lines in a row will come, a collapse has to last longer
# With fewer points a trend test cannot reach 5 %, even if each point is above the last (Kendall's S of 4 points: z = 1.7).
POINTS_OF_A_TREND = 5
Z_OF_A_TREND = 1.96
CHANGE_OF_A_TREND = 0.05  # and the medians of both halves differ by so much: smaller is no progress that a person would see
# Standard deviation against the teacher's. Half of it is a quarter of the variance: grey, blurred or one colour.
LOW_SPREAD, HIGH_SPREAD = 0.5, 1.5
# Distance between two pictures of one prompt against the teacher's. A tenth: to the eye one picture, a hundredth of the
# variance; half: a quarter of it. Students of guided teachers lose some by design: less than half is worth a word, no alarm.
NO_DIVERSITY, LOW_DIVERSITY = 0.1, 0.5
# Share of values at black or full beyond the teacher's own share (which flat backgrounds make large in itself): one value in
# twenty more is a patch that can be seen, and less than that comes and goes between sample steps.
EXTRA_SATURATION = 0.05
# In-training evaluations use few images, but the same seeds each time. So much better is progress, so much worse is going wrong.
BETTER, WORSE = 0.02, 0.10
POINTS_OF_AN_EVALUATION = 4

Steps = Sequence[int]
Values = Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """kind: how bad it is; title: in a few words; text: the numbers behind it, and what to do."""

    kind: Kind
    title: str
    text: str


def headline(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of the run: the worst there is; of equal ones the first. Without any, or with open ones alone, it is open."""
    known = [v for v in verdicts if v.kind != "open"]
    if known:
        return min(known, key=lambda v: KINDS.index(v.kind))
    return Verdict("open", "too early to say", "No number has enough points yet.")


def trend(values: Values) -> Literal["rising", "falling", "flat"] | None:
    """Of the newer half (at least POINTS_OF_A_TREND points; None with fewer), by Mann and Kendall's test at 5 %.

    It asks only how many pairs rise, so that single spikes count for little. Points of a training are not independent, which
    makes such a test too eager; hence CHANGE_OF_A_TREND as well.
    """
    recent = blocks(values[-max(POINTS_OF_A_TREND, len(values) // 2) :])
    n = len(recent)
    if n < POINTS_OF_A_TREND:
        return None
    pairs = sum((b > a) - (b < a) for i, a in enumerate(recent) for b in recent[i + 1 :])
    z = (abs(pairs) - 1) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    before, after = median(recent[: n // 2]), median(recent[-(n // 2) :])
    if z < Z_OF_A_TREND or abs(after - before) <= CHANGE_OF_A_TREND * max(abs(before), abs(after)):
        return "flat"
    return "rising" if pairs > 0 else "falling"


def blocks(values: Values, most: int = 60) -> list[float]:
    """The values or, where there are more than `most`, means of blocks of equal length (the oldest few are left out)."""
    size = -(-len(values) // most)
    return [mean(values[i : i + size]) for i in range(len(values) % size, len(values), size)] if values else []


def last_stretch(flags: Sequence[bool]) -> int:
    """How many flags at the end are all true."""
    return next((i for i, flag in enumerate(reversed(flags)) if not flag), len(flags))


def health(steps: Steps, values: Values, name: str, minimum: float, advice: str, needed: bool = True) -> Verdict:
    """A number that must stay above a minimum, such as the posterior's information. advice: the training's own warning; needed:
    False where the student learns well before it is reached.
    """
    below = [v < minimum for v in values]
    n = last_stretch(below)
    if len(values) < IN_A_ROW:
        return Verdict("open", f"{name}: too early to say", f"{len(values)} of {IN_A_ROW} points.")
    if n == len(values):
        if trend(values) == "rising":
            return Verdict("open", f"{name} still rising", f"{values[-1]:.3g}, and {minimum:g} is what it must reach.")
        if not needed:
            return Verdict("open", f"{name} not reached yet", f"{values[-1]:.3g}; the student does not need it.")
        return Verdict("bad", f"{name} below {minimum:g} from the start", f"Latest {values[-1]:.3g}. {_sentence(advice)}")
    if n >= max(IN_A_ROW, len(values) * PART_OF_A_RUN):
        text = f"It was {max(values):.3g} at its best and is {values[-1]:.3g}, below {minimum:g}. {_sentence(advice)}"
        return Verdict("bad", f"collapsed since step {steps[-n]}", f"{name}: {text}")
    if n:
        text = f"{values[-1]:.3g}, below {minimum:g}, at the last {n} of {len(values)} points: too few to call it a collapse."
        return Verdict("warn", f"{name} is low since step {steps[-n]}", text)
    text = f"{values[-1]:.3g}, at least {minimum:g}."
    if (lost := _longest_inner_stretch(below)) is not None:
        first, after = lost
        return Verdict(
            "good", f"{name} has recovered at step {steps[after]}", f"It was below from step {steps[first]}; now {text}"
        )
    return Verdict("good", f"{name} is healthy", text)


def _longest_inner_stretch(below: Sequence[bool]) -> tuple[int, int] | None:
    """(first, index after) of the last stretch of IN_A_ROW or more that began after a point that was not below."""
    found, start = None, None
    for i, low in enumerate(below):
        if low and start is None:
            start = i
        if not low and start is not None:
            found = (start, i) if start > 0 and i - start >= IN_A_ROW else found
            start = None
    return found


def _compared(steps: Steps, ratios: Values, name: str, low: float, kind: Kind, title: str, advice: str) -> Verdict | None:
    """A number as a share of the teacher's that should not be below `low`: None where it is not, at the last point."""
    n = last_stretch([r < low for r in ratios])
    if not n:
        return None
    share = f"{name} is {ratios[-1]:.0%} of the teacher's, below {low:.0%}"
    way = trend(ratios)
    if n < IN_A_ROW or (n == len(ratios) and way is None):  # students start as a blurred teacher
        return Verdict("open", f"{name}: too early to say", f"{share} at the last {n} of {len(ratios)} sample steps.")
    if way == "rising":
        return Verdict("good", f"{name} still improving", f"{share}, but rising.")
    since = f"since step {steps[-n]}" if n < len(ratios) else "from the start"
    return Verdict(kind, f"{title} {since}", f"{share} and not rising. {_sentence(advice)}")


def spread(steps: Steps, ratios: Values) -> Verdict:
    """Standard deviation of the pictures' values as a share of the teacher's."""
    advice = "Lower student.optimizer.lr, or give the second network more updates (warmup_updates, updates)"
    if low := _compared(steps, ratios, "spread", LOW_SPREAD, "bad", "pictures washed out", advice):
        return low
    n = last_stretch([r > HIGH_SPREAD for r in ratios])
    if n >= IN_A_ROW:
        text = f"Spread is {ratios[-1]:.0%} of the teacher's, above {HIGH_SPREAD:.0%}. Lower student.optimizer.lr."
        return Verdict("bad", f"values blow up since step {steps[-n]}", text)
    return _ends(ratios, "spread")


def diversity(steps: Steps, ratios: Values) -> Verdict:
    """Mean distance between pictures of one prompt as a share of the teacher's."""
    advice = "Lower teacher.guidance_scale or student.optimizer.lr, or draw higher noise levels"
    bounds: tuple[tuple[float, Kind, str], ...] = (
        (NO_DIVERSITY, "bad", "one picture for a prompt"),
        (LOW_DIVERSITY, "warn", "low diversity"),
    )
    for low, kind, title in bounds:
        if verdict := _compared(steps, ratios, "diversity", low, kind, title, advice):
            return verdict
    return _ends(ratios, "diversity")


def _ends(ratios: Values, name: str) -> Verdict:
    if len(ratios) < IN_A_ROW:
        return Verdict("open", f"{name}: too early to say", f"{len(ratios)} of {IN_A_ROW} sample steps.")
    return Verdict("good", f"{name} is healthy", f"{ratios[-1]:.0%} of the teacher's.")


def saturation(steps: Steps, shares: Values, teacher: float) -> Verdict:
    """Share of clipped values, against the teacher's own."""
    n = last_stretch([s > teacher + EXTRA_SATURATION for s in shares])
    text = f"{shares[-1]:.1%} of the values are black or full, {teacher:.1%} in the teacher's pictures."
    if len(shares) < IN_A_ROW:
        return Verdict("open", "saturation: too early to say", text)
    if n < IN_A_ROW:
        return Verdict("good", "saturation is healthy", text)
    way = trend(shares)
    if way == "falling":
        return Verdict("good", "saturation still improving", f"{text} Falling.")
    advice = "Lower teacher.guidance_scale (if above 1) or student.optimizer.lr, or take an earlier snapshot."
    since = f"since step {steps[-n]}" if n < len(shares) else "from the start"
    more = "rising" if way == "rising" else "not falling"
    return Verdict("bad", f"over-saturating {since}", f"{text} It is {more}. {advice}")


def gap(steps: Steps, values: Values, name: str) -> Verdict:
    """A distance that falls while the student still moves towards its goal: Diff-Instruct's x0_gap, a loss of denoising."""
    way = trend(values)
    if way is None:
        return Verdict("open", f"{name}: too early to say", f"{len(values)} of {POINTS_OF_A_TREND} points.")
    if way == "falling":
        return Verdict("good", "still improving", f"{name} is {values[-1]:.3g} and falling.")
    if way == "rising":
        text = f"{name} is {values[-1]:.3g} and rising in the newer half of the run: lower the learning rates if it goes on."
        return Verdict("warn", f"{name} rising", text)
    return Verdict(
        "good",
        f"{name} on a plateau",
        f"{name} stays about {median(values[-POINTS_OF_A_TREND:]):.3g}: more steps may bring little.",
    )


def evaluation(steps: Steps, values: Values, name: str, lower_is_better: bool) -> Verdict:
    """A measurement in training: still improving, a plateau, or worse since the best."""
    loss = [v if lower_is_better else -v for v in values]
    if len(values) < POINTS_OF_AN_EVALUATION:
        return Verdict("open", f"{name}: too early to say", f"{len(values)} of {POINTS_OF_AN_EVALUATION} measurements.")
    best = min(range(len(loss)), key=loss.__getitem__)
    third = max(2, len(loss) // 3)
    before = min(loss[:-third])
    scale = abs(before) or 1.0
    if loss[-1] - loss[best] > WORSE * (abs(loss[best]) or 1.0) and best < len(loss) - 1:
        was = f"{name} was {values[best]:.4g} at step {steps[best]} and is {values[-1]:.4g}"
        text = f"{was}. Take the snapshot of that step, or lower the learning rates."
        return Verdict("warn", f"{name} worse since step {steps[best]}", text)
    if before - loss[best] > BETTER * scale:
        return Verdict("good", "still improving", f"{name} is {values[-1]:.4g}; best {values[best]:.4g} at step {steps[best]}.")
    since = f"No more than {BETTER:.0%} better since step {steps[-third - 1]}"
    text = f"{since}; best {values[best]:.4g} at step {steps[best]}."
    return Verdict("good", f"{name} on a plateau", text)


def best_step(steps: Steps, values: Values, lower_is_better: bool, kept: Sequence[int]) -> tuple[int, float] | None:
    """(step, value) of the best measurement of which a snapshot is kept, the earliest of equal ones; None without any."""
    known = [(v if lower_is_better else -v, s, v) for s, v in zip(steps, values, strict=True) if s in set(kept)]
    return min(known)[1:] if known else None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
