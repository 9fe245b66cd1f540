"""What a paper concluded from an ablation, as comparisons of numbers; what holds of it here; and both as a page of Markdown.

A lower number is better. The seeds of two values are apart where all of one lie below all of the other: with n seeds each and no
difference that happens in 2 / C(2n, n) of all cases, one in ten for three seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["held", "in the medians only", "not told apart", "did not hold", "no error bars"]
Seeds = Mapping[str, Sequence[float]]  # value -> the number of each seed; infinite where a run failed


@dataclass(frozen=True)
class Claim:
    """pairs: (better, worse) values of the ablation; alike: that neither of each pair is better, instead."""

    text: str
    source: str
    pairs: tuple[tuple[str, str], ...]
    alike: bool = False


def order(a: Sequence[float], b: Sequence[float]) -> int:
    """-1 where all of a lie below all of b, 1 where all lie above, else 0."""
    return -1 if max(a) < min(b) else 1 if min(a) > max(b) else 0


def judge(claim: Claim, seeds: Seeds) -> Verdict:
    """A claim holds where all of its pairs do with their seeds apart, and does not where one pair is apart the other way (of a
    claim that two are alike: any way). Between the two, medians that all point its way are worth a word.

    >>> differ = Claim("a beats b", "", (("a", "b"),))
    >>> [judge(differ, {"a": a, "b": [3.0, 4.0]}) for a in ([1.0, 2.0], [2.0, 3.5], [3.5, 3.6], [5.0, 6.0])]
    ['held', 'in the medians only', 'not told apart', 'did not hold']
    """
    if any(len(seeds[value]) < 2 for pair in claim.pairs for value in pair):
        return "no error bars"
    orders = [order(seeds[better], seeds[worse]) for better, worse in claim.pairs]
    if claim.alike:
        return "did not hold" if any(orders) else "held"
    if 1 in orders:
        return "did not hold"
    if all(o == -1 for o in orders):
        return "held"
    lean = all(statistics.median(seeds[a]) < statistics.median(seeds[b]) for a, b in claim.pairs)
    return "in the medians only" if lean else "not told apart"


def chance(seeds: int) -> float:
    """How often two sets of so many seeds of one law are apart, either way."""
    return 2 / math.comb(2 * seeds, seeds)


def shown(values: Sequence[float]) -> str:
    """The median, and the range of several."""
    low, middle, high = (
        f"{v:.3g}" if math.isfinite(v) else "failed" for v in (min(values), statistics.median(values), max(values))
    )
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def evidence(claim: Claim, seeds: Seeds) -> str:
    """Each of its pairs in words, from the numbers."""
    words = {-1: "below", 0: "not apart from", 1: "above"}
    return "; ".join(
        f"{a}: {shown(seeds[a])} {words[order(seeds[a], seeds[b])] if len(seeds[a]) > 1 else 'beside'} {b}: {shown(seeds[b])}"
        for a, b in claim.pairs
    )


# The page -------------------------------------------------------------------------------------------------------------


def page(content: dict[str, Any]) -> str:
    """Markdown, from what the benchmark writes as JSON (ablations.py)."""
    found = content["ablations"]
    verdicts = [claim["verdict"] for ablation in found.values() for claim in ablation["claims"]]
    tally = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    s = content["setting"]
    bars = (
        f"medians of {s['seeds']} seeds and their range; two values are apart where the ranges are, which happens by chance in "
        f"{chance(s['seeds']):.0%} of all pairs"
        if s["seeds"] > 1
        else "one seed, so there are no error bars and no verdicts"
    )
    bases = "; ".join(f"`{recipe}` with {', '.join(f'`{o}`' for o in given)}" for recipe, given in s["bases"].items())
    lines = [
        "# The papers' ablations on the digits",
        "",
        f"`python -m scripts.bench.ablations`, commit {content['git_commit']}, {content['cores']} cores, one thread a run. "
        f"Each row changes one key of its recipe: {bases}. FD of {s['images']:,} images on the digits classifier: {bars}. "
        f"The teacher reads {content['teacher']['fd']:.3g}, two halves of the real images {content['floor']['fd']:.3g}.",
        "",
        f"Of {len(verdicts)} conclusions of the papers: {tally}.",
        "",
        "![medians and ranges of the seeds](ablations.png)",
    ]
    for ablation in found.values():
        lines += section(ablation)
    return "\n".join(lines) + "\n"


def section(ablation: dict[str, Any]) -> list[str]:
    """One ablation: its numbers, those of the paper where it has them, each conclusion and what became of it."""
    paper = ablation["paper"]
    head = ["", "FD", "energy distance", "training, s", *(["the paper's FID"] if paper else [])]
    lines = ["", f"## {ablation['title']}", "", f"`{ablation['key']}` of `{ablation['recipe']}`", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for value, row in ablation["values"].items():
        name = f"**{value}** (all others' value)" if value == ablation["own"] else value
        cells = [name, shown(with_failures(row, "fd")), shown(with_failures(row, "energy_distance"))]
        cells.append(f"{statistics.median(r['seconds'] for r in row['seeds']):.0f}" if row["seeds"] else "")
        lines.append(f"| {' | '.join([*cells, *([f'{paper[value]:g}' if value in paper else ''] if paper else [])])} |")
    for claim in ablation["claims"]:
        lines += ["", f"{claim['text']} ({claim['source']}): **{claim['verdict']}**. {claim['evidence']}."]
    if not ablation["claims"]:
        lines += ["", "Neither paper has a conclusion on this."]
    return lines


def with_failures(row: dict[str, Any], key: str) -> list[float]:
    """The number of each seed of a value, infinite for a run that did not come to its end."""
    return [seed[key] for seed in row["seeds"]] + [math.inf] * len(row["failed"])
