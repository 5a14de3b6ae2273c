"""What a recovery accepts. The fields are the schema of command line and YAML alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from obsdiff.pruning.options import CalibrationOptions


@dataclass
class PruningOptions:
    """The one-shot stage before training; the fields mean what they mean to ``prune``.

    Args:
        pattern: unstructured:RATIO, N:M, structured:RATIO, or structured:heads=R,ffn=R[,multiple_of=W].
        method: obs, admm, sparsegpt, wanda, magnitude or random.
        seed: Seed of calibration noise and of random methods.
        refit: Least squares on the kept weights; default: the method's own.
        include: Names of layers (structured: of attention and feed-forward modules) to prune, as shell patterns.
        exclude: Names to leave alone, as shell patterns.
        spare_blocks: Blocks to leave alone, negative from the end. Default: first and last for structured patterns.
        fusion: Ranking of heads over the two streams of joint attention: reciprocal_rank or relative_error.
        plan: Plan file with a pattern for each layer, as a prune run writes it; in place of ``pattern``.
        calibration: How layer inputs are measured.
    """

    pattern: str = "unstructured:0.5"
    method: str = "obs"
    seed: int = 0
    refit: bool | None = None
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    spare_blocks: list[int] | None = None
    fusion: str = "reciprocal_rank"
    plan: str | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)


@dataclass
class Objective:
    """Weights of the losses; those at zero are not computed.

    Args:
        denoise: The pipeline's own training loss on images (flow matching, epsilon or v prediction).
        distill_output: Squared difference to the dense teacher's answer.
        distill_features: Squared difference to the teacher's block outputs, relative to their size, without outliers.
        distill_jacobian: Second-order matching of the input gradients (2ndMatch); doubles the backward pass.
    """

    denoise: float = 0.0
    distill_output: float = 0.0
    distill_features: float = 0.0
    distill_jacobian: float = 0.0


@dataclass
class Trained:
    """What is trained.

    Args:
        include: Names of parameters (or, with LoRA, of linear layers) to train, as shell patterns; default: all (with
            LoRA: all pruned layers).
        lora_rank: Train a LoRA of this rank that respects the mask, instead of the weights.
        lora_alpha: Scale of the LoRA: alpha / rank.
        gradient_checkpointing: Save memory, recompute activations in the backward pass.
    """

    include: list[str] = field(default_factory=list)
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    gradient_checkpointing: bool = False


@dataclass
class Optimization:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Of Adam.
        schedule: cosine (to zero at the end of the budget) or constant.
        warmup_steps: Linear warm-up.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: str = "cosine"
    warmup_steps: int = 50
