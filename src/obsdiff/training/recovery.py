"""Recovery: pruning as the setup stage of a training run, then masked fine-tuning or distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from obsdiff.allocation.request import check_values
from obsdiff.callbacks.budget import Budget
from obsdiff.callbacks.ema import refuse_averaging
from obsdiff.callbacks.find import find
from obsdiff.callbacks.mask import MaskEnforcement
from obsdiff.callbacks.samples import SampleGrid
from obsdiff.costs import Cost, step_flops
from obsdiff.errors import UserError
from obsdiff.evaluation.evaluate import Images
from obsdiff.evaluation.flops import FlopCounts, denoiser_flops
from obsdiff.evaluation.prompts import evaluation_prompts
from obsdiff.evaluation.references import References, draw, references
from obsdiff.evaluation.sampling import sample
from obsdiff.evaluation.suite import load_suite
from obsdiff.models.calling import PromptEncoder, default_dtype, drawing
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.loading import check_source
from obsdiff.models.released import release
from obsdiff.models.subject import Subject
from obsdiff.models.texts import texts_kept
from obsdiff.numbers import check_seed
from obsdiff.paths import user_path
from obsdiff.pruning.options import EvaluationOptions, PruningOptions
from obsdiff.ranks import full_tensor, keyed_generator, rank
from obsdiff.training.checks import (
    check,
    check_evaluation,
    check_interval,
    check_objective,
    check_optimization,
    check_places,
    check_trained,
    check_trainer,
)
from obsdiff.training.fits import check_data, check_guided, has_answers, recording_of
from obsdiff.training.identity import check_adapters, check_settings, differences, settings_of
from obsdiff.training.inputs import Inputs
from obsdiff.training.objectives import TEACHER_TERMS, loss_terms, teacher_runs
from obsdiff.training.optimizers import optimizer_of, schedule_of
from obsdiff.training.options import Objective, Optimization, Trained
from obsdiff.training.precision import keep_times
from obsdiff.training.selection import check_selection, choose_trained, load_trained
from obsdiff.training.sharding import check_shardable, shard_blocks
from obsdiff.training.spending import costs_before, expected_costs
from obsdiff.training.stage import REFERENCES, Start, dense_key, load_dense, start_from
from obsdiff.training.validation import Validation


@dataclass
class _Frozen:
    """What belongs to the run but not to the trained module: neither moved, saved nor optimised with it."""

    start: Start
    teacher: nn.Module | None
    refs: References | None
    flops: tuple[int, int]  # of one call with one image: pruned, dense
    costs: dict[str, Cost]  # before training, by stage
    counts: tuple[FlopCounts, FlopCounts | None]  # of the denoiser as it trains, and of the teacher if that runs


class Recovery(lightning.LightningModule):
    """Prunes a pipeline in its setup stage, once, and trains what is left.

    Args:
        pipeline: The dense pipeline (embedded name, folder, hub id), or a prune run's folder without ``pruning``.
        output: Folder of the run: statistics, the pruned pipeline, references, checkpoints, logs and the result.
        pruning: The one-shot stage; None takes the pipeline as it is.
        objective: Weights of the losses.
        trained: What is trained.
        optimization: AdamW, or another optimizer, and its schedule.
        evaluation: Images drawn at each validation, with the same prompts and seeds by the dense and pruned pipeline.
        prompt_dropout: Share of prompts replaced by the negative one, for classifier-free guidance.
        seed: Of noise, times and dropped prompts.
        resume_changed: Go on from a checkpoint though objective, optimization, data, seed or the like changed since.
        overwrite: Replace an earlier run in ``output`` that pruned otherwise, and its result.
    """

    def __init__(
        self,
        pipeline: str,
        output: str,
        pruning: PruningOptions | None = None,
        objective: Objective | None = None,
        trained: Trained | None = None,
        optimization: Optimization | None = None,
        evaluation: EvaluationOptions | None = None,
        prompt_dropout: float = 0.1,
        seed: int = 0,
        overwrite: bool = False,
        resume_changed: bool = False,
    ) -> None:
        super().__init__()
        self.pipeline, self.pruning = check_source(pipeline, "model.pipeline"), pruning
        self.output = user_path(output, "model.output")
        objective = objective or Objective(distill_output=1.0)
        self.weights, self.teacher_dtype = check_objective(objective), objective.teacher_dtype
        self.trained, self.optimization = trained or Trained(), optimization or Optimization()
        self.evaluation = evaluation or EvaluationOptions()
        self.prompt_dropout, self.seed, self.overwrite = prompt_dropout, seed, overwrite
        if pruning is not None:
            check_values(pruning)
        check_trained(self.trained)
        check_optimization(self.optimization)
        check_evaluation(self.evaluation)
        check_seed("model.seed", seed)
        check(0 <= prompt_dropout <= 1, "model.prompt_dropout", prompt_dropout, "in [0, 1]")
        self.resume_changed = resume_changed
        self.resumed = False  # set before a fit from a checkpoint: the result of the part before is replaced then
        self.batch_flops = 0.0  # in the denoisers, of this process's last batch, forward and backward
        self.budget_fraction = 0.0  # kept up to date by the Budget callback
        self.validation: Validation | None = None
        self.denoiser: nn.Module | None = None
        self._frozen: list[_Frozen] = []  # in a list, so that nn.Module does not register what is inside
        self._sharded = self._fitted = False

    def configure_callbacks(self) -> list[lightning.Callback]:
        """What no trainer may lack: the masks are held, unless it holds them already in a way of its own."""
        check_trainer(self.trainer, self.weights)
        check_places(self.trainer, self)
        refuse_averaging(self.trainer)
        return [] if find(self.trainer, MaskEnforcement) else [MaskEnforcement()]

    def on_fit_start(self) -> None:
        """Refuse to train masked weights that nothing holds.

        Raises:
            RuntimeError: A subclass replaced ``configure_callbacks``.
        """
        if self.named_masks() and find(self.trainer, MaskEnforcement) is None:
            raise RuntimeError(
                "nothing holds the masks: call super().configure_callbacks(), or give the trainer a MaskEnforcement"
            )

    # ---- setup: prune once, load, choose what is trained

    def setup(self, stage: str) -> None:
        """Prune if that was not done before, load the pruned pipeline and what it is compared with."""
        keep_times(self.trainer.precision_plugin)
        device, fitting = str(self.trainer.strategy.root_device), stage == "fit"
        if self._frozen and (self._fitted or not fitting):
            return
        self._frozen.clear()  # what was only evaluated so far has no teacher
        self._fitted = fitting
        start = start_from(
            self.pipeline, self.pruning, self.output, device, self.overwrite, self._check if fitting else None
        )
        denoiser = start.subject.denoiser
        flops = denoiser_flops(start.subject, call_arguments(start.pipe))
        teacher, dense_flops = None, flops
        if start.teacher is not None:
            dense_flops = denoiser_flops(start.teacher, call_arguments(start.teacher.pipe))
            if self.needs_teacher(start.teacher):
                teacher = start.teacher.denoiser.requires_grad_(False).eval()
        costs = costs_before(start, dense_flops, recording_of(self.trainer)) if fitting else {}
        if fitting and (budget := find(self.trainer, Budget)) is not None:
            budget.check(sum(costs.values(), Cost()), "already cost")
        with texts_kept(start.pipe):  # so that its text encoders can leave before the next images are drawn
            refs = self._references(start, device)
        for name, model in start.pipe.components.items():
            if isinstance(model, nn.Module) and name not in start.subject.components:
                model.requires_grad_(False)
        if teacher is not None and self.teacher_dtype is not None:
            teacher = teacher.to(getattr(torch, self.teacher_dtype))
        choose_trained(denoiser, start.masks, self.trained)
        counts = (FlopCounts(denoiser), None if teacher is None else FlopCounts(teacher))
        if refs is not None:
            self.validation = Validation(refs, load_suite(refs.alignment, self.evaluation, device))
        self._frozen.append(_Frozen(replace(start, teacher=None), teacher, refs, (flops, dense_flops), costs, counts))
        self.denoiser = denoiser
        recording = recording_of(self.trainer) if fitting else None
        common = {} if recording is None else recording.common
        guided = "distill_guided" in self.weights
        recorded = teacher is None and any(term in self.weights for term in TEACHER_TERMS)
        self.inputs = Inputs(start.subject, PromptEncoder(start.pipe), self.prompt_dropout, guided, common, recorded)
        if recording is not None:
            release(start.pipe)  # trajectories hold all that training needs but the denoiser

    def needs_teacher(self, dense: Subject) -> bool:
        """Whether the dense denoiser has to run in every step: its recorded answers may be all that the losses need."""
        return teacher_runs(self.weights, has_answers(dense, recording_of(self.trainer)))

    def _check(self, dense: Subject) -> None:
        """Refuse what training could not go on from, before anything is pruned or drawn."""
        check_selection(dense.denoiser, self.trained)
        check_shardable(self.trainer.strategy, dense)
        if "distill_guided" in self.weights:
            check_guided(dense, recording_of(self.trainer))
        evaluation_prompts(dense.pipe, self.evaluation)
        check_data(dense, self.trainer.datamodule)  # type: ignore[attr-defined]  # of Lightning's data connector
        check_interval(self.trainer)
        if (budget := find(self.trainer, Budget)) is not None:
            expected = expected_costs(dense, self.pruning, recording_of(self.trainer))
            budget.check(sum(expected.values(), Cost()), "will cost")

    def _references(self, start: Start, device: str) -> References | None:
        options = self.evaluation
        prompts = evaluation_prompts(start.pipe, options)
        if not prompts:
            return None
        seeds = list(range(options.seed, options.seed + options.num_images))
        return references(
            self.output / REFERENCES,
            {"pruned": start.content, "dense": dense_key(start), "call": call_arguments(start.pipe)},
            prompts,
            seeds,
            options.batch_size,
            info_of(start.pipe).alignment,
            lambda: (start.teacher or load_dense(start, device)).pipe,
            start.pipe,
        )

    def configure_model(self) -> None:
        """Shard the denoiser, and a teacher that runs, where the strategy has a mesh of processes (FSDP2)."""
        if self.device_mesh is None or self.denoiser is None or self._sharded:
            return
        self._sharded = True
        for model in (self.denoiser, self.frozen.teacher):
            if model is not None:
                shard_blocks(model, self.device_mesh["data_parallel"])

    @property
    def frozen(self) -> _Frozen:
        """Start, teacher and references; there after setup."""
        return self._frozen[0]

    @property
    def start(self) -> Start:
        """What the recovery started from."""
        return self.frozen.start

    def named_masks(self) -> dict[str, Tensor]:
        """Masks (True = kept) by the name of the parameter they belong to."""
        assert self.denoiser is not None
        own = dict(self.denoiser.named_parameters())
        adapted = {layer: f"{layer}.base_layer.weight" for layer in self.start.masks}
        return {
            adapted[layer] if adapted[layer] in own else f"{layer}.weight": mask
            for layer, mask in self.start.masks.items()
        }

    def load_trained(self, denoiser: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Give a freshly loaded denoiser the trained weights (the whole state), adapters merged; see
        :func:`obsdiff.training.selection.load_trained` for what the two share then."""
        load_trained(denoiser, state, self.start.masks, self.trained)

    # ---- training

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.optimization, [p for p in self.parameters() if p.requires_grad])
        total = self.trainer.estimated_stepping_batches

        def done(step: int) -> float:
            return max(self.budget_fraction, step / total if math.isfinite(total) else 0.0)

        schedule = schedule_of(optimizer, self.optimization, done)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert self.denoiser is not None
        # keyed by the batch's number, so that a resumed run draws what an uninterrupted one would have drawn
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        generator = keyed_generator(self.seed, progress.processed, rank())
        teacher = self.frozen.teacher
        with default_dtype():
            told, target = self.inputs(batch, generator, self.device)
            kept = (self.start.manifest.get("depth") or {}).get("kept")
            terms = loss_terms(self.denoiser, teacher, self.weights, told, target, generator, kept)
        mine, theirs = self.frozen.counts
        dense_flops = 0 if theirs is None else theirs(told.latents, told.embeds, told.common)
        self.batch_flops = step_flops(
            mine(told.latents, told.embeds, told.common), dense_flops, "distill_jacobian" in self.weights
        )
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()})
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a gradient that is not finite spoils the weights (loss scaling skips such steps itself)."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        self.log("grad_norm", norm)
        if not bool(torch.isfinite(norm)):
            raise UserError(
                f"the gradient is not finite at step {self.trainer.global_step}; training stopped, the last checkpoint "
                f"in {self.output / 'checkpoints'} is good; lower --model.optimization.lr"
            )

    # ---- evaluation: Lightning's validation loop draws the images, each process its share

    def evaluation_loader(self) -> Any:
        """Numbers of the evaluation's images, in batches; the data modules hand it to Lightning."""
        refs = self.frozen.refs
        return DataLoader(range(len(refs.prompts)), batch_size=self.evaluation.batch_size) if refs is not None else []  # type: ignore[arg-type]

    def _draw(self, indices: Tensor, allow_nonfinite: bool = False) -> Tensor:
        refs, chosen = self.frozen.refs, indices.tolist()
        assert refs is not None
        prompts, seeds = [refs.prompts[i] for i in chosen], [refs.seeds[i] for i in chosen]
        with drawing(self.start.pipe):
            return sample(self.start.pipe, prompts, seeds, batch_size=len(chosen), allow_nonfinite=allow_nonfinite)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert self.validation is not None
        grid = find(self.trainer, SampleGrid)
        drawn = self._draw(batch, allow_nonfinite=True)  # measured as such; one process alone must not stop
        with drawing(self.start.pipe):  # measured in float32 whatever the run's precision is
            self.validation.take(batch, drawn, 0 if grid is None else grid.shown)

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[int, Tensor]:
        """Images (c, h, w) in [0, 1] by their number."""
        return dict(zip(batch.tolist(), self._draw(batch), strict=True))

    def on_validation_epoch_start(self) -> None:
        if self.validation is not None:
            self.validation.start()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, prefix: str) -> None:
        if self.trainer.sanity_checking or self.validation is None:
            return
        figures = self.validation.finish() or {}
        values = {f"{prefix}/{name}": value for name, value in figures.items() if isinstance(value, float)}
        self.log_dict(values, rank_zero_only=False)

    def draw_all(self) -> Images | None:
        """The evaluation's images with the weights as they are now, without guidance too; every process must call."""
        refs = self.frozen.refs
        if refs is None:
            return None
        options = self.evaluation
        with drawing(self.start.pipe):
            return draw(
                self.start.pipe, refs.prompts, refs.seeds, options.batch_size, refs.alignment, allow_nonfinite=True
            )

    # ---- costs and checkpoints

    def cost_before(self) -> dict[str, Cost]:
        """What was spent before training, by stage."""
        return self.frozen.costs

    def _identity(self) -> dict[str, Any]:
        start = self.start
        return {
            "pattern": start.manifest.get("pattern"),
            "pruned denoiser": ", ".join(start.content[component] for component in start.subject.components),
            "lora_rank": self.trained.lora_rank,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["obsdiff"] = {**self._identity(), "settings": settings_of(self)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._frozen:
            raise UserError("a recovery is set up by its Trainer: give the checkpoint to fit or validate as ckpt_path")
        found = checkpoint.get("obsdiff")
        if found is None:
            raise UserError("this checkpoint is not of a recovery; give one from the checkpoints folder of such a run")
        own = self._identity()
        if different := differences({key: found.get(key) for key in own}, own):
            raise UserError(f"this checkpoint belongs to another run: {'; '.join(different)}")
        if self.trainer.state.fn == "fit":
            check_settings(checkpoint, found.get("settings", {}), self)
            return
        check_adapters(found.get("settings", {}), self)
        if "ema" in checkpoint:  # evaluate what would be exported
            checkpoint["state_dict"] |= checkpoint["ema"]
