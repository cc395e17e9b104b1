"""A custom logits processor follows its requests through every change of the batch."""

import pytest

from tests.worker.driver import hf_greedy

PROMPT = [3, 14, 15, 92, 65]


@pytest.fixture(scope="module")
def driver(make_driver):
    return make_driver(logits_processors=("tests.worker.processors:ForceNext",))


def test_rows_come_go_and_move(driver, hf_model):
    driver.add("first", PROMPT)
    driver.add("plain", PROMPT)
    driver.add("ten", PROMPT, extra_args={"force": 10})
    driver.add("long", list(range(60)), extra_args={"force": 30})
    driver.step({"first": 5, "plain": 5, "ten": 5, "long": 20})
    driver.finish("first")
    driver.step({"plain": 1, "ten": 1, "long": 20})
    driver.add("twenty", PROMPT, temperature=1.0, extra_args={"force": 20})
    driver.step({"ten": 1, "twenty": 5, "long": 20})
    driver.preempt("ten")
    driver.run({"plain": 4, "twenty": 3, "long": 3})
    driver.run({"ten": 6})
    assert driver.requests["ten"].output == [10, 11, 12, 13, 14, 15]
    assert driver.requests["twenty"].output == [20, 21, 22]
    assert driver.requests["long"].output == [30, 31, 32]
    assert driver.requests["plain"].output == hf_greedy(hf_model, PROMPT, 4)
