"""Paired differences between rows of runs, seed by seed: what several runs say about two methods.

Runs of one seed are a pair: a seed decides about the labelled images. The test takes differences as
normally distributed, which a handful of seeds cannot show.
"""

import dataclasses
import statistics
from collections.abc import Sequence

Scores = dict[tuple[str, str, int], float]  # (row, partition, seed) -> percent


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row less the baseline, in points, seed by seed."""

    row: str
    partition: str
    by_seed: dict[int, float]
    p: float | None  # None for a single pair, or pairs that differ by the same
    interval: tuple[float, float] | None  # 95%, of the mean; None where p is

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None of one seed."""
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else None


def differences(scores: Scores, baseline: str, rows: Sequence[str]) -> list[Difference]:
    """Returns those of each partition and row, as far as there are pairs, in the rows' order."""
    from scipy import stats  # takes its time, and is needed by few

    found = []
    for partition in dict.fromkeys(partition for _, partition, _ in scores):
        for row in rows:
            by_seed = {
                seed: round(score - scores[baseline, partition, seed], 6)
                for (name, part, seed), score in sorted(scores.items())
                if (name, part) == (row, partition) and (baseline, partition, seed) in scores
            }
            if row == baseline or not by_seed:
                continue
            p = interval = None
            values = list(by_seed.values())
            if len(set(values)) > 1:  # equal differences have no spread to test against
                test = stats.ttest_1samp(values, 0.0)
                between = test.confidence_interval(0.95)
                p, interval = float(test.pvalue), (float(between.low), float(between.high))
            found.append(Difference(row, partition, by_seed, p, interval))
    return found


def caution(found: Sequence[Difference]) -> str:
    """Returns what several tests at once mean for their p; "" for fewer than two."""
    tested = sum(one.p is not None for one in found)
    if tested < 2:
        return ""
    return (
        f"{tested} comparisons: by chance alone one of them has a p below 0.05 with a "
        f"probability of up to {100 * min(1, 0.05 * tested):.0f}%; below {0.05 / tested:.2g} "
        "it is 5% (Bonferroni)."
    )
