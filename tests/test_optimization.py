import math

import pytest

from optimization import SCHEDULES, learning_rate_at
from params import Params


def one_cycle(step: int, steps: int) -> float:
    """Rise over the first third, fall to 0 at the last step."""
    top = steps // 3
    return (step + 1) / (top + 1) if step < top else (steps - 1 - step) / (steps - 1 - top)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_schedule_may_warm_up_itself_and_sees_its_last_step(monkeypatch, warmup):
    monkeypatch.setitem(SCHEDULES, "one_cycle", one_cycle)
    params = Params(schedule="one_cycle", num_epochs=3, warmup_epochs=warmup, learning_rate=0.5)
    rates = [learning_rate_at(step, params, 4) for step in range(13)]
    steps = 12 - 4 * warmup
    assert rates[4 * warmup : 12] == [0.5 * one_cycle(step, steps) for step in range(steps)]
    assert rates[11] == rates[12] == 0, "after the last step it stays"
    assert max(rates) == 0.5


def test_every_schedule_is_finite_from_the_first_step_to_the_last():
    for name, schedule in SCHEDULES.items():
        for steps in (1, 2, 50):
            factors = [schedule(step, steps) for step in range(steps)]
            assert all(math.isfinite(factor) and factor >= 0 for factor in factors), name
