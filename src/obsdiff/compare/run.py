"""One part of a comparison: prune, recover, draw and measure, cell after cell, each kept as soon as it is finished."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from obsdiff.allocation.planning import depth_of, needs_for, packages_for, pattern_of, rule_of, solve_options
from obsdiff.allocation.stage import Folders, calibration_prompts, prune_stage, weighting_of
from obsdiff.compare.cells import ONE_SHOT, Unit, key_of, read_recipe
from obsdiff.compare.options import CompareOptions
from obsdiff.costs import calibration_cost
from obsdiff.errors import UserError
from obsdiff.evaluation.evaluate import Images, evaluation_of, result_of
from obsdiff.evaluation.flops import denoiser_flops
from obsdiff.evaluation.prompts import evaluation_prompts
from obsdiff.evaluation.references import References, sample_shared
from obsdiff.evaluation.sampling import save_images
from obsdiff.evaluation.suite import Suite, load_suite
from obsdiff.export.places import finite, pipeline_bytes
from obsdiff.files import read_json, remove_leftovers, whole_file, working_folder, write_json
from obsdiff.memory import peak_memory_bytes
from obsdiff.models.content import component_hashes
from obsdiff.models.info import call_arguments, info_of
from obsdiff.models.subject import subject_of
from obsdiff.obs.observers import PASSES
from obsdiff.obs.pattern import of_layers
from obsdiff.obs.select import count_nonzero
from obsdiff.pruning.folder import load_pipeline, write_pipeline
from obsdiff.pruning.manifest import FILE
from obsdiff.pruning.masks import weight_masks
from obsdiff.pruning.options import EvaluationOptions
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.scratch import draw_weights
from obsdiff.pruning.statistics import open_statistics
from obsdiff.versions import versions

CELLS, SHARED = "cells", "shared"
OWN_PASSES = ("gradients", "gates")  # of a fingerprint: what a method measures beside layer inputs, or in their place
Fit = Callable[[list[str]], None]


@dataclass(frozen=True)
class Dense:
    """What all cells start from.

    Attributes:
        pipeline: Its name.
        device: Where to work.
        shared: Folder of images, calibrations, scans and recordings that several cells use.
        evaluation: What is measured.
    """

    pipeline: str
    device: str
    shared: Path
    evaluation: EvaluationOptions

    def load(self) -> Any:
        """The dense pipeline, anew, to be pruned."""
        return load_pipeline(self.pipeline, device=self.device)

    @cached_property
    def pipe(self) -> Any:
        """The dense pipeline, which nothing changes."""
        return self.load()

    @cached_property
    def content(self) -> dict[str, str]:
        """Hashes of its components."""
        return component_hashes(self.pipe)

    @cached_property
    def suite(self) -> Suite:
        """The measures of every cell."""
        return load_suite(info_of(self.pipe).alignment, self.evaluation, self.device)

    def references(self, unit: Unit) -> References:
        """The dense images of a unit's prompts and seeds, drawn once."""
        pipe = self.pipe
        prompts = evaluation_prompts(pipe, unit.evaluation, unit.pruning.calibration)
        seeds = list(range(unit.evaluation.seed, unit.evaluation.seed + len(prompts)))
        key = digest([self.content, prompts, seeds, call_arguments(pipe)])
        file = self.shared / f"dense-{key[:16]}.safetensors"
        images = read_tensor(file)
        if images is None:
            images = sample_shared(pipe, prompts, seeds, unit.evaluation.batch_size)
            with whole_file(file) as temporary:
                save_file({"images": images.contiguous()}, temporary)
        return References(prompts, seeds, (drawn := Images(images, images[:0])), drawn, info_of(pipe).alignment)


def run_part(
    options: CompareOptions, units: Sequence[Unit], device: str, part: str | None, fit: Fit, say: Callable[[str], None]
) -> int:
    """Run what is not finished yet.

    Args:
        options: Of the comparison.
        units: What this part prunes.
        device: Where.
        part: Its name, since parts share no folder that two could write at once.
        fit: Runs ``obsdiff train fit`` with arguments.
        say: Told of each finished cell.

    Returns:
        How many rows failed.
    """
    output = Path(options.output)
    dense = Dense(options.pipeline, device, output / SHARED / (part or "0/1").replace("/", "-of-"), options.evaluation)
    failed = 0
    for at, unit in enumerate(units):
        wanted = rows_of(options, unit, dense)
        missing = {name: file for name, file in wanted.items() if not finished(file)}
        for file in wanted.values():  # killed after its last row was written, before it was tidied up
            remove_leftovers(file.with_suffix(""))
        if not missing:
            continue
        dense.suite.start()  # loads it: what cannot be measured is said before anything is pruned
        for name, row in _run(options, unit, dense, missing, fit):
            failed += row["error"] is not None
            say(f"[{at + 1}/{len(units)}] {unit}, {name}: {told(row)}")
    return failed


def rows_of(options: CompareOptions, unit: Unit, dense: Dense) -> dict[str, Path]:
    """The file of each row of a unit, by the name of its recovery."""
    pipe = dense.pipe
    content = {
        "pipeline": dense.content,
        "obsdiff": versions()["obsdiff"],
        "calibration": digest(calibration_prompts(pipe, unit.pruning)),
        "evaluation": digest(evaluation_prompts(pipe, unit.evaluation, unit.pruning.calibration)),
    }
    folder = Path(options.output) / CELLS
    recipes = {ONE_SHOT: None, **options.recipes}
    return {name: folder / f"{key_of(unit, recipe, options.budget, content)}.json" for name, recipe in recipes.items()}


def collect(options: CompareOptions, units: Sequence[Unit], dense: Dense) -> tuple[list[dict[str, Any]], int]:
    """The rows that are there, in order, and how many are not."""
    rows, missing = [], 0
    for unit in units:
        # what they are called now: a row is kept by what was done, whatever it was called then
        called = {"method": unit.method, "pattern": unit.pattern, "allocation": unit.allocation, "seed": unit.seed}
        called["variant"] = unit.variant
        for name, file in rows_of(options, unit, dense).items():
            if file.is_file():
                rows.append({**read_json(file, "a row of a comparison"), **called, "recipe": name})
            else:
                missing += 1
    return rows, missing


def finished(file: Path) -> bool:
    """Whether a row is there, and did not fail."""
    return file.is_file() and read_json(file, "a row of a comparison")["error"] is None


def _run(
    options: CompareOptions, unit: Unit, dense: Dense, missing: Mapping[str, Path], fit: Fit
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a unit as they are finished; what was pruned is only kept until then."""
    folder = Path(options.output) / CELLS
    with working_folder(folder / next(iter(missing.values())).stem) as work:
        given: dict[str, Any] = {"pipeline": options.pipeline, "versions": versions(), "device": dense.device}
        refs, start, failure = None, {}, None
        try:
            refs = dense.references(unit)
            start = _pruned(unit, dense, work / "pruned")
        except Exception as error:  # a row that fails is a row: the others go on
            failure = explained(error)
        for name, file in missing.items():
            row = given | {
                "method": unit.method,
                "pattern": unit.pattern,
                "allocation": unit.allocation,
                "variant": unit.variant,
                "seed": unit.seed,
                "recipe": name,
                "error": failure,
                **start,
            }
            if failure is None and refs is not None:
                try:
                    recipe = options.recipes.get(name)
                    if recipe is not None:
                        row |= _recovered(options, unit, dense, work, name, fit)
                    row |= _measured(dense, work / row.pop("folder", "pruned"), unit, refs)
                    row["images"] = _draw(file.with_suffix(""), row["images"][: options.shown])
                    row["dense_images"] = _draw(
                        file.with_name(f"dense-{digest([dense.content, refs.prompts, refs.seeds])[:16]}"),
                        refs.dense.guided[: options.shown],
                    )
                    row["prompts"] = refs.prompts[: options.shown]
                except Exception as error:
                    row["error"] = explained(error)
            write_json(file, finite(row))
            yield name, row


def _pruned(unit: Unit, dense: Dense, folder: Path) -> dict[str, Any]:
    """Prune, write the pipeline to ``folder``, and say what was done and what it cost."""
    pipe, options = dense.load(), unit.pruning
    subject = subject_of(pipe)
    flops = denoiser_flops(subject, call_arguments(pipe))
    dense_bytes = pipeline_bytes(pipe)
    prompts = calibration_prompts(pipe, options)
    store, scan = _kept(unit, dense, prompts)
    report = prune_stage(subject, options, prompts, Folders(store, scan, calls=folder.parent))
    if store is not None and not needs_for(options, None) - PASSES:
        _leave_out_calibration(report, store)
    if unit.scratch:
        draw_weights(subject.denoiser, weight_masks(report.masks, report.shrunk is not None), unit.seed)
    folder.mkdir()
    write_pipeline(pipe, folder, report)
    costs = calibration_cost(read_json(folder / FILE, "a manifest"), flops, 1)
    return {
        "sparsity": report.sparsity,
        "parameters": report.parameters,
        "bytes": {"dense": dense_bytes, "pruned": pipeline_bytes(pipe)},
        "flops": {"dense": flops, "pruned": denoiser_flops(subject, call_arguments(pipe))},
        "layer_error": None if unit.scratch else report.mean_layer_error,
        "notes": report.notes,
        "costs": {name: cost.to_json() for name, cost in costs.items()},
    }


def _leave_out_calibration(report: PruneReport, store: Path) -> None:
    """Let a report cost what its method needs: the layer inputs in ``store`` told it how well it did, and no more."""
    assert report.fingerprint is not None
    report.time_s["calibrate"] -= open_statistics(store).time_s["calibrate"]
    passes = {name: {**report.fingerprint[name], "inputs": False} for name in OWN_PASSES if name in report.fingerprint}
    report.fingerprint = {**report.fingerprint, **passes} if passes else None


def _kept(unit: Unit, dense: Dense, prompts: Sequence[str]) -> tuple[Path | None, Path | None]:
    """Where calibration and scan of a unit are kept for others that ask for the same; None where nothing is kept."""
    options = unit.pruning
    # what is measured of a shorter model is no other's
    calibration = asdict(options.calibration)
    if calibration["precision"] in (None, "float32"):  # as before there was a choice
        del calibration["precision"]
    del calibration["calls_on_disk"]  # a streamed one is not kept
    measured = [dense.content, prompts, calibration, options.seed, str(depth_of(options))]
    measured.append(weighting_of(options, None))
    # no store holds what was measured with earlier layers pruned; all others tell each method its layer errors
    anew = packages_for(options, None) > 1 or options.calibration.streamed
    alone = of_layers(pattern_of(options)) is None  # stages alone go by no layer
    store = None if anew or alone else dense.shared / f"statistics-{digest(measured)[:16]}"
    if rule_of(options) != "measured":
        return store, None
    n_of_m, ratio = r"^\d+:(?=\d+$)", r":\d+\.?\d*"
    kind = re.sub(ratio, "", re.sub(n_of_m, "N of ", options.pattern))
    solved = [asdict(solve_options(options)), options.include, options.exclude, options.spare_blocks]
    scanned = [measured, solved, kind, asdict(options.scan), asdict(options.limits)]
    return store, dense.shared / f"scan-{digest(scanned)[:16]}"


def _recovered(options: CompareOptions, unit: Unit, dense: Dense, work: Path, name: str, fit: Fit) -> dict[str, Any]:
    """Train from the pruned pipeline as the recipe says, and say what it cost."""
    recipe, output = options.recipes[name], work / f"recipe-{list(options.recipes).index(name)}"
    arguments = fit_arguments(options, unit, dense, recipe, work / "pruned", output)
    output.mkdir()
    said = output.with_suffix(".log")
    try:
        with said.open("w") as log, redirect_stdout(log), redirect_stderr(log):
            fit(arguments)
    except SystemExit as stop:  # how parsers refuse, with 2, and how Lightning ends where it is interrupted
        if stop.code != 2:
            raise
        last = said.read_text().strip().splitlines()[-1:]
        raise UserError(f"recipe {recipe} was refused: {' '.join(last) or stop}") from stop
    report = read_json(output / "recovered" / "report.json", "a report")
    return {"costs": report["budget"]["used"], "recovery": report["recovery"], "folder": output.name + "/recovered"}


def fit_arguments(
    options: CompareOptions, unit: Unit, dense: Dense, recipe: str, pruned: Path, output: Path
) -> list[str]:
    """The arguments of ``obsdiff train`` for a cell."""
    data = read_recipe(recipe)["data"]
    module, _, kind = str(data.get("class_path")).rpartition(".")
    accepted = inspect.signature(getattr(import_module(module), kind)).parameters
    own = {
        "pipeline": options.pipeline,
        "folder": str(dense.shared / f"recording-{digest([dense.content, data, unit.seed])[:16]}"),
        "seed": unit.seed,
    }
    device = dense.device.partition(":")
    values = {
        "seed_everything": unit.seed,
        "trainer.accelerator": {"cuda": "gpu"}.get(device[0], device[0]),
        "trainer.devices": f"[{device[2]}]" if device[2] else 1,
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
        "model.pipeline": pruned,
        "model.pruning": "null",
        "model.output": output,
        "model.seed": unit.seed,
        "model.evaluation.num_images": 0,
        **{f"data.{name}": value for name, value in own.items() if name in accepted},
        **{f"budget.{name}": f"{limit:.15g}" for name, limit in options.budget.items()},
    }
    return ["fit", "--config", recipe, *(f"--{name}={value}" for name, value in values.items())]


@torch.no_grad()
def _measured(dense: Dense, folder: Path, unit: Unit, refs: References) -> dict[str, Any]:
    """What the pipeline in ``folder`` draws, and how good that is."""
    pipe = load_pipeline(folder, device=dense.device)
    started = time.perf_counter()
    images = sample_shared(pipe, refs.prompts, refs.seeds, unit.evaluation.batch_size, allow_nonfinite=True)
    drawn = Images(images, images[:0])
    weights = list(subject_of(pipe).denoiser.parameters())
    result = "pruned" if folder.name == "pruned" else "recovered"
    evaluation = evaluation_of(dense.suite, refs.prompts, refs.seeds, {"dense": refs.dense, result: drawn})
    return {
        "evaluation": evaluation,
        "per_image": {name: values.tolist() for name, values in dense.suite.values().items()},
        "nonzero": sum(map(count_nonzero, weights)),
        "sampling_s": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(pipe.device),
        "images": images,
    }


def _draw(folder: Path, images: Tensor) -> list[str]:
    """Keep some images; their names."""
    files = [folder / f"{at}.png" for at in range(len(images))]
    save_images(images.nan_to_num().clamp(0, 1), files)
    return [str(file.relative_to(folder.parent)) for file in files]


def explained(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def told(row: Mapping[str, Any]) -> str:
    """For people: how a row ended."""
    if row["error"] is not None:
        return f"failed: {row['error']}"
    figures = result_of(row["evaluation"])
    mse, hits = figures.get("mse"), figures.get("alignment")
    shown = "images are not finite" if mse is None else f"MSE {mse:.3g}"
    return shown + ("" if hits is None else f", alignment {hits:.1%}")


def digest(value: Any) -> str:
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def read_tensor(file: Path) -> Tensor | None:
    """The images of a file, None if it is not there."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as content:
        return content.get_tensor("images")
