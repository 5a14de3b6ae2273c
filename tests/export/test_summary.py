"""What commands say at their end: aligned, in units that people read."""

from pathlib import Path

import pytest

from obsdiff.export.summary import aligned, amount, images_summary, limits_text, memory, prune_summary, recovery_summary

INTERVAL = {"mse": 0.00036, "mse_interval": [0.00032, 0.00042]}
REPORT = {
    "pipeline": "digits-sd3",
    "pattern": "structured:0.5",
    "method": "obs",
    "rule": "measured",
    "budget": "flops:0.7000300601",
    "allocation": {"achieved": 0.6987},
    "sparsity": {"achieved": 0.4012},
    "parameters": {"dense": 2_084_553_792, "pruned": 1_250_000_000, "nonzero": 1_250_000_000},
    "flops": {"dense": 6_012_000_000_000, "pruned": 4_200_000_000_000},
    "evaluation": {
        "n": 200,
        "dense": {"alignment": 1.0, "frechet": 4.951},
        "pruned": {**INTERVAL, "alignment": 0.995, "frechet": 4.836},
        "remarks": ["frechet falls"],
    },
    "time_s": {"calibrate": 61.0, "forward_only": 30.0, "allocate": 0.0, "solve": 7.25, "total": 75.2},
    "peak_memory_bytes": 1_440_000_000,
}


def test_a_prune_in_a_few_lines():
    assert prune_summary(REPORT, "out").splitlines() == [
        "pruned      digits-sd3: structured:0.5 by obs, sparsity 40.12%",
        "parameters  2.08 G -> 1.25 G (60.0%), FLOPs per call 6.01 T -> 4.2 T",
        "allocation  measured, budget flops:0.7 (met: 69.87%)",
        "quality     MSE to dense 0.00036 (95% 0.00032 to 0.00042), alignment 100.0% -> 99.5%, Fréchet 4.95 -> 4.84; "
        "200 images",
        "note        frechet falls",
        "time        1 min 15 s (calibrating 1 min 1 s, solving 7.2 s), peak memory 1.44 GB",
        "result      out ()",
    ]


def test_notes_are_lines_of_their_own():
    report = {**REPORT, "notes": ["sparsegpt asks for uniform timestep weights; the statistics have log_decrease"]}
    lines = prune_summary(report, "out").splitlines()
    assert lines[3] == "note        sparsegpt asks for uniform timestep weights; the statistics have log_decrease"


def test_a_prune_without_evaluation_says_so(tmp_path):
    (tmp_path / "report.md").touch()
    report = {**REPORT, "rule": "uniform", "budget": None, "evaluation": None}
    report["parameters"] = {"dense": 1_520_000, "pruned": 1_520_000, "nonzero": 766_000}
    lines = prune_summary(report, tmp_path).splitlines()
    assert lines[1:3] == ["parameters  1.52 M, of them 766 K not zero", "quality     not measured"]
    assert lines[-1] == f"result      {tmp_path} (report.md)"


def test_a_recovery_compares_pruned_and_recovered():
    cost = {"steps": 0, "images": 0, "denoiser_flops": 0.0, "device_s": 0.0, "wall_s": 20.0}
    report = {
        **REPORT,
        "budget": {
            "limit": {"steps": 500, "wall_s": 600.0, "denoiser_flops": 4e15},
            "used": {
                "calibration": {**cost, "denoiser_flops": 1e15},
                "recovery": {**cost, "steps": 480, "wall_s": 99.6},
            },
        },
        "recovery": {
            "steps": 480,
            "loss": 0.1,
        },
        "evaluation": {
            "n": 200,
            "dense": {"alignment": 1.0, "alignment_unguided": 0.992},
            "pruned": {**INTERVAL, "mse": 0.02281, "alignment": 0.837, "alignment_unguided": 0.525},
            "recovered": {**INTERVAL, "alignment": 0.998, "alignment_unguided": 0.907},
            "remarks": [],
        },
    }
    assert recovery_summary(report, "out", 200.0).splitlines() == [
        "recovered     digits-sd3: structured:0.5 by obs, sparsity 40.12%, 480 steps",
        "parameters    2.08 G -> 1.25 G (60.0%), FLOPs per call 6.01 T -> 4.2 T",
        "MSE to dense  0.0228 -> 0.00036 (95% 0.00032 to 0.00042); 200 images",
        "alignment     83.7% -> 99.8% (dense 100.0%), without guidance 52.5% -> 90.7% (dense 99.2%)",
        "budget        480 of 500 steps, 2 min 0 s of 10 min 0 s, 1 P of 4 P FLOPs",
        "time          3 min 20 s (calibrating 20 s, training 1 min 40 s), peak memory 1.44 GB",
        "result        out ()",
    ]
    bare = {**report, "pattern": None, "sparsity": {"achieved": None}, "budget": None, "evaluation": None}
    bare["recovery"] = {"steps": 1, "loss": 0.1}
    assert recovery_summary(bare, "out", 3.0).splitlines()[0] == "recovered   digits-sd3: not pruned, 1 step"


def test_images():
    files = [Path("many/00000.png"), Path("many/00001.png")]
    assert images_summary("seeds 3 to 4 by out", files, 0.61).splitlines() == [
        "drawn   2 images, seeds 3 to 4 by out",
        "time    0.6 s",
        "result  many/00000.png to 00001.png",
    ]
    assert images_summary("seed 3 by out", files[:1], 0.61).splitlines()[2] == "result  many/00000.png"


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (999.7, "1 K"), (1500, "1.5 K"), (31_936, "31.9 K"), (999_700, "1 M"), (4e15, "4 P")],
)
def test_amounts(number, text):
    assert amount(number) == text


def test_units():
    assert memory(128_000_000) == "128 MB" and memory(1.5e9) == "1.50 GB"
    assert limits_text({"steps": 5000.0, "device_s": 90.0}) == "5,000 steps, 1 min 30 s of device time"
    assert aligned([("a", "1"), ("long", "2")]) == "a     1\nlong  2"
