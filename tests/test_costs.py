import pytest

from obsdiff.costs import Cost, calibration_cost, exhausted, fraction_used, step_flops

MANIFEST = {
    "time_s": {"calibrate": 8.0, "allocate": 4.0, "solve": 2.0},
    "allocation": {"scan": {"denoiser_calls": 100}},
    "packages": 2,
    "statistics": {"num_prompts": 10, "steps": 5, "guidance_scale": 2.0},
}


def test_pruning_counts_in_full():
    found = calibration_cost(MANIFEST, flops=7, processes=3)
    assert found["calibration"] == Cost(0, 0, 2 * 10 * 5 * 2 * 7, 24.0, 8.0)
    assert found["allocation"] == Cost(0, 0, 100 * 2 * 7, 12.0, 4.0)
    assert found["solving"] == Cost(0, 0, 0, 6.0, 2.0)
    assert calibration_cost({}, 7, 1)["calibration"] == Cost()


def test_a_step_costs_forward_backward_and_teacher():
    assert step_flops(10, 0, False) == 30
    assert step_flops(10, 20, False) == 50
    assert step_flops(10, 20, True) > 100


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_training_stops_exactly_at_the_limit(steps):
    spent, taken, limits = Cost(), 0, {"steps": float(steps), "wall_s": 1e9}
    while not exhausted(limits, spent, Cost(1, 4, 0.0, 0.1, 0.1)):
        spent, taken = spent + Cost(1, 4, 0.0, 0.1, 0.1), taken + 1
    assert taken == steps


def test_the_nearest_limit_decides_and_pruning_is_left_out():
    before = Cost(wall_s=10.0)
    limits = {"steps": 100.0, "wall_s": 20.0}
    assert fraction_used(limits, before, before) == 0
    assert fraction_used(limits, before, before + Cost(10, wall_s=5.0)) == pytest.approx(0.5)
    assert fraction_used(limits, before, before + Cost(90, wall_s=5.0)) == pytest.approx(0.9)
    assert fraction_used({}, before, before) == 0
