"""Run under torchrun by test_one_clock: two recoveries by the clock, with clocks that differ between the processes.

Usage: clocks.py PIPELINE OUTPUT"""

import sys
from pathlib import Path

import lightning
import torch

from obsdiff.callbacks import budget
from obsdiff.data.digits import DigitsDataModule
from obsdiff.pruning.options import EvaluationOptions, PruningOptions
from obsdiff.ranks import rank
from obsdiff.training.options import Objective, Optimization
from obsdiff.training.recovery import Recovery


class Clock:
    """Gives time in place of ``time``: 1 s a call on the first process, 1.7 s on the second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0 + 0.7 * rank()
        return self.now


class Rates(lightning.Callback):
    """Learning rates by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def main(pipeline: str, output: Path) -> None:
    vars(budget)["time"] = Clock()
    for name, limits in (("wall_s", budget.Budget(wall_s=9.5)), ("device_s", budget.Budget(device_s=19.0, steps=100))):
        rates = Rates()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=-1,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[limits, rates],
        )  # fmt: skip
        module = Recovery(
            pipeline,
            str(output / name),
            PruningOptions(pattern="unstructured:0.5", method="magnitude", spare_blocks=[]),
            Objective(denoise=1.0),
            optimization=Optimization(lr=1e-3, warmup_steps=1),
            evaluation=EvaluationOptions(num_images=0),
        )
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
        assert module.denoiser is not None
        weights = {key: tensor.clone() for key, tensor in module.denoiser.state_dict().items()}
        torch.save([trainer.global_step, rates.seen, weights], output / f"{name}-{rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
