"""Speed of a recovery's training step, paired within one process: with masks, without, and in a plain loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch

from obsdiff.diffusion.distill import output_loss
from obsdiff.models.calling import call_denoiser, drop_prompts
from obsdiff.models.subject import Subject, subject_of
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.options import EvaluationOptions, PruningOptions
from obsdiff.training.options import Objective
from obsdiff.training.recovery import Recovery
from obsdiff.versions import versions


class _Plain(lightning.LightningModule):
    """The same model and loss with nothing of ours around it."""

    def __init__(self, student: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.student, self.lr = student, lr

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.student.parameters(), lr=self.lr, foreach=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        embeds = drop_prompts(batch["embeds"], torch.zeros(len(batch["latents"]), dtype=torch.bool))
        return output_loss(call_denoiser(self.student, batch["latents"], batch["time"], embeds), batch["answer"])


def _plain(pipeline: str) -> _Plain:
    return _Plain(subject_of(load_pipeline(pipeline)).denoiser.train(), 1e-4)


class _Unmasked(Recovery):
    """A recovery that holds no masks."""

    def configure_callbacks(self) -> list[lightning.Callback]:
        return []

    def on_fit_start(self) -> None:
        pass


class _Taught(Recovery):
    """A recovery that runs the dense denoiser in every step."""

    def needs_teacher(self, dense: Subject) -> bool:
        return True


def _recovery(kind: type[Recovery], pipeline: str, pattern: str, output: Path) -> Recovery:
    return kind(
        pipeline,
        str(output),
        PruningOptions(pattern=pattern, method="magnitude"),
        Objective(distill_output=1.0),
        evaluation=EvaluationOptions(num_images=0),
    )


class _Clock(lightning.Callback):
    """Seconds of each step, the first ones left out."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.last = warmup, 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: object) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: object) -> None:
        if trainer.global_step > self.warmup:
            self.seconds.append(time.perf_counter() - self.last)


def bench_train(pipeline: str, pattern: str, data: Any, batch_size: int, steps: int, rounds: int) -> dict[str, Any]:
    """Median seconds per step of output distillation: masks enforced, not enforced, with a teacher that runs instead of
    its recorded answers, and a plain Lightning loop.

    Args:
        pipeline: The dense pipeline.
        pattern: How it is pruned (by magnitude: no calibration is needed for a speed).
        data: Makes the data module for (pipeline, folder, batch size).
        batch_size: Latents per step.
        steps: Timed steps in each round.
        rounds: Each round runs the four in turn, so that a change of the machine's speed meets all of them.

    Returns:
        The medians; ``mask_overhead``, ``of_taught`` (a step with recorded answers over one with the teacher) and
        ``throughput_of_plain`` as ratios; and what they depend on.
    """
    warmup = 5
    found: dict[str, list[float]] = {"masked": [], "unmasked": [], "taught": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            for kind in found:
                clock = _Clock(warmup)
                trainer = lightning.Trainer(
                    accelerator="cpu" if not torch.cuda.is_available() else "gpu",
                    devices=1,
                    max_steps=warmup + steps,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    limit_val_batches=0,
                    callbacks=[clock],
                )
                kinds = {"masked": Recovery, "unmasked": _Unmasked, "taught": _Taught}
                module = (
                    _recovery(kinds[kind], pipeline, pattern, folder / "run") if kind in kinds else _plain(pipeline)
                )
                trainer.fit(module, datamodule=data(pipeline, folder / "trajectories", batch_size))
                found[kind] += clock.seconds
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    return {
        **{f"{kind}_step_s": round(median, 5) for kind, median in medians.items()},
        "mask_overhead": round(medians["masked"] / medians["unmasked"] - 1, 4),
        "of_taught": round(medians["masked"] / medians["taught"], 4),
        "throughput_of_plain": round(medians["plain"] / medians["masked"], 4),
        "pipeline": pipeline,
        "pattern": pattern,
        "batch_size": batch_size,
        "steps": steps * rounds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
