"""What a recovery accepts. The fields are the schema of command line and YAML alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Objective:
    """Weights of the losses; those at zero are not computed.

    Args:
        denoise: The pipeline's own training loss on images (flow matching, epsilon or v prediction).
        distill_output: Squared difference to the dense teacher's answer.
        distill_guided: Squared difference of the guided outputs, negative + scale x (positive - negative): each sample
            is asked about with both prompts, in place of prompt dropout, which doubles a step.
        distill_features: Squared difference to the teacher's block outputs, relative to their size, without outliers.
        distill_jacobian: Second-order matching of the input gradients (2ndMatch); doubles the backward pass.
        teacher_dtype: bfloat16 halves a teacher that runs; its answers are rounded then. Default: float32.
    """

    denoise: float = 0.0
    distill_output: float = 0.0
    distill_guided: float = 0.0
    distill_features: float = 0.0
    distill_jacobian: float = 0.0
    teacher_dtype: str | None = None


@dataclass
class Trained:
    """What is trained.

    Args:
        include: Names of parameters (or, with LoRA, of linear layers) to train, as shell patterns; default: all (with
            LoRA: all pruned layers).
        lora_rank: Train a LoRA of this rank that respects the mask, instead of the weights.
        lora_alpha: Scale of the LoRA: alpha / rank.
        frozen_dtype: With a LoRA: bfloat16 halves the weights that it is on, and rounds them; it stays float32 itself.
            Default: float32.
        gradient_checkpointing: Save memory, recompute activations in the backward pass.
    """

    include: list[str] = field(default_factory=list)
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    frozen_dtype: str | None = None
    gradient_checkpointing: bool = False


@dataclass
class Optimization:
    """AdamW, or another optimizer, and its schedule.

    Args:
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Of Adam.
        schedule: cosine (to zero at the end of the budget) or constant.
        warmup_steps: Linear warm-up.
        optimizer: Class of another optimizer, such as bitsandbytes.optim.AdamW8bit; default: torch.optim.AdamW.
        arguments: What else it takes, such as {fused: true}.
    """

    lr: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    schedule: str = "cosine"
    warmup_steps: int = 50
    optimizer: str | None = None
    arguments: dict[str, Any] | None = None
