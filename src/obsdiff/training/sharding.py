"""Weights split over processes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from obsdiff.errors import UserError
from obsdiff.models.graph import stages_of


def check_mesh(strategy: Any, world_size: int) -> None:
    """Refuse a mesh that does not split over all processes: the others would train copies of their own.

    Lightning's default sizes are those of tensor parallelism within a node.

    Args:
        strategy: The trainer's.
        world_size: Processes.

    Raises:
        UserError: Naming the sizes to give.
    """
    size = getattr(strategy, "_data_parallel_size", world_size)
    if isinstance(strategy, ModelParallelStrategy) and world_size > 1 and size != world_size:
        raise UserError(
            f"trainer.strategy.data_parallel_size is {size}, of {world_size} processes, which would not train one "
            f"model; give --trainer.strategy.data_parallel_size {world_size} --trainer.strategy.tensor_parallel_size 1"
        )


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
