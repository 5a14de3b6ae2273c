"""Recoveries of the tiny pipeline through the real command line."""

import os
import subprocess
import sys
from pathlib import Path

import lightning
import torch

from obsdiff.cli.train import main
from obsdiff.embedded.digits import DIGIT_WORDS, load_digits
from obsdiff.evaluation.suite import Suite, load_suite
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.ranks import local_part

ROOT = Path(__file__).parents[2]

PATTERNS = ("unstructured:0.5", "2:4", "structured:0.5")


def arguments(pipe_folder, output, *extra, pattern="unstructured:0.5", steps=6, images=True, folder=None):
    """``train.py fit`` on the tiny pipeline: few steps, an evaluation of two images, checkpoints every two steps."""
    data = ["--data", "obsdiff.data.digits.DigitsDataModule", "--data.batch_size", "4"]
    if not images:
        data = ["--data", "obsdiff.data.trajectories.TrajectoryDataModule", "--data.batch_size", "4"]
        data += ["--data.pipeline", str(pipe_folder), "--data.folder", str(folder), "--data.prompts", "digits-train"]
        data += ["--data.num_prompts", "4"]
    return [
        "--seed_everything=0",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.max_epochs=-1",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--budget.steps={steps}",
        "--model=obsdiff.training.recovery.Recovery",
        f"--model.pipeline={pipe_folder}",
        f"--model.output={output}",
        f"--model.pruning.pattern={pattern}",
        "--model.pruning.spare_blocks=[]",
        "--model.pruning.allocation=uniform",  # half of the time would go into a scan
        "--model.pruning.calibration.num_prompts=4",
        "--model.optimization.lr=1e-3",
        "--model.optimization.weight_decay=0.1",
        "--model.optimization.warmup_steps=1",
        "--model.evaluation.num_images=2",
        "--trainer.callbacks+=obsdiff.callbacks.checkpoint.LastCheckpoint",
        f"--trainer.callbacks.dirpath={output}/checkpoints",
        "--trainer.callbacks.every_n_train_steps=2",
        *data,
        *extra,
    ]


class TeacherShare(lightning.Callback):
    """Leaves how much of the teacher's weights the first process holds."""

    def on_train_start(self, trainer, pl_module):
        parameters = list(pl_module.frozen.teacher.parameters())
        share = sum(local_part(p).numel() for p in parameters) / sum(p.numel() for p in parameters)
        if trainer.is_global_zero:
            (pl_module.output / "share").write_text(f"{share:.2f}")


def fit(pipe_folder, output, *extra, **options):
    """Run it in this process."""
    main(["fit", *arguments(pipe_folder, output, *extra, **options)])


def fit_elsewhere(*args, script=ROOT / "train.py", check=True):
    """Run a script in another process, on one thread so that several do not fight."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)], env=environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def result(output):
    """Weights of the exported denoiser."""
    import obsdiff

    return obsdiff.load_pipeline(output / "recovered").transformer.state_dict()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"{len(different)} of {len(wanted)} differ, such as {different[:3]}"


def assert_zero(output):
    """Every masked weight of the result is exactly zero, and some weight has been trained."""
    import obsdiff
    from obsdiff.pruning.masks import load_masks

    after = result(output)
    before = obsdiff.load_pipeline(output / "pruned").transformer.state_dict()
    masks = load_masks(output / "recovered" / "masks.safetensors")
    assert masks
    for layer, kept in masks.items():
        weight = after[f"{layer}.weight"]
        assert bool((weight[~kept] == 0).all())
    unchanged = [layer for layer in masks if torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"])]
    assert len(unchanged) <= 1  # the last block's text queries reach no output, so nothing but weight decay moves them


def measurable() -> tuple[Suite, torch.Tensor, torch.Tensor, list[str]]:
    """A suite, seven images, the dense ones and their prompts, the same in every process."""
    images, labels = load_digits("test")
    dense = (images[:7] + 1) / 2
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    prompts = [f"the digit {DIGIT_WORDS[label]}" for label in labels[:7]]
    return load_suite("digits", EvaluationOptions()), (dense + 0.1 * noise).clamp(0, 1), dense, prompts
