"""LoRA files made for a dense model, on what pruning left of it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from obsdiff.errors import UserError
from obsdiff.files import check_writable, whole_file
from obsdiff.models.denoisers import shrunk_of
from obsdiff.models.graph import COLUMNS, ROWS, Graph
from obsdiff.models.info import info_of
from obsdiff.models.subject import Subject, subject_of
from obsdiff.paths import user_path
from obsdiff.pruning.folder import MASKS, run_folder
from obsdiff.pruning.masks import load_masks

# the smaller factor is called so by peft, by older diffusers and by kohya's scripts; the larger one comes second
_FACTOR = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<peft>[AB])|lora[._](?P<old>down|up))(?:\.\w+)?\.weight")


@dataclass
class LoraReport:
    """What became of a LoRA.

    Attributes:
        kept: By layer of the denoiser, the share of the squared Frobenius norm of its update ΔW = B A that has a place
            in the pruned layer.
        dropped: Layers that are not there any more.
        elsewhere: Updated layers of text encoders, which pruning leaves alone.
        share: Of the squared norms of all updates of the denoiser together, what is kept, in [0, 1].
    """

    kept: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    elsewhere: int = 0
    share: float = 1.0

    def __str__(self) -> str:
        text = f"{len(self.kept)} layers take {self.share:.1%} of the LoRA's squared norm"
        if self.dropped:
            text += f"; {len(self.dropped)}, such as {self.dropped[0]}, are not there any more"
        return text


def load_lora(
    pipe: Any,
    lora: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str | None = None,
    masks: Mapping[str, Tensor] | None = None,
    depth: Mapping[str, Any] | None = None,
    rebased: str | Path | None = None,
) -> LoraReport:
    """Load a LoRA that was trained on the dense model into a pruned pipeline, as ``pipe.load_lora_weights`` would.

    Heads, neurons and channels that are gone lose their rows of B and columns of A, so that the update of what stays is
    that of the dense model. Layers on a reduced rank take it whole: the update reads the vector before it is projected,
    ``y = (W D)(E x) + b' + B A x``. Masked layers (unstructured, N:M) take it whole too; their zeros stay zero in the
    base. Afterwards ``set_adapters``, ``unload_lora_weights`` and the like work as ever; ``fuse_lora`` does on all but
    layers on a reduced rank.

    Args:
        pipe: A pruned pipeline that :func:`obsdiff.load_pipeline` loaded, or that ``obsdiff.prune`` pruned (then give
            ``masks``).
        lora: A safetensors file, a folder or hub id as diffusers takes it, or a state dict; in any form that the
            pipeline's class reads.
        adapter_name: As in diffusers.
        masks: ``report.masks`` of a prune in this process.
        depth: ``report.depth`` of one that removed stages, for a pipeline that does not know it (its denoiser was
            loaded alone, say): the blocks that moved up take what was made for them.
        rebased: A new ``.safetensors`` file to write the LoRA to as it was loaded; plain diffusers loads that one into
            the saved pipeline.

    Returns:
        What was kept, by layer, and what was not.

    Raises:
        UserError: The LoRA is of another architecture, would bind nothing, or cannot be read.
    """
    subject = subject_of(pipe)
    target = None if rebased is None else _new_file(rebased)
    state = read_lora(pipe, lora)
    kept = masks if masks is not None else _masks_of(subject)
    state, report = rebase_lora(subject, state, kept, info_of(pipe).blocks or (depth or {}).get("kept", {}))
    pipe.load_lora_weights(dict(state), adapter_name=adapter_name)
    if target is not None:
        with whole_file(target) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
    return report


def read_lora(pipe: Any, lora: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA as diffusers reads it for this pipeline, its scales (alpha over rank) in B.

    Raises:
        UserError: The pipeline's class takes no LoRA, or cannot read this one.
    """
    reads = getattr(type(pipe), "lora_state_dict", None)
    if reads is None:
        raise UserError(f"{type(pipe).__name__} takes no LoRA")
    given: Any = dict(lora) if isinstance(lora, Mapping) else str(lora)
    if isinstance(given, str) and (given.endswith(".safetensors") or given.startswith((".", "/", "~"))):
        path = user_path(given, "the LoRA")
        if not path.exists():
            raise UserError(f"{path} not found; give a LoRA's .safetensors file, a folder, or a hub id")
        given = str(path)
    elif isinstance(given, str) and Path(given).exists():
        given = str(Path(given).absolute())
    asked = {"use_safetensors": True, "return_lora_metadata": True}
    if "return_alphas" in inspect.signature(reads).parameters:  # Flux leaves them out otherwise
        asked["return_alphas"] = True
    try:
        found = reads(given, **asked)
        state, *alphas, metadata = found if isinstance(found, tuple) else (found, None)
        return _scaled(state, (alphas[0] if alphas else None) or {}, dict(metadata or {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        source = given if isinstance(lora, str | Path) else "the state dict"
        raise UserError(f"cannot read a LoRA from {source}: {' '.join(str(error).split())[:300]}") from error


def _scaled(state: Mapping[str, Tensor], alphas: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """The LoRA with its scales in B and its bias: alpha / r, or alpha / sqrt(r) of a rank-stabilized one
    (Kalajdzievski 2023, arXiv:2312.03732).

    Args:
        state: The factors.
        alphas: By layer with ".alpha" added (or by name of a text encoder's smaller factor), as diffusers gives them.
        metadata: peft's ``LoraConfig`` by "component.key", as diffusers writes it beside the factors.
    """
    from peft.utils.other import get_pattern_key

    numbers = {name.removesuffix(".alpha"): float(alpha) for name, alpha in alphas.items()}
    scaled = dict(state)
    for name, tensor in state.items():
        match = _FACTOR.fullmatch(name)
        layer = name.replace(".up.", ".down.") if match is None else match["layer"]
        if not (name.endswith(".up.weight") if match is None else _is_up(match)):
            continue
        component, _, own = layer.partition(".")
        alpha, rank = numbers.get(layer), float(tensor.shape[1])
        if alpha is None and f"{component}.lora_alpha" in metadata:
            patterns = metadata.get(f"{component}.alpha_pattern") or {}
            alpha = float(patterns.get(get_pattern_key(patterns, own), metadata[f"{component}.lora_alpha"]))
            rank = math.sqrt(rank) if metadata.get(f"{component}.use_rslora") else rank
        if alpha is not None:
            for part in (name, f"{name.removesuffix('weight')}bias"):
                if part in state:
                    scaled[part] = state[part] * (alpha / rank)
    return scaled


def rebase_lora(
    subject: Subject,
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    stages: Mapping[str, Sequence[int]] | None = None,
) -> tuple[dict[str, Tensor], LoraReport]:
    """The LoRA with the rows and columns that the pruned denoiser has, and what became of it.

    Args:
        subject: The pruned pipeline.
        state: As :func:`read_lora` gives it.
        kept: Which units of each group stayed, bool (count,) by group; masks of layers are left alone.
        stages: By list, the numbers that its blocks had in the dense model, where some are gone.

    Raises:
        UserError: A layer has another size than the dense model's, no layer is there, or blocks may have moved up and
            it is not known which.
    """
    graph, several = subject.graph, len(subject.components) > 1  # of two denoisers, names begin with the component
    prefixes = {f"{component}.": f"{component}." if several else "" for component in subject.components}
    entries = kept_entries(graph, kept)
    modules = dict(graph.denoiser.named_modules())
    factors: dict[str, dict[bool, tuple[str, Tensor]]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _FACTOR.fullmatch(name)
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if match is not None and prefix is not None:
            layer = prefixes[prefix] + match["layer"].removeprefix(prefix)
            factors.setdefault(layer, {})[_is_up(match)] = name, tensor
        else:
            rest[name] = tensor
    _check_blocks(subject, stages or {}, factors)
    report = LoraReport(elsewhere=sum(_FACTOR.fullmatch(name) is not None for name in rest) // 2)
    made = {name: tensor for name, tensor in rest.items() if not name.startswith(tuple(prefixes))}
    before = after = 0.0
    for layer, pair in factors.items():
        if len(pair) < 2:
            raise UserError(f"the LoRA has one factor only of {layer}; it is damaged")
        (down_name, down), (up_name, up) = pair[False], pair[True]
        whole = _squared_norm(down, up)
        before += whole
        own = _place(layer, stages or {})
        if not own or own not in modules:
            report.dropped.append(layer)
            continue
        rows, columns = entries.get((own, ROWS)), entries.get((own, COLUMNS))
        _check_sizes(modules[own], layer, (down, up), (rows, columns))
        if columns is not None:
            down = down[:, columns.stays]
        if rows is not None:
            up = up[rows.stays]
        made |= {name.replace(layer, own, 1): factor for name, factor in ((down_name, down), (up_name, up))}
        for name, tensor in rest.items():  # what belongs to rows: biases and the magnitudes of DoRA
            if name.startswith(up_name[: up_name.rindex(".lora") + 5]):
                made[name.replace(layer, own, 1)] = tensor if rows is None else tensor[rows.stays]
        here = _squared_norm(down, up)
        after += here
        report.kept[own] = here / whole if whole else 1.0
    if not report.kept and not report.elsewhere:
        named = f", such as {report.dropped[0]}" if report.dropped else ""
        raise UserError(f"the LoRA would change nothing: the denoiser has none of its {len(factors)} layers{named}")
    report.share = after / before if before else 1.0
    return made, report


def _check_blocks(subject: Subject, stages: Mapping[str, Sequence[int]], layers: Iterable[str]) -> None:
    """Refuse where blocks may have moved and nobody knows how."""
    named = list(layers)
    loaded = any(getattr(model, "config", {}).get("_name_or_path") for model in subject.components.values())
    for stack in dict.fromkeys(stage.rpartition(".")[0] for stage in subject.graph.stages):
        count = len(list(subject.denoiser.get_submodule(stack).children()))
        if stack in stages:
            if len(stages[stack]) != count:
                raise UserError(
                    f"the pipeline is said to keep {len(stages[stack])} blocks of {stack}, and it has {count}; load it "
                    "again with obsdiff.load_pipeline, or give depth=report.depth of the prune that it came out of"
                )
            continue
        numbers = (
            layer.removeprefix(f"{stack}.").partition(".")[0] for layer in named if layer.startswith(f"{stack}.")
        )
        most = max((int(number) for number in numbers if number.isdecimal()), default=-1)
        if loaded and most >= count:
            raise UserError(
                f"the LoRA changes {stack}.{most}, and this pipeline has {count} of them: if stages were removed, load "
                "the prune run's folder with obsdiff.load_pipeline or give depth=report.depth; else it is of another "
                "model"
            )


def _place(layer: str, stages: Mapping[str, Sequence[int]]) -> str:
    """What a layer of the dense model is called now; "" if its block is gone."""
    for stack, numbers in stages.items():
        if layer.startswith(f"{stack}."):
            block, _, rest = layer.removeprefix(f"{stack}.").partition(".")
            return f"{stack}.{numbers.index(int(block))}.{rest}" if int(block) in numbers else ""
    return layer


@dataclass(frozen=True)
class Entries:
    """Which entries of an axis of the dense layer stayed.

    Attributes:
        stays: Their indices, int64.
        count: How many there were.
    """

    stays: Tensor
    count: int


def kept_entries(graph: Graph, kept: Mapping[str, Tensor]) -> dict[tuple[str, int], Entries]:
    """By layer and axis that lost something, which entries of the dense layer stayed.

    Args:
        graph: Of the pruned denoiser.
        kept: Bool (count,) by group.
    """
    slabs: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}
    for name, chosen in kept.items():
        group = graph.group_of.get(name)
        if group is None or group.basis is not None or bool(chosen.all()):
            continue
        for axis, all_slices in ((ROWS, group.producers), (COLUMNS, group.consumers)):
            for s in all_slices:
                found = [(start, s.size * group.count, chosen.cpu().repeat_interleave(s.size)) for start in s.starts]
                slabs.setdefault((s.layer, axis), []).extend(found)
    entries = {}
    for (layer, axis), found in slabs.items():
        stays, here, there = [], 0, 0  # positions in the pruned and in the dense layer
        for start, width, channels in sorted(found, key=lambda slab: slab[0]):
            stays.append(torch.arange(there, there + start - here))
            there += start - here
            stays.append(channels.nonzero().flatten() + there)
            here, there = start + width, there + len(channels)
        rest = graph.weight(layer).shape[axis] - here
        stays.append(torch.arange(there, there + rest))
        entries[layer, axis] = Entries(torch.cat(stays), there + rest)
    return entries


def _check_sizes(
    module: Any, layer: str, factors: tuple[Tensor, Tensor], entries: tuple[Entries | None, Entries | None]
) -> None:
    down, up = factors
    rows, columns = entries
    weight = module.weight
    read = module.projection[0].weight.shape[1] if hasattr(module, "projection") else weight.shape[1]
    wanted = (weight.shape[0] if rows is None else rows.count, read if columns is None else columns.count)
    found = (up.shape[0], down.shape[1])
    if wanted != found:
        raise UserError(
            f"the LoRA changes {layer} with {found[0]} rows and {found[1]} columns, and that of the dense model has "
            f"{wanted[0]} and {wanted[1]}; it belongs to another model, or to this one after pruning"
        )


def _squared_norm(down: Tensor, up: Tensor) -> float:
    """‖B A‖² = tr(BᵀB AAᵀ), without making B A."""
    a, b = down.double().flatten(1), up.double().flatten(1)
    return float(((b.T @ b) * (a @ a.T)).sum())


def _is_up(match: re.Match[str]) -> bool:
    return match["peft"] == "B" or match["old"] == "up"


def _masks_of(subject: Subject) -> dict[str, Tensor]:
    """The units that stayed, from the run that a shrunk pipeline was loaded from."""
    if all(shrunk_of(model) is None for model in subject.components.values()):
        return {}
    folder = run_folder(info_of(subject.pipe).source)
    if folder is None:
        raise UserError(
            f"{info_of(subject.pipe).source} does not say which heads and neurons stayed; load the prune run's folder "
            "with obsdiff.load_pipeline, or give masks=report.masks"
        )
    return load_masks(folder / MASKS)


def _new_file(path: str | Path) -> Path:
    target = user_path(path, "rebased")
    if target.suffix != ".safetensors":
        raise UserError(f"rebased is {target}; it must end in .safetensors")
    if target.exists():
        raise UserError(f"{target} exists; choose another file for the rebased LoRA")
    check_writable(target.parent)
    return target
