"""The real scripts on a tiny pipeline: artifacts, options, and every mistake in one line with exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from obsdiff.cli.main import main
from obsdiff.criteria import METHODS

ROOT = Path(__file__).parents[2]
# uniform, since half of the time would go into a scan
QUICK = ["--calibration.num_prompts", "4", "--evaluation.num_images", "4", "--allocation", "uniform"]
UNSEEN = ["--evaluation.num_images", "0"]
ARTIFACTS = {
    "pipeline", "pruning.json", "plan.yaml", "masks.safetensors", "report.json", "report.md", "samples.png",
}  # fmt: skip


def prune(pipe_folder, output, *more):
    main(["prune", "--pipeline", str(pipe_folder), "--output", str(output), *QUICK, *more])
    return json.loads((Path(output) / "report.json").read_text())


def test_prune_script_leaves_exactly_the_artifacts(pipe_folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "prune.py"),
            "--pipeline",
            str(pipe_folder),
            "--output",
            str(tmp_path / "out"),
            *QUICK,
            "--allocation=null",
        ],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"},
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == ARTIFACTS | {"ratios.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "sparsity 50.00%" in done.stdout and len(done.stdout.splitlines()) == 6
    starts = (f"{pipe_folder}: measured", "calibration: 4 prompts", "sensitivity scan: ", "calibrating ", "scanning ")
    starts += (
        "solving ",
        "sampling ",
        "evaluation: 4 images",
        "host memory: about ",
        f"the result will lie in {tmp_path / 'out'}",
    )
    assert all(line.startswith(starts) for line in done.stderr.splitlines())
    assert "calibration: 4 prompts" in done.stderr and "the result will lie in" in done.stderr


def test_report_has_the_schema(pipe_folder, tmp_path):
    report = prune(pipe_folder, tmp_path / "out")
    assert {
        "pipeline", "method", "pattern", "refit", "seed", "versions", "calibration", "sparsity", "parameters", "flops",
        "layer_error", "time_s", "peak_memory_bytes", "evaluation",
    } <= report.keys()  # fmt: skip
    assert {"prompts", "steps", "guidance_scale", "packages", "tokens"} <= report["calibration"].keys()
    assert report["calibration"]["steps"] == 3 and report["calibration"]["prompts"] == 4
    assert report["calibration"]["weighting"] == "log_decrease"
    assert abs(report["sparsity"]["achieved"] - 0.5) < 1e-3 and len(report["sparsity"]["per_layer"]) == 33
    assert report["parameters"]["dense"] == report["parameters"]["pruned"] > report["parameters"]["nonzero"]
    assert report["flops"]["dense"] == report["flops"]["pruned"] > 0
    assert set(report["layer_error"]["per_layer"]) == set(report["sparsity"]["per_layer"])
    assert {"calibrate", "forward_only", "solve", "total"} <= report["time_s"].keys()
    assert 0 < report["time_s"]["forward_only"] <= report["time_s"]["calibrate"] <= report["time_s"]["total"]
    assert report["peak_memory_bytes"] > 2**20 and report["evaluation"]["pruned"]["mse"] > 0
    assert all("alignment" in report["evaluation"][name] for name in ("dense", "pruned"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "MSE to dense" in page and "n = 4" in page and "samples.png" in page
    assert (tmp_path / "out" / "samples.png").read_bytes().startswith(b"\x89PNG")


USUAL = {"obs", "sparsegpt", "magnitude", "diff-pruning"}  # with a refit, without, by weights alone, by gradients


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)
        for name, method in METHODS.items()
        if method.solve is not None
    ],
)
def test_every_method_through_the_command(pipe_folder, tmp_path, method):
    report = prune(pipe_folder, tmp_path / "out", "--method", method, "--pattern", "2:4")
    assert report["method"] == method and abs(report["sparsity"]["achieved"] - 0.5) < 1e-3
    measured = method not in ("magnitude", "l1", "random")
    assert (report["calibration"] is not None) is measured
    assert (report["layer_error"]["mean"] is not None) is ("gram" in METHODS[method].needs)
    if method == "sparsegpt":
        assert report["calibration"]["weighting"] == "uniform" and report["refit"] is False


def test_structured_through_the_command(pipe_folder, tmp_path):
    report = prune(pipe_folder, tmp_path / "out", "--pattern", "structured:0.5")
    assert report["parameters"]["pruned"] < report["parameters"]["dense"]
    assert report["flops"]["pruned"] < report["flops"]["dense"]
    assert report["sparsity"]["achieved"] == 1 - report["parameters"]["pruned"] / report["parameters"]["dense"]


@pytest.mark.slow
def test_statistics_are_reused_by_other_patterns_and_methods(pipe_folder, tmp_path):
    store = ["--statistics", str(tmp_path / "store")]
    first = prune(pipe_folder, tmp_path / "a", *store)
    assert first["calibration"]["reused"] is False
    for i, more in enumerate(
        (
            ["--pattern", "2:4"],
            ["--method", "sparsegpt"],
            ["--pattern", "structured:0.5"],
            ["--method", "magnitude"],
        )
    ):
        report = prune(pipe_folder, tmp_path / f"b{i}", *store, *more)
        assert report["calibration"]["reused"] is True and report["calibration"]["weighting"] == "log_decrease"
        assert report["layer_error"]["mean"] > 0


@pytest.mark.slow
def test_options_have_effects(pipe_folder, tmp_path):
    """Each changes what it says it changes."""
    plain = prune(pipe_folder, tmp_path / "plain")
    changed = {
        "refit": ["--refit", "false"],
        "refit_steps": ["--refit_steps", "1"],
        "compared": ["--compared_columns", "64"],
        "steps": ["--calibration.steps", "2"],
        "guidance": ["--calibration.guidance_scale", "1"],
        "tokens": ["--calibration.tokens", "3"],
        "padding": ["--calibration.padding", "true"],
        "weighting": ["--calibration.weighting", "linear_increase"],
        "damping": ["--calibration.damping", "0.5"],
        "seed": ["--seed", "1"],
        "packages": ["--calibration.packages", "2"],
        "prompts": ["--calibration.prompts", "digits-heldout"],
        "dtype": ["--dtype", "bfloat16"],
    }
    for name, more in changed.items():
        report = prune(pipe_folder, tmp_path / name, *more, *UNSEEN)
        assert report["layer_error"]["mean"] != plain["layer_error"]["mean"], name
    batch = prune(pipe_folder, tmp_path / "batch", "--calibration.batch_size", "1", *UNSEEN)
    assert batch["layer_error"]["mean"] == pytest.approx(plain["layer_error"]["mean"], rel=1e-3)
    fewer = prune(pipe_folder, tmp_path / "fewer", "--include", "['*.ff.*']", "--exclude", "['*.net.2']", *UNSEEN)
    assert set(fewer["sparsity"]["per_layer"]) == {f"transformer_blocks.{i}.ff.net.0.proj" for i in range(3)}
    spared = prune(pipe_folder, tmp_path / "spared", "--spare_blocks", "[0,-1]", *UNSEEN)
    assert all(".1." in name for name in spared["sparsity"]["per_layer"])
    ranked = [
        prune(pipe_folder, tmp_path / fusion, "--pattern", "structured:heads=0.5,ffn=0", "--fusion", fusion, *UNSEEN)
        for fusion in ("reciprocal_rank", "relative_error")
    ]
    assert all(report["parameters"]["pruned"] < report["parameters"]["dense"] for report in ranked)
    seeded = prune(pipe_folder, tmp_path / "e", "--evaluation.seed", "7", "--evaluation.prompts", "digits-train")
    assert seeded["evaluation"]["first_seed"] == 7
    assert seeded["evaluation"]["pruned"]["mse"] != plain["evaluation"]["pruned"]["mse"]
    none = prune(pipe_folder, tmp_path / "none", *UNSEEN)
    assert none["evaluation"] is None and not (tmp_path / "none" / "samples.png").exists()


def test_yaml_and_overrides(pipe_folder, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"pipeline: {pipe_folder}\npattern: '2:4'\ncalibration: {{num_prompts: 3}}\n")
    main(["prune", "--config", str(config), "--output", str(tmp_path / "o"), "--method", "wanda",
          "--evaluation.num_images", "2"])  # fmt: skip
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["pattern"], report["method"], report["calibration"]["prompts"]) == ("2:4", "wanda", 3)


def test_sample_and_inspect(pipe_folder, tmp_path, capsys):
    prune(pipe_folder, tmp_path / "out", "--pattern", "structured:0.5")
    capsys.readouterr()
    main(["inspect", str(tmp_path / "out")])
    assert "transformer_blocks.1.attn" in capsys.readouterr().out
    image = tmp_path / "s.png"
    main(["sample", str(tmp_path / "out"), "--prompt", "a seven", "--seed", "3", "--output", str(image)])
    first = image.read_bytes()
    main(
        [
            "sample",
            str(tmp_path / "out"),
            "--prompt",
            "a seven",
            "--seed",
            "4",
            "--output",
            str(image),
            "--overwrite",
            "true",
        ]
    )
    assert image.read_bytes() != first
    main(["sample", str(pipe_folder), "--prompt", "['a two', 'a six']", "--output", str(tmp_path / "many")])
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["00000.png", "00001.png"]


def refused(capsys, *args):
    """Exit code 2 and exactly one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obsdiff")]
    assert stopped.value.code == 2 and len(errors) == 1
    return errors[0]


def test_mistakes(pipe_folder, tmp_path, capsys):
    out = tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    table = tmp_path / "t.csv"
    table.write_text("words\nhello\n")
    base = ["prune", "--pipeline", pipe_folder, "--output", out]
    for more, word in [
        (["--pattern", "unstructured:2"], "below 1"),
        (["--pattern", "diagonal:0.5"], "unknown pattern"),
        (["--pattern", "4:4"], "4:4"),
        (["--pattern", "3:7"], "multiple of 7"),
        (["--method", "obd"], "unknown method"),
        (["--method", "admm", "--pattern", "structured:0.3"], "cannot prune heads"),
        (["--nonsense", "1"], "nonsense"),
        (["--seed", "x"], "seed"),
        (["--config", tmp_path / "none.yaml"], "not found"),
        (["--calibration.prompts", empty], "no prompts"),
        (["--calibration.prompts", tmp_path / "missing.txt"], "not found"),
        (["--calibration.prompts", table], "no column"),
        (["--calibration.prompts", table, "--calibration.column", "caption"], "no column 'caption'"),
        (["--calibration.num_prompts", "0"], "at least 1"),
        (["--calibration.weighting", "cosine"], "cosine"),
        (["--calibration.tokens", "0"], "tokens"),
        (["--calibration.packages", "2", "--statistics", tmp_path / "s"], "packages"),
        (["--evaluation.num_images", "-1"], "num_images"),
        (["--include", "['nothing']"], "matches none"),
        (["--exclude", "['*']"], "matches no layer"),
        (["--device", "cuda:99"], "device"),
        (["--dtype", "int4"], "dtype"),
    ]:  # fmt: skip
        assert word in refused(capsys, *base, *QUICK, *more), more
        assert not out.exists(), more
    assert "nowhere" in refused(capsys, "prune", "--pipeline", "nowhere", "--output", out)
    assert "output" in refused(capsys, "prune", "--pipeline", pipe_folder)
    assert "not the folder of a prune run" in refused(capsys, "inspect", tmp_path)
    assert "must end in .png" in refused(capsys, "sample", pipe_folder, "--prompt", "x", "--output", tmp_path / "x.jpg")
    assert "unknown preset" in refused(capsys, "bench", "prune", "--preset", "sd9")
    assert "say what to measure" in refused(capsys, "bench")
    assert "unknown command" in refused(capsys, "compress")
    assert {path.name for path in tmp_path.iterdir()} <= {"empty.txt", "t.csv"}


def test_an_output_with_something_else_or_an_earlier_run(pipe_folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    base = ["prune", "--pipeline", pipe_folder, *QUICK, "--output"]
    assert "something else" in refused(capsys, *base, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    prune(pipe_folder, tmp_path / "out")
    assert "--overwrite true" in refused(capsys, *base, tmp_path / "out")
    prune(pipe_folder, tmp_path / "out", "--overwrite", "true", "--pattern", "2:4")


def test_a_pruned_pipeline_is_pruned_again_only_when_asked(pipe_folder, tmp_path, capsys):
    uniform = ["--allocation", "uniform"]
    prune(pipe_folder, tmp_path / "a", *uniform)
    base = [
        "prune",
        "--pipeline",
        tmp_path / "a",
        *QUICK,
        "--pattern",
        "unstructured:0.7",
        "--output",
        tmp_path / "b",
    ]
    assert "--prune_again true" in refused(capsys, *base)
    report = prune(tmp_path / "a", tmp_path / "b", "--pattern", "unstructured:0.7", "--prune_again", "true", *uniform)
    assert abs(report["sparsity"]["achieved"] - 0.7) < 2e-3
    kept = load_file(tmp_path / "b" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    zeros = sum(int((t == 0).sum()) for name, t in kept.items() if name.endswith("attn.to_q.weight"))
    assert zeros == 3 * round(0.7 * 256)


@pytest.mark.slow
def test_killed_half_way_leaves_no_output(pipe_folder, tmp_path):
    """SIGKILL in the calibration: no output folder, and the same command then runs to its end."""
    import signal
    import time

    command = [
        sys.executable,
        str(ROOT / "prune.py"),
        "--pipeline",
        str(pipe_folder),
        "--output",
        str(tmp_path / "out"),
    ]
    command += ["--calibration.num_prompts", "4000", "--evaluation.num_images", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "calibration:" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    prune(pipe_folder, tmp_path / "out")


def test_bench_prints_one_json_line(capsys, tmp_path, monkeypatch):
    from dataclasses import replace

    from obsdiff.bench import presets

    tiny = presets.PRESETS["sd3-tiny-cpu"]
    small = {**tiny.config, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    work = replace(tiny.work, num_prompts=2, steps=2)
    monkeypatch.setitem(presets.PRESETS, "sd3-tiny-cpu", replace(tiny, config=small, work=work))
    for more in (
        [],
        ["--statistics", str(tmp_path / "s")],
        ["--streamed", "true"],
        ["--streamed", "true", "--calls_on_disk", "true"],
        ["--weights_on_disk", "true"],
        ["--statistics", str(tmp_path / "s"), "--pattern", "2:4"],
    ):
        capsys.readouterr()
        main(["bench", "prune", *more])
        [line] = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert {"forward_only_s", "calibrate_s", "solve_s", "total_s", "ratio", "peak_memory_bytes", "device", "preset",
                "packages"} <= found.keys()  # fmt: skip
        assert found["ratio"] == pytest.approx(found["total_s"] / found["forward_only_s"], rel=0.05)
        assert abs(found["sparsity"] - 0.5) < 1e-3 and found["streamed"] is ("--streamed" in more)
        assert 0.5 < found["planned_memory_bytes"] / found["peak_memory_bytes"] < 2
        assert (found["calibrate_cpu_s"] is None) is found["streamed"] and found["processes"] == 1
        assert found["calls_on_disk"] is ("--calls_on_disk" in more)
        assert found["weights_on_disk"] is ("--weights_on_disk" in more)
    assert found["statistics_reused"] is True and found["calibrate_s"] == 0
    with pytest.raises(SystemExit):
        main(["bench", "prune", "--calls_on_disk", "true"])
    assert "calls_on_disk is of a streamed calibration's calls" in capsys.readouterr().err


@pytest.mark.slow
def test_training_makes_a_pipeline_that_loads(tmp_path):
    """``train.py fit`` on the pretraining config, three steps of each phase."""
    import obsdiff

    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs/pretrain/digits_sd3.yaml"),
         "--trainer.max_steps", "6", "--model.init_args.autoencoder_steps", "3", "--trainer.logger", "false",
         "--model.init_args.output", str(tmp_path / "made")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = obsdiff.load_pipeline(tmp_path / "made")
    assert bool(torch.isfinite(obsdiff.sample(pipe, ["a two"], [0])).all())
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 2_000_000
