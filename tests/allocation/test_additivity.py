"""Random plans: what is predicted is close to what is measured, and the bench says so."""

import json
import math

import pytest

from obsdiff.bench.additivity import Additivity
from obsdiff.cli.main import main


def test_rank_correlation():
    assert Additivity([1, 2, 3, 4], [10, 20, 30, 400]).rank_correlation[0] == pytest.approx(1)
    assert Additivity([1, 2, 3, 4], [4, 3, 2, 1]).rank_correlation[0] == pytest.approx(-1)
    value, (low, high) = Additivity([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).rank_correlation
    assert value == pytest.approx(0.8)
    # Fisher's transformation by hand: atanh(0.8) +- 1.96 / sqrt(5 - 3)
    assert (low, high) == pytest.approx((math.tanh(math.atanh(0.8) - 1.385904), math.tanh(math.atanh(0.8) + 1.385904)))


@pytest.mark.slow
def test_bench_scan_prints_one_json_line(capsys, monkeypatch):
    from dataclasses import replace

    from obsdiff.bench import presets

    tiny = presets.PRESETS["sd3-tiny-cpu"]
    small = {**tiny.config, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    work = replace(tiny.work, num_prompts=2, steps=2)
    monkeypatch.setitem(presets.PRESETS, "sd3-tiny-cpu", replace(tiny, config=small, work=work))
    capsys.readouterr()
    main(["bench", "scan", "--triples", "3", "--plans", "40", "--method", "magnitude"])
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["triples"] == 3 and found["units"] == 21 and found["bare_passes"] > 0
    assert found["ratio"] == pytest.approx(found["scan_s"] / found["calibrate_s"], rel=0.05)
    low, high = found["rank_correlation_interval"]
    assert found["rank_correlation"] > 0.8 and -1 < low < found["rank_correlation"] < high <= 1
    assert found["by"] == "forward"  # so few calls would need more vectors than there are runs
    for wrong in (
        ["--triples", "0"],
        ["--by", "sideways"],
        ["--preset", "sd3-tiny-cpu", "--pipeline", "digits-sd3"],
        ["--pipeline", "none"],
    ):
        with pytest.raises(SystemExit):
            main(["bench", "scan", *wrong])


def test_bench_scan_takes_a_pipeline(capsys, pipe_folder):
    capsys.readouterr()
    scan = ["bench", "scan", "--pipeline", str(pipe_folder), "--num_prompts", "4", "--triples", "6"]
    main([*scan, "--pattern", "structured:heads=0.3,ffn=0.3,multiple_of=1", "--plans", "6"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["num_prompts"], found["steps"], found["triples"], found["units"]) == (4, 3, 6, 8)
    assert len(found["predicted"]) == len(found["joint"]) == 6 and all(error > 0 for error in found["joint"])
