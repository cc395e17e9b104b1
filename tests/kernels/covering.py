"""Few combinations of many features such that every pair of values comes up that can."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[int, int, int, int]
"""Features a < b by number, and the numbers of their values: (a, x, b, y)."""


class Combinations:
    """All combinations of ``features``, of which some are refused.

    Args:
        bound: features that ``refuses`` looks at; the others go with everything.
        refuses: why a combination of the bound features cannot be; None where it can.
    """

    def __init__(
        self,
        features: Mapping[str, Sequence[Any]],
        bound: Sequence[str],
        refuses: Callable[[Row], str | None],
    ) -> None:
        self.features = {name: list(features[name]) for name in (*bound, *features)}
        self._names = list(self.features)
        self._sizes = [len(values) for values in self.features.values()]
        self._possible: list[tuple[int, ...]] = []
        self._reasons: dict[Pair, str] = {}
        self._by_pair: dict[Pair, list[int]] = {}
        count = len(bound)
        for row in itertools.product(*(range(size) for size in self._sizes[:count])):
            reason = refuses(self._values(row))
            if reason is not None:
                for pair in _pairs(row):
                    self._reasons.setdefault(pair, reason)
                continue
            for pair in _pairs(row):
                self._by_pair.setdefault(pair, []).append(len(self._possible))
            self._possible.append(row)
        self._bound = count
        self._by_value: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for row in self._possible:
            for value in enumerate(row):
                self._by_value.setdefault(value, []).append(row)
        reached = [{x for b, x in self._by_value if b == a} for a in range(count)]
        self.pairs: set[Pair] = set(self._by_pair)
        for a, b in itertools.combinations(range(len(self._names)), 2):
            if b >= count:
                left = reached[a] if a < count else range(self._sizes[a])
                self.pairs |= {(a, x, b, y) for x in left for y in range(self._sizes[b])}

    def _values(self, row: Sequence[int]) -> Row:
        named = zip(self._names, row, strict=False)
        return {name: self.features[name][i] for name, i in named}

    def impossible(self) -> list[tuple[Row, str]]:
        """Pairs that nothing completes, each with why one completion is refused."""
        reasons = {p: why for p, why in self._reasons.items() if p not in self.pairs}
        return [
            ({self._names[k]: self.features[self._names[k]][i] for k, i in ((a, x), (b, y))}, why)
            for (a, x, b, y), why in sorted(reasons.items())
        ]

    def missing(self, rows: Sequence[Row]) -> set[Pair]:
        """Pairs that can be, and are in none of ``rows``.

        Raises:
            ValueError: a row is none of the combinations.
        """
        numbered = [
            tuple(self.features[name].index(row[name]) for name in self._names) for row in rows
        ]
        possible = set(self._possible)
        for row in numbered:
            if row[: self._bound] not in possible:
                raise ValueError(f"{self._values(row)} is refused")
        return self.pairs - {pair for row in numbered for pair in _pairs(row)}

    def covering_rows(self, rng: random.Random, candidates: int = 24) -> list[Row]:
        """Rows with all pairs; greedy, so not the fewest. ``rng`` decides which of many."""
        missing = set(self.pairs)
        order = sorted(missing)
        rng.shuffle(order)
        rows = []
        # Starting from a missing pair, each row makes progress.
        for pair in order:
            if pair not in missing:
                continue
            best = max(
                (self._row_with(pair, rng) for _ in range(candidates)),
                key=lambda row: len(missing & _pairs(row)),
            )
            missing -= _pairs(best)
            rows.append(self._values(best))
        return rows

    def _row_with(self, pair: Pair, rng: random.Random) -> tuple[int, ...]:
        a, x, b, y = pair
        fixed = {a: x, b: y}
        if b < self._bound:
            start = self._possible[rng.choice(self._by_pair[pair])]
        elif a < self._bound:
            start = rng.choice(self._by_value[a, x])
        else:
            start = rng.choice(self._possible)
        rest = range(self._bound, len(self._names))
        return (*start, *(fixed.get(k, rng.randrange(self._sizes[k])) for k in rest))


def _pairs(row: Sequence[int]) -> set[Pair]:
    return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(enumerate(row), 2)}


def covering_array(features: Mapping[str, Sequence[Any]], rng: random.Random) -> list[Row]:
    """Rows in which every pair of values comes up, where everything goes with everything."""
    return Combinations(features, (), lambda _: None).covering_rows(rng)
