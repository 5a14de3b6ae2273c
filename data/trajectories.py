"""Lightning data module of the dense pipeline's own trajectories: distillation that needs prompts but no images."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from obsdiff.data.loader import RecoveryData, ResumableLoader, batches_done, check_enough, check_loading
from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.models.calling import WHICH
from obsdiff.models.conditioning import told_nothing
from obsdiff.models.rows import NEGATIVE
from obsdiff.numbers import check_whole
from obsdiff.paths import user_path
from obsdiff.pruning.folder import load_pipeline
from obsdiff.pruning.record import (
    INDEX,
    Trajectories,
    check_recording,
    open_trajectories,
    record_trajectories,
    recording_request,
    remove_shards,
)
from obsdiff.ranks import from_all, rank, world_size


class TrajectoryDataset(Dataset[dict[str, Any]]):
    """One denoiser call of one trajectory each."""

    def __init__(self, trajectories: Trajectories) -> None:
        self.trajectories = trajectories

    def __len__(self) -> int:
        return len(self.trajectories.latents) * len(self.trajectories.times)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.trajectories
        prompt, call = divmod(index, len(found.times))
        embeds = {name: tensor[prompt] for name, tensor in found.embeds.items()}
        if found.denoisers is not None:
            embeds[WHICH] = found.denoisers[call]
        answers = {"answer": found.answers[prompt, call]}
        if found.negative_answers is not None:
            answers[f"{NEGATIVE}answer"] = found.negative_answers[prompt, call]
        return {"latents": found.latents[prompt, call], "time": found.times[call], "embeds": embeds, **answers}


class TrajectoryDataModule(RecoveryData):
    """Batches of ``latents`` (b, ...), ``time`` (b,), ``embeds`` (by name, (b, ...), negative ones included), and the
    dense denoiser's ``answer`` (b, ...) to them, with guidance also the ``negative_answer``.

    The trajectories are recorded once, by all processes together, and kept in ``folder``, which all processes and other
    runs read: of one with the same settings nothing is recorded again.

    Args:
        pipeline: The dense pipeline: an embedded name, a folder, or a hub id.
        folder: Where the recording is kept; one of the same settings is used again.
        prompts: Prompt set, as for the calibration; None for a pipeline that is told nothing, of which ``num_prompts``
            trajectories are recorded.
        column: Caption column of a table or dataset.
        num_prompts: Prompts to draw; default: all.
        steps: Denoising steps; default: the pipeline's own.
        guidance_scale: Classifier-free guidance; default: the pipeline's own.
        seed: Of prompts, noise and shuffling.
        batch_size: Latents per optimizer step and process.
        record_batch_size: Prompts per pipeline call while recording.
        num_workers: Loader processes.
    """

    def __init__(
        self,
        pipeline: str,
        folder: str,
        prompts: str | None = None,
        column: str | None = None,
        num_prompts: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        batch_size: int = 64,
        record_batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False  # the folder is shared, as the recovery's output is
        check_loading(batch_size, num_workers, seed)
        check_whole("data.record_batch_size", record_batch_size)
        self.pipeline, self.folder = pipeline, user_path(folder, "data.folder")
        if prompts is None and num_prompts is None:
            raise UserError("give data.prompts; or data.num_prompts for a pipeline that draws without prompts")
        self.named = prompts
        self.prompts = (
            [""] * (num_prompts or 0) if prompts is None else load_prompts(prompts, column, num_prompts, seed)
        )
        self.steps, self.guidance_scale, self.seed = steps, guidance_scale, seed
        self.batch_size, self.record_batch_size, self.num_workers = batch_size, record_batch_size, num_workers
        self.trajectories: Trajectories | None = None

    def prepare_data(self) -> None:
        """Record, if one process does it: of several, Lightning calls this on the first alone."""
        if world_size() == 1:
            self._record()

    def _record(self) -> None:
        """Record, unless it was done before or nothing is trained."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        pipe = load_pipeline(self.pipeline)
        if not told_nothing(pipe, self.named) and self.named is None:
            raise UserError(f"give data.prompts: {self.pipeline} draws what it is told")
        if from_all((self.folder / INDEX).exists())[0]:  # what the first one sees
            check_recording(
                self.folder, recording_request(pipe, self.prompts, self.steps, self.guidance_scale, self.seed)
            )
            if rank() == 0:
                remove_shards(self.folder)  # of a run that was killed when it had just finished
            return
        if self.trainer is not None:
            pipe.to(self.trainer.strategy.root_device)
        record_trajectories(
            pipe,
            self.prompts,
            self.folder,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=self.seed,
            batch_size=self.record_batch_size,
            quiet=False,
        )

    def setup(self, stage: str) -> None:
        """Open the recording, for training only; several processes make it first."""
        if stage == "fit":
            if world_size() > 1:
                self._record()
            self.trajectories = open_trajectories(self.folder)
            check_enough(len(TrajectoryDataset(self.trajectories)), self.batch_size, str(self.folder))

    def train_dataloader(self) -> ResumableLoader:
        """Calls of all trajectories in a new order every epoch."""
        assert self.trajectories is not None
        return ResumableLoader(
            TrajectoryDataset(self.trajectories),
            self.batch_size,
            self.seed,
            batches_done(self.trainer),
            self.num_workers,
            str(self.folder),
        )
