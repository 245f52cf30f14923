"""Which differences between arms a study shows, by the spread of seeds over all arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from studying.plan import AGAIN, CONTROLS, PLAIN, WEAKER

LEVEL = 0.025  # on each side, for all comparisons together


@dataclass(frozen=True)
class Verdict:
    """An arm beside the plain one. least: the least difference that shows; NaN where seeds have no spread to know."""

    arm: str
    errors: tuple[float, ...]
    difference: float
    least: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.errors))

    @property
    def words(self) -> str:
        if math.isnan(self.least):
            return "not judged, one seed"
        if abs(self.difference) <= self.least:
            return "no difference shown"
        return "better" if self.difference < 0 else "worse"


def judge(errors: Mapping[str, Sequence[float]]) -> list[Verdict]:
    """Every arm beside the plain one, best first, controls last. errors: of each arm's seeds; the plain arm's must be
    among them."""
    from scipy.stats import t  # takes a second to import

    deviation, df = pooled_deviation(errors)
    plain = errors[PLAIN]
    comparisons = max(1, len(errors) - 1)
    verdicts = []
    for arm, values in errors.items():
        least = math.nan
        if df:
            least = float(t.ppf(1 - LEVEL / comparisons, df)) * deviation * math.sqrt(1 / len(values) + 1 / len(plain))
        verdicts.append(Verdict(arm, tuple(values), float(np.mean(values) - np.mean(plain)), least))
    return sorted(verdicts, key=lambda verdict: (verdict.arm in CONTROLS, verdict.mean))


def pooled_deviation(errors: Mapping[str, Sequence[float]]) -> tuple[float, int]:
    """Standard deviation of a seed within its arm, over all arms, and its degrees of freedom; NaN and 0 for none."""
    df = sum(len(values) - 1 for values in errors.values())
    squares = sum(float(np.var(values) * len(values)) for values in errors.values())
    return (math.sqrt(squares / df), df) if df else (math.nan, 0)


def lack_of_power(verdicts: Sequence[Verdict]) -> list[str]:
    """Why the study cannot tell arms apart; empty where its controls came out as they have to."""
    found = {verdict.arm: verdict.words for verdict in verdicts}
    reasons = []
    if found.get(WEAKER) != "worse":
        reasons.append(f"training at 60 % of the budget did not come out worse ({found.get(WEAKER, 'not run')})")
    if found.get(AGAIN) != "no difference shown":
        reasons.append(f"the same training with other seeds came out different ({found.get(AGAIN, 'not run')})")
    return reasons


def undecided(verdicts: Sequence[Verdict]) -> list[str]:
    """The arms of which no difference to the plain one is shown."""
    return [v.arm for v in verdicts if v.arm not in (PLAIN, *CONTROLS) and v.words not in ("better", "worse")]
