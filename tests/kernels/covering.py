"""Few combinations of many features such that every pair of values comes up together."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def covering_array(
    features: Mapping[str, Sequence[Any]], rng: random.Random, candidates: int = 24
) -> list[dict[str, Any]]:
    """Rows, each a value for every feature; greedy, so not the fewest possible.

    A value that should come up with every other is covered by definition; ``rng`` decides which
    of the many arrays it is.
    """
    names = list(features)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(features[names[a]]))
        for y in range(len(features[names[b]]))
    }

    def pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    rows: list[dict[str, Any]] = []
    while missing:
        # Start from a missing pair, so that each row makes progress.
        a, x, b, y = rng.choice(sorted(missing))
        best: list[int] = []
        gain = -1
        for _ in range(candidates):
            row = [rng.randrange(len(features[name])) for name in names]
            row[a], row[b] = x, y
            found = len(pairs(row) & missing)
            if found > gain:
                best, gain = row, found
        missing -= pairs(best)
        rows.append({name: features[name][i] for name, i in zip(names, best, strict=True)})
    return rows
