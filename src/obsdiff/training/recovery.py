"""Recovery: pruning as the setup stage of a training run, then masked fine-tuning or distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from obsdiff.allocation.request import check_evaluation, check_seed, check_values
from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.references import Images, References, draw, measure, references
from obsdiff.evaluation.sampling import cycle_prompts, sample
from obsdiff.models.calling import PromptEncoder, drop_prompts, encode_images, noising_of_pipeline
from obsdiff.models.families import find_family
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.loading import check_source
from obsdiff.models.wiring import denoiser_of
from obsdiff.paths import user_path
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.options import EvaluationOptions, PruningOptions
from obsdiff.ranks import from_all, full_tensor, keyed_generator, rank, world_size
from obsdiff.training.budget import Cost, calibration_cost, step_flops
from obsdiff.training.objectives import TEACHER_TERMS, check_objective, loss_terms
from obsdiff.training.options import Objective, Optimization, Trained
from obsdiff.training.stage import Start, start_from

REFERENCES = "references.safetensors"


@dataclass
class _Frozen:
    """What belongs to the run but not to the trained module: neither moved, saved nor optimised with it."""

    start: Start
    teacher: nn.Module | None
    refs: References | None
    flops: tuple[int, int]  # of one call with one image: pruned, dense


class Recovery(lightning.LightningModule):
    """Prunes a pipeline in its setup stage, once, and trains what is left.

    Args:
        pipeline: The dense pipeline (embedded name, folder, hub id), or a prune run's folder without ``pruning``.
        output: Folder of the run: statistics, the pruned pipeline, references, checkpoints, logs and the result.
        pruning: The one-shot stage; None takes the pipeline as it is.
        objective: Weights of the losses.
        trained: What is trained.
        optimization: AdamW and its schedule.
        evaluation: Images drawn at each validation, with the same prompts and seeds by the dense and pruned pipeline.
        prompt_dropout: Share of prompts replaced by the negative one, for classifier-free guidance.
        seed: Of noise, times and dropped prompts.
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
    ) -> None:
        super().__init__()
        self.pipeline, self.pruning = check_source(pipeline, "model.pipeline"), pruning
        self.output = user_path(output, "model.output")
        self.weights = check_objective(objective or Objective(distill_output=1.0))
        self.trained, self.optimization = trained or Trained(), optimization or Optimization()
        self.evaluation = evaluation or EvaluationOptions()
        self.prompt_dropout, self.seed, self.overwrite = prompt_dropout, seed, overwrite
        self.budget_fraction = 0.0  # kept up to date by the Budget callback
        self.last_measured: dict[str, Any] = {}
        self.denoiser: nn.Module | None = None
        self._frozen: list[_Frozen] = []  # in a list, so that nn.Module does not register what is inside
        self._drawn: dict[int, Tensor] = {}
        self._sharded = False
        if pruning is not None:
            check_values(pruning)
        check_seed("model.seed", seed)
        check_evaluation(self.evaluation)
        if self.optimization.schedule not in ("cosine", "constant"):
            raise UserError(f"unknown schedule {self.optimization.schedule!r}; choose cosine or constant")
        if not 0 <= prompt_dropout <= 1:
            raise UserError(f"model.prompt_dropout is {prompt_dropout:g}; it must be in [0, 1]")

    # ---- setup: prune once, load, choose what is trained

    def setup(self, stage: str) -> None:
        """Prune if that was not done before, load the pruned pipeline and what it is compared with."""
        if self._frozen:
            return
        device, fitting = str(self.trainer.strategy.root_device), stage == "fit"
        start = start_from(self.pipeline, self.pruning, self.output, device, fitting, self.overwrite)
        denoiser = denoiser_of(start.pipe)
        call = call_arguments(start.pipe)
        flops = denoiser_flops(start.pipe, call)
        teacher, dense_flops = None, flops
        needs_teacher = fitting and any(term in self.weights for term in TEACHER_TERMS)
        dense = load_pipeline(start.dense, dtype="float32", device=device) if fitting else None
        if dense is not None:
            dense_flops = denoiser_flops(dense, call)
            if needs_teacher:
                teacher = denoiser_of(dense).requires_grad_(False).eval()
        refs = self._references(start, dense)
        for model in (start.pipe.vae, *_text_encoders(start.pipe)):
            model.requires_grad_(False)
        self._frozen.append(_Frozen(start, teacher, refs, (flops, dense_flops)))
        self._choose_trained(denoiser, start.masks)
        self.denoiser = denoiser
        self.noising = noising_of_pipeline(start.pipe)
        self.encode_prompts = PromptEncoder(start.pipe)

    def _references(self, start: Start, dense: Any) -> References | None:
        options, info = self.evaluation, info_of(start.pipe)
        source = options.prompts or info.prompts.get("evaluation")
        if options.num_images < 1:
            return None
        if source is None:
            raise UserError("give --model.evaluation.prompts, or --model.evaluation.num_images 0 for no evaluation")
        prompts = cycle_prompts(load_prompts(source, options.column), options.num_images)
        seeds = list(range(options.seed, options.seed + options.num_images))
        key = {"pruned": start.manifest.get("denoiser_sha256"), "call": call_arguments(start.pipe)}
        return references(
            self.output / REFERENCES,
            {**key, "dense": start.dense},
            prompts,
            seeds,
            options.batch_size,
            info.alignment,
            lambda: dense or load_pipeline(start.dense, dtype="float32", device=str(start.pipe.device)),
            start.pipe,
        )

    def _choose_trained(self, denoiser: nn.Module, masks: Mapping[str, Tensor]) -> None:
        options = self.trained
        denoiser.requires_grad_(False)
        if options.lora_rank is not None:
            from obsdiff.training.adapters import add_adapters

            linear = [name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
            pruned = [name for name in linear if name in masks]
            chosen = _matching(linear, options.include) if options.include else pruned or linear
            add_adapters(denoiser, chosen, masks, options.lora_rank, options.lora_alpha)
        else:
            names = [name for name, _ in denoiser.named_parameters()]
            chosen = _matching(names, options.include) if options.include else names
            for name in chosen:
                denoiser.get_parameter(name).requires_grad_(True)
        if not any(parameter.requires_grad for parameter in denoiser.parameters()):
            raise UserError(f"model.trained.include {options.include} matches no parameter; nothing to train")
        denoiser.train()
        if options.gradient_checkpointing:
            enable: Any = getattr(denoiser, "enable_gradient_checkpointing", None)
            if enable is None:
                raise UserError(f"{type(denoiser).__name__} has no gradient checkpointing; turn it off")
            enable()

    def configure_model(self) -> None:
        """Shard the denoiser block by block where the strategy has a mesh of processes (FSDP2)."""
        if self.device_mesh is None or self.denoiser is None or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        self._sharded = True
        mesh = self.device_mesh["data_parallel"]
        blocks: Any = self.denoiser.get_submodule(find_family(self.denoiser).blocks)
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.denoiser, mesh=mesh)

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

    # ---- training

    def configure_optimizers(self) -> Any:
        options = self.optimization
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=options.lr, weight_decay=options.weight_decay, betas=options.betas, foreach=True
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            done = max(self.budget_fraction, step / total if math.isfinite(total) else 0.0)
            cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) if options.schedule == "cosine" else 1.0
            return min(1.0, (step + 1) / max(options.warmup_steps, 1)) * cosine

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert self.denoiser is not None
        # keyed by the batch's number, so that a resumed run draws what an uninterrupted one would have drawn
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        generator = keyed_generator(self.seed, progress.processed, rank())
        latents, times, embeds, target = self._inputs(batch, generator)
        terms = loss_terms(self.denoiser, self.frozen.teacher, self.weights, latents, times, embeds, target, generator)
        loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()})
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def _inputs(
        self, batch: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """Latents, times and embeds for the denoiser, and what it should answer if the batch holds images."""
        if "latents" in batch:
            latents, times, embeds, target = batch["latents"], batch["time"], batch["embeds"], None
        elif "image" in batch:
            clean = encode_images(self.start.pipe, batch["image"].to(self.device), generator)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            times = self.noising.draw(len(clean), generator).to(clean.device)
            latents, target = self.noising.add_noise(clean, noise, times), self.noising.target(clean, noise, times)
            encoded = self.encode_prompts(list(batch["prompt"]))
            embeds = {name: tensor.to(self.device) for name, tensor in encoded.items()}
        else:
            raise UserError(
                f"a training batch needs image and prompt, or latents, time, embeds; it has {sorted(batch)}"
            )
        dropped = torch.rand(len(latents), generator=generator) < self.prompt_dropout
        return latents, times, drop_prompts(embeds, dropped), target

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

    def _draw(self, indices: Tensor) -> Tensor:
        refs = self.frozen.refs
        assert refs is not None
        chosen = indices.tolist()
        with torch.autocast(self.device.type, enabled=False):
            prompts, seeds = [refs.prompts[i] for i in chosen], [refs.seeds[i] for i in chosen]
            return sample(self.start.pipe, prompts, seeds, batch_size=len(chosen))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._drawn |= dict(zip(batch.tolist(), self._draw(batch), strict=True))

    test_step = validation_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[int, Tensor]:
        """Images (c, h, w) in [0, 1] by their number."""
        return dict(zip(batch.tolist(), self._draw(batch), strict=True))

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, prefix: str) -> None:
        drawn = {index: image for part in from_all(self._drawn) for index, image in part.items()}
        self._drawn = {}
        refs = self.frozen.refs
        if self.trainer.sanity_checking or refs is None or len(drawn) < len(refs.prompts):
            return
        guided = torch.stack([drawn[index] for index in range(len(refs.prompts))])
        found = measure(refs, Images(guided, guided[:0]))
        self.last_measured = {**found, "images": guided}
        values = {f"fidelity_{key}": v for key, v in found["fidelity"].items() if isinstance(v, float)}
        values |= {key: value for key, value in found.items() if isinstance(value, float)}
        self.log_dict({f"{prefix}/{key}": value for key, value in values.items()}, rank_zero_only=False)

    @torch.no_grad()
    def draw_all(self) -> Images | None:
        """The evaluation's images with the weights as they are now, without guidance too; every process must call."""
        refs = self.frozen.refs
        if refs is None:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return draw(self.start.pipe, refs.prompts, refs.seeds, self.evaluation.batch_size, refs.alignment)

    # ---- costs and checkpoints

    def cost_before(self) -> dict[str, Cost]:
        """What pruning cost."""
        return calibration_cost(self.start.manifest, self.frozen.flops[1], world_size())

    def flops_per_image(self) -> float:
        """Denoiser FLOPs of training on one image."""
        student, dense = self.frozen.flops
        teacher = dense if self.frozen.teacher is not None else 0
        return step_flops(student, teacher, "distill_jacobian" in self.weights)

    def _identity(self) -> dict[str, Any]:
        manifest = self.start.manifest
        return {
            "pipeline": self.start.dense,
            "pattern": manifest.get("pattern"),
            "pruned denoiser": manifest.get("denoiser_sha256"),
            "lora_rank": self.trained.lora_rank,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["obsdiff"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found, own = checkpoint.get("obsdiff"), self._identity()
        if found is None:
            raise UserError("this checkpoint is not of a recovery; give one from the checkpoints folder of such a run")
        different = [f"{key} ({found.get(key)} there, {now} here)" for key, now in own.items() if found.get(key) != now]
        if different:
            raise UserError(f"this checkpoint belongs to another run: {'; '.join(different)}")
        if not self.trainer.training and "ema" in checkpoint:  # evaluate what would be exported
            checkpoint["state_dict"] |= checkpoint["ema"]


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _text_encoders(pipe: Any) -> list[nn.Module]:
    parts = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    return [part for part in parts if isinstance(part, nn.Module)]
