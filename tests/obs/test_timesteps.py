import math

import pytest

from obsdiff.errors import UserError
from obsdiff.obs.timesteps import WEIGHTINGS, timestep_weights


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


def test_unknown_weighting():
    with pytest.raises(UserError, match="cosine"):
        timestep_weights("cosine", 5)
