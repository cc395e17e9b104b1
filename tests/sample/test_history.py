"""A token history counts what a plain counter counts."""

import random
from collections import Counter

from vllm.v1.sample.history import TokenHistory


def test_counts_grow_with_the_output():
    rng = random.Random(0)
    prompt = [rng.randrange(300) for _ in range(100)]
    output = [rng.randrange(300) for _ in range(20)]
    history = TokenHistory(prompt, output)
    for _ in range(500):
        token = rng.randrange(300)
        history.append(token)
        output.append(token)
    counted = dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True))
    assert counted.keys() == set(prompt) | set(output)
    expected = Counter(output)
    assert all(count == expected[token] for token, count in counted.items())


def test_a_token_is_listed_once():
    history = TokenHistory([5, 5, 6], [6, 7])
    assert history.token_ids.tolist() == [5, 6, 7]
    assert history.output_counts.tolist() == [0, 1, 1]
