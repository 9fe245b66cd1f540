"""Verdicts of a training on made curves: what each says, since which step, and when it is too early to say anything."""

import math

import pytest

from eval.report import run_verdicts as rules
from eval.report.run_verdicts import Verdict, headline, trend


def steps(values) -> list[int]:
    return [10 * (i + 1) for i in range(len(values))]


def wobble(i: int) -> float:
    """Noise without a trend, in [-1, 1]."""
    return math.sin(7.3 * i * i)


def noisy(mean, n: int = 40, size: float = 0.05) -> list[float]:
    return [mean(i / (n - 1)) * (1 + size * wobble(i)) for i in range(n)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (noisy(lambda p: 2 - p), "falling"),
        (noisy(lambda p: 1 + p), "rising"),
        (noisy(lambda p: 1.0, size=0.3), "flat"),
        (noisy(lambda p: 3 - 4 * p if p < 0.5 else 1.0), "flat"),  # it fell, and has stopped to: the newer half counts
        (noisy(lambda p: 1 + 0.01 * p, size=0.0), "flat"),  # significant and too small to matter
        ([1.0, 2.0, 3.0, 4.0], None),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "rising"),
        ([5.0, 5.0, 5.0, 5.0, 500.0], "flat"),  # a spike
        (noisy(lambda p: 2 - p, n=5000, size=0.3), "falling"),
        ([], None),
    ],
)
def test_trend_of_the_newer_half(values, expected):
    assert trend(values) == expected


def test_blocks_are_means_of_all_but_the_oldest():
    assert rules.blocks([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert rules.blocks([float(i) for i in range(7)], most=3) == [2.0, 5.0]


def of_information(values) -> Verdict:
    return rules.health(steps(values), values, "information", 0.05, "raise objective.posterior.updates.")


def test_a_collapse_has_a_step_and_the_advice_of_the_warning():
    said = of_information([2.0] * 29 + [0.01] * 4)
    assert (said.kind, said.title) == ("bad", "collapsed since step 300")
    assert "2 at its best and is 0.01" in said.text
    assert said.text.endswith("Raise objective.posterior.updates.")


@pytest.mark.parametrize(
    ("values", "kind", "title"),
    [
        ([2.0, 2.0], "open", "too early to say"),
        ([2.0] * 5 + [0.0] * 2, "warn", "information is low since step 60"),
        ([2.0] * 197 + [0.0] * 3, "warn", "information is low since step 1980"),  # three in two hundred lines will come
        ([2.0] * 5 + [0.0] * 4 + [1.0] * 3, "good", "information has recovered at step 100"),
        ([2.0] * 5 + [0.0] * 2 + [1.0] * 3, "good", "information is healthy"),
        ([0.0] * 5 + [1.0] * 3, "good", "information is healthy"),  # it had not begun: nothing to recover from
        ([0.01] * 8, "bad", "below 0.05 from the start"),
        ([-3.0 + 0.3 * i for i in range(9)], "open", "still rising"),
    ],
)
def test_health_number(values, kind, title):
    said = of_information(values)
    assert said.kind == kind
    assert title in said.title


@pytest.mark.parametrize(
    ("values", "kind", "title"),
    [
        ([-1.5] * 8, "open", "not reached yet"),
        ([2.0] * 29 + [0.01] * 4, "bad", "collapsed since step 300"),
        ([2.0] * 8, "good", "information is healthy"),
    ],
)
def test_health_number_that_the_student_does_not_need(values, kind, title):
    """Never above the minimum is no verdict; a fall below it is one as ever."""
    said = rules.health(steps(values), values, "information", 0.05, "raise objective.posterior.updates.", needed=False)
    assert said.kind == kind
    assert title in said.title


@pytest.mark.parametrize("rule", [rules.spread, rules.diversity])
@pytest.mark.parametrize(
    ("ratios", "kind", "title"),
    [
        ([0.9, 1.0], "open", "too early"),
        ([0.9, 1.0, 0.95], "good", "healthy"),
        ([0.3, 0.3, 0.3, 0.3], "open", "too early"),  # a student starts as a blurred teacher
        ([0.1 + 0.03 * i for i in range(8)], "good", "still improving"),
        ([1.0, 0.9, 0.3, 0.02, 0.02, 0.02, 0.02], "bad", "since step 40"),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 0.02], "open", "too early"),  # once
    ],
)
def test_share_of_the_teachers(rule, ratios, kind, title):
    ratios = [min(r, 0.4) if rule is rules.spread and kind == "open" and r > 1 else r for r in ratios]
    if rule is rules.spread and title == "since step 40":
        title = "since step 30"  # .3 is low for a spread, a warning at most for diversity
    said = rule(steps(ratios), ratios)
    assert said.kind == kind
    assert title in said.title


def test_less_than_half_the_diversity_is_a_word_and_no_alarm():
    said = rules.diversity(steps([0] * 6), [1.0, 0.9, 0.3, 0.31, 0.3, 0.3])
    assert (said.kind, said.title) == ("warn", "low diversity since step 30")


def test_values_that_blow_up():
    said = rules.spread(steps([0] * 5), [1.0, 1.1, 1.6, 1.7, 1.9])
    assert (said.kind, said.title) == ("bad", "values blow up since step 30")


@pytest.mark.parametrize(
    ("shares", "kind", "title"),
    [
        ([0.5, 0.5], "open", "too early"),
        ([0.32, 0.34, 0.33], "good", "healthy"),  # the teacher's own backgrounds are black
        ([0.1, 0.2, 0.3, 0.4, 0.45, 0.5], "bad", "over-saturating since step 40"),
        ([0.6, 0.6, 0.6, 0.6], "bad", "over-saturating from the start"),
        ([0.9, 0.8, 0.7, 0.6, 0.5], "good", "still improving"),
        ([0.3, 0.3, 0.3, 0.6, 0.6], "good", "healthy"),  # twice: not yet
    ],
)
def test_saturation_against_the_teachers(shares, kind, title):
    said = rules.saturation(steps(shares), shares, teacher=0.3)
    assert said.kind == kind
    assert title in said.title
    assert "30.0% in the teacher's pictures" in said.text


@pytest.mark.parametrize(
    ("values", "kind", "title"),
    [
        ([1.0, 0.9, 0.8], "open", "too early"),
        (noisy(lambda p: 2 - p), "good", "still improving"),
        (noisy(lambda p: 1 + p), "warn", "x0_gap rising"),
        (noisy(lambda p: 1.0), "good", "x0_gap on a plateau"),
    ],
)
def test_score_gap(values, kind, title):
    said = rules.gap(steps(values), values, "x0_gap")
    assert said.kind == kind
    assert title in said.title


FALLING = [100.0, 60.0, 40.0, 30.0, 24.0, 20.0]


@pytest.mark.parametrize(
    ("values", "kind", "title"),
    [
        (FALLING[:3], "open", "too early"),
        (FALLING, "good", "still improving"),
        ([100.0, 60.0, 20.0, 20.1, 19.9, 20.0], "good", "FID on a plateau"),
        ([100.0, 60.0, 20.0, 21.0, 25.0, 40.0], "warn", "FID worse since step 30"),
    ],
)
@pytest.mark.parametrize("lower", [True, False])
def test_evaluation(values, kind, title, lower):
    values = values if lower else [1000 / v for v in values]
    said = rules.evaluation(steps(values), values, "FID", lower)
    assert said.kind == kind
    assert title in said.title


def test_best_measurement_of_which_a_snapshot_is_kept():
    curve = ([10, 20, 30, 40], [5.0, 3.0, 3.0, 4.0])
    assert rules.best_step(*curve, True, [10, 20, 30, 40]) == (20, 3.0)
    assert rules.best_step(*curve, True, [10, 40, 50]) == (40, 4.0)
    assert rules.best_step(*curve, False, [20, 40]) == (40, 4.0)
    assert rules.best_step(*curve, True, [15]) is None


def test_headline_is_the_worst_that_is_known():
    good, other, warn, bad = Verdict("good", "a", ""), Verdict("good", "b", ""), Verdict("warn", "c", ""), Verdict("bad", "d", "")
    unknown = Verdict("open", "e", "")
    assert headline([good, unknown, warn, bad]) == bad
    assert headline([unknown, good, other]) == good
    assert headline([unknown]).title == headline([]).title == "too early to say"
