"""Weights split over processes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.graph import stages_of
from obsdiff.models.subject import Subject


def check_mesh(strategy: Any, world_size: int, weights: Collection[str]) -> None:
    """Refuse a mesh that does not split over all processes: the others would train copies of their own.

    Lightning's default sizes are those of tensor parallelism within a node.

    Args:
        strategy: The trainer's.
        world_size: Processes.
        weights: Terms of the loss.

    Raises:
        UserError: Naming the sizes to give, or the term that does not work so.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if "distill_jacobian" in weights:
        raise UserError("distill_jacobian does not work with weights that are split; use --trainer.strategy ddp")
    size = strategy._data_parallel_size
    size = strategy.num_nodes if size == "auto" else size
    if world_size > 1 and size != world_size:
        raise UserError(
            f"trainer.strategy.data_parallel_size is {size}, of {world_size} processes, which would not train one "
            f"model; give --trainer.strategy.data_parallel_size {world_size} --trainer.strategy.tensor_parallel_size 1"
        )


def check_shardable(strategy: Any, subject: Subject) -> None:
    """Refuse to split two denoisers: processes whose rows are all for one of them would not wait for the other.

    Raises:
        UserError: There are two.
    """
    if isinstance(strategy, ModelParallelStrategy) and len(subject.components) > 1:
        raise UserError(f"{' and '.join(subject.components)} cannot be split together; use --trainer.strategy ddp")


def shard_blocks(denoiser: nn.Module, mesh: Any) -> None:
    """Split a denoiser over the processes of a mesh, block by block: whole on a process is the block that runs (FSDP2).

    Args:
        denoiser: Changed in place; frozen parameters are split, too.
        mesh: Of one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    for stage in stages_of(denoiser):
        fully_shard(denoiser.get_submodule(stage), mesh=mesh)
    # by itself the outermost stays whole after a forward pass, so that averages would not fit its parameters
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
