import math

import pytest

from obsdiff.errors import UserError
from obsdiff.obs.timesteps import WEIGHTINGS, check_weighting, listed_weights, timestep_weights


def test_log_decrease_is_equation_4():
    """Values at T = 25 computed from the published equation with its code's 0.8 and 1.2."""
    found = timestep_weights("log_decrease", 25)
    assert found[0] == pytest.approx(1.2) and found[-1] == pytest.approx(0.8)
    assert [round(found[i], 4) for i in (1, 12, 20, 23)] == [1.1949, 1.1187, 1.0, 0.8861]
    for t, alpha in enumerate(found, start=1):
        assert alpha == pytest.approx(0.8 + 0.4 / math.log(25) * math.log(25 - t + 1))


def test_the_others():
    assert timestep_weights("linear_increase", 3) == pytest.approx([0.8, 1.0, 1.2])
    assert timestep_weights("linear_decrease", 3) == pytest.approx([1.2, 1.0, 0.8])
    assert timestep_weights("log_increase", 9) == timestep_weights("log_decrease", 9)[::-1]
    assert timestep_weights("uniform", 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_step_has_one_weight(weighting):
    assert timestep_weights(weighting, 1) == [1.0]


def test_other_ranges_and_lists():
    assert timestep_weights("linear_increase:0.2-1.8", 3) == pytest.approx([0.2, 1.0, 1.8])
    assert timestep_weights("log_decrease:0.5-0.5", 4) == pytest.approx([0.5] * 4)
    assert timestep_weights("3,2,0.5", 3) == [3.0, 2.0, 0.5]
    assert timestep_weights(listed_weights([2.0, 1.0, 0.0123456]), 3) == pytest.approx([1.99, 0.996, 0.0123], rel=1e-2)
    check_weighting("measured")


@pytest.mark.parametrize(
    ("weighting", "told"),
    [
        ("cosine", "choose one of log_decrease"),
        ("log_decrease:1", "positive numbers"),
        ("log_decrease:2-1", "from low to high"),
        ("log_decrease:0-1", "positive numbers"),
        ("linear_increase:0.1-0.2-0.3", "from low to high"),
        ("uniform:1-2", "no range"),
        ("1,x", "positive numbers"),
        ("1,nan", "positive numbers"),
    ],
)
def test_what_names_no_weights(weighting, told):
    for use in (check_weighting, lambda text: timestep_weights(text, 5)):
        with pytest.raises(UserError, match=told):
            use(weighting)


def test_another_number_of_weights():
    with pytest.raises(UserError, match="2 timestep weights are given for 5 steps"):
        timestep_weights("1,2", 5)
