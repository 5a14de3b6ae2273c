"""The statistics of a calibration, and their store on disk.

A store is a folder: ``statistics.json`` (fingerprint, sums, checksums) and one safetensors file per site. It is
written whole or not at all, and read site by site, so that memory holds one Hessian at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from obsdiff.errors import MALFORMED, UserError, brief
from obsdiff.files import check_folder, check_writable, read_json, whole_folder, write_json
from obsdiff.models.content import model_hash as model_hash  # part of what this module offers
from obsdiff.obs.observers import GATES, OBSERVERS, PASSES, Observer, gradient_for

INDEX = "statistics.json"
FORMAT = 3
READABLE = (2, FORMAT)  # 2 keeps whole matrices


@dataclass(frozen=True)
class LossGradients:
    """What a pass leaves.

    Attributes:
        need: Its name in :data:`obsdiff.obs.observers.GRADIENTS`.
        by_layer: Gradient of the mean loss by each layer's weight, float32 in its shape, on its device.
        losses: Mean loss by time as the scheduler counts it, the least noisy first.
        used: The times that are in the gradients.
        rows: What it took: rows that the denoiser answered, a backward pass counted as twice its forward pass.
        time_s: Seconds it took.
    """

    need: str
    by_layer: Mapping[str, Tensor]
    losses: Mapping[float, float]
    used: Sequence[float]
    rows: int
    time_s: float

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps."""
        losses = {f"{at:g}": loss for at, loss in self.losses.items()}
        return {"need": self.need, "losses": losses, "used": [f"{at:g}" for at in self.used], "rows": self.rows}


@dataclass(frozen=True)
class LearnedGates:
    """What learning gates leaves.

    Attributes:
        by_group: λ of each unit by group, float32 (count,), on the denoiser's device.
        losses: The distillation loss over the first and over the last tenth of the steps.
        steps: Of the optimizer.
        rows: What it took, as for gradients.
        time_s: Seconds it took.
    """

    by_group: Mapping[str, Tensor]
    losses: tuple[float, float]
    steps: int
    rows: int
    time_s: float

    def to_json(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {"steps": self.steps, "loss_before": self.losses[0], "loss_after": self.losses[1], "rows": self.rows}


@dataclass
class Statistics:
    """What a calibration leaves.

    Attributes:
        fingerprint: Everything that the numbers depend on, JSON-able.
        sites: Statistics by site name, in memory; or
        folder: the store they are read from, one at a time.
        prompts: Numbers of the prompts that are in the sums, rising.
        time_s: Seconds spent: "calibrate" in all, "forward_only" in the denoiser itself.
        observer: What was accumulated at each site, a name of :data:`obsdiff.obs.observers.OBSERVERS`.
        gradients: Of the denoising loss, if they were asked for; a store does not keep them.
        gates: Of units, if they were asked for; a store does not keep them.
    """

    fingerprint: dict[str, Any]
    sites: dict[str, Observer] = field(default_factory=dict)
    folder: Path | None = None
    prompts: Sequence[int] = ()
    time_s: dict[str, float] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    observer: str = "gram"
    gradients: LossGradients | None = None
    gates: LearnedGates | None = None

    @property
    def inputs(self) -> bool:
        """Whether it holds anything of layer inputs."""
        return bool(self.sites or self.index)

    @property
    def prompts_done(self) -> int:
        """Prompts that are in the sums."""
        return len(self.prompts)

    @property
    def slopes(self) -> Mapping[str, Tensor] | None:
        """Gradients by layer, if there are any."""
        return None if self.gradients is None else self.gradients.by_layer

    @property
    def openness(self) -> Mapping[str, Tensor] | None:
        """Gates by group, if there are any."""
        return None if self.gates is None else self.gates.by_group

    def described(self) -> dict[str, Any]:
        """The fingerprint with what the passes of their own cost, as a manifest keeps it."""
        passes = {"gradients": self.gradients, "gates": self.gates}
        found = {name: {**done.to_json(), "inputs": self.inputs} for name, done in passes.items() if done is not None}
        return {**self.fingerprint, **found}

    def __contains__(self, site: str) -> bool:
        return site in self.sites or site in self.index

    def __iter__(self) -> Iterator[str]:
        yield from self.sites if self.folder is None else self.index

    def site(self, name: str, device: torch.device | str = "cpu") -> Observer:
        """The statistics of one site.

        Raises:
            UserError: The store has no such site, or its file is damaged.
        """
        if name in self.sites:
            return self.sites[name]
        if self.folder is None or name not in self.index:
            raise UserError(f"the statistics hold no site {name}; calibrate again with the layers you want to prune")
        return _read_site(self, name, device)

    def take(self, name: str, device: torch.device | str = "cpu") -> Observer:
        """Like :meth:`site`, and forget it: for statistics that serve one prune only."""
        found = self.site(name, device)
        self.forget(name)
        return found.released()

    def forget(self, name: str) -> None:
        """Let the statistics of a site go, if they are held."""
        self.sites.pop(name, None)


def check_measured_on(statistics: Statistics, denoiser: nn.Module) -> None:
    """Refuse statistics of other weights than ``denoiser`` has now.

    Raises:
        UserError: They are.
    """
    there, now = statistics.fingerprint.get("model"), model_hash(denoiser)
    if there != now:
        raise UserError(
            f"the statistics were measured on other weights (model {_short(there)} there, {_short(now)} now); "
            "calibrate this pipeline as it is"
        )


def check_serves(statistics: Statistics, needs: Collection[str], what: str) -> None:
    """Refuse statistics that hold less than ``what`` needs.

    Raises:
        UserError: They do.
    """
    slope = gradient_for(needs)
    if slope is not None and (statistics.gradients is None or statistics.gradients.need != slope):
        raise UserError(
            f"the statistics hold no {slope}, which {what} needs (a store keeps none); calibrate for that "
            f"(needs={sorted(needs)})"
        )
    if GATES in needs and statistics.gates is None:
        raise UserError(
            f"the statistics hold no gates, which {what} needs (a store keeps none); calibrate for them "
            f"(needs={sorted(needs)})"
        )
    if missing := sorted(set(needs) - PASSES - OBSERVERS[statistics.observer].gives):
        place = "" if statistics.folder is None else f" in {statistics.folder}"
        other = "" if statistics.folder is None else ", into another folder"
        raise UserError(
            f"the statistics{place} hold only the {statistics.observer} of H, {what} needs {', '.join(missing)}; "
            f"calibrate for that (needs={missing}){other}"
        )


def check_fingerprint(
    found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, what: str = "statistics"
) -> None:
    """Refuse a store of ``what`` that was made with anything else than what is asked for now.

    Raises:
        UserError: Naming what differs.
    """
    differences = [f"{key} ({_short(old)} there, {_short(new)} now)" for key, old, new in _differing(found, wanted)]
    if differences:
        raise UserError(
            f"{what} in {folder} belong{'' if what.endswith('s') else 's'} to another model or other settings: "
            f"{', '.join(differences)}; use the same settings or another folder"
        )


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What ``wanted`` has otherwise: names, old and new values; of nested mappings entry by entry, lost ones too."""
    for key, value in wanted.items():
        old = found.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            keys = [*value, *(other for other in old if other not in value)]
            yield from ((name, old.get(name), value.get(name)) for name in keys if old.get(name) != value.get(name))
        elif old != value:
            yield key, old, value


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """Write a store, whole or not at all; an older one in its place is replaced."""
    with whole_folder(folder, INDEX, replace=True) as temporary:
        (temporary / "sites").mkdir()
        index = {}
        for number, (name, site) in enumerate(statistics.sites.items()):
            content = save(site.tensors())
            file = f"sites/{number:05d}.safetensors"
            (temporary / file).write_bytes(content)
            index[name] = {
                "file": file,
                "sha256": hashlib.sha256(content).hexdigest(),
                "weight_sum": site.weight_sum,
                "num_tokens": site.num_tokens,
                "observer": next(name for name, kind in OBSERVERS.items() if type(site) is kind),
            }
        write_json(
            temporary / INDEX,
            {
                "format": FORMAT,
                "fingerprint": statistics.fingerprint,
                "observer": statistics.observer,
                "prompts_done": statistics.prompts_done,
                "prompts": _spans(statistics.prompts),
                "time_s": statistics.time_s,
                "sites": index,
            },
        )


def check_store(folder: Path) -> None:
    """Refuse a folder that neither is a store nor can become one, before anything is measured.

    Raises:
        UserError: It holds something else, a damaged store, or cannot be written.
    """
    if (folder / INDEX).exists():
        open_statistics(folder)
        return
    check_folder(folder, INDEX, "a statistics store", replace=True)
    check_writable(folder)


def open_statistics(folder: Path) -> Statistics:
    """Open a store; the sites are read when they are asked for.

    Raises:
        UserError: The folder holds no store, or a damaged one.
    """
    folder = Path(folder)
    what = "a statistics store"
    content = read_json(folder / INDEX, what)
    try:
        if content["format"] not in READABLE:
            raise UserError(
                f"{folder} was written in format {brief(content['format'])}, this version reads "
                f"{' and '.join(map(str, READABLE))}; delete the folder and calibrate again"
            )
        statistics = Statistics(
            dict(content["fingerprint"]),
            folder=folder,
            # stores of earlier versions tell only how many
            prompts=[n for a, b in content.get("prompts", [(0, int(content["prompts_done"]))]) for n in range(a, b)],
            time_s=dict(content["time_s"]),
            index=dict(content["sites"]),
            observer=content.get("observer", "gram"),  # stores of earlier versions hold that
        )
        if statistics.observer not in OBSERVERS:
            raise UserError(
                f"{folder} holds {brief(statistics.observer)}, which this version does not know; calibrate again"
            )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / INDEX} is not {what}: {brief(error)}; delete the folder and calibrate again"
        ) from None
    return statistics


def _read_site(store: Statistics, name: str, device: torch.device | str) -> Observer:
    folder, entry = store.folder, store.index[name]
    assert folder is not None
    damaged = f"the statistics of site {brief(name)} are missing or damaged; delete {folder} and calibrate again"
    try:
        if not re.fullmatch(r"sites/[0-9]+\.safetensors", entry["file"]):
            raise UserError(damaged)
        path = folder / entry["file"]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise UserError(damaged)
        numbers = float(entry["weight_sum"]), int(entry["num_tokens"])
        kind = OBSERVERS[entry.get("observer", store.observer)]
        return kind.of_tensors(load_file(path), *numbers).to(device)
    except (OSError, SafetensorError, *MALFORMED) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(damaged) from error


def _spans(numbers: Sequence[int]) -> list[list[int]]:
    """Rising numbers as spans, each the first one and the one after the last."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] += 1
        else:
            spans.append([number, number + 1])
    return spans


def _short(value: object) -> str:
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) == 66 and text[1:-1].isalnum():
        return text[1:9]  # the beginning of a hash
    return text if len(text) <= 40 else text[:18] + "…" + text[-18:]
