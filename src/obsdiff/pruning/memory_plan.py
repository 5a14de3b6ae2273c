"""What a prune needs of memory, from shapes alone: each formula says what it counts.

Nothing here looks at values or runs anything. Activations come as they were counted on the meta device
(:mod:`obsdiff.evaluation.call_memory`); all the rest is arithmetic on the shapes of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from obsdiff.criteria import METHODS
from obsdiff.obs.linalg import BLOCKED, LAUNCHED
from obsdiff.obs.observers import PASSES, sums_held
from obsdiff.peaks import Moment, Peaks
from obsdiff.pruning.memory_shapes import Batches, Scan, Shapes, SiteShape, Solving

FLOAT, BOOL = 4, 1  # bytes of statistics and solves, and of an entry of a mask as it is solved
SWEEPS = ("obs", "obs-diff", "sparsegpt")  # methods that factorise H and go through its columns
SCORED = {"wanda": 7.0, "dsnot": 11.5}  # times a layer's weights that scoring and sorting them by rows takes
BLOCK = 128  # columns that a sweep holds three more copies of
ENCODED = 32  # prompts that text encoders get at once
COPIES = 2  # of all images, while those of the batches are joined


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Peaks):
    """What a prune will need.

    Attributes:
        batches: As chosen.
        store_bytes: Of a statistics folder; 0 without.
        kept_bytes: Of kept solves and what they replace, until the output is written (:func:`meanwhile_bytes`), of all
            processes; 0 if none are kept.
        resting_bytes: Of weights that rest on the disk, pruned ones beside dense ones, of all processes; 0 if none do.
        output_bytes: Of the folder that is written.
    """

    batches: Batches
    store_bytes: int
    kept_bytes: int
    resting_bytes: int
    output_bytes: int


# ---- formulas


def statistics_bytes(site: SiteShape, solving: Solving) -> int:
    """What is kept of a site: sums of products (or squares) in float32 and means in float64, for each group."""
    return site.groups * (FLOAT * sums(site, solving) + 8 * site.columns)


def sums(site: SiteShape, solving: Solving) -> int:
    """How many are kept of a group: the strips of the upper triangle, or n squares."""
    return sums_held("gram" if solving.gram else "diagonal", site.columns, device_type=solving.device_type)


def moments_bytes(site: SiteShape, solving: Solving) -> int:
    """What solving makes of a site's statistics: the covariance, in place of its strips where they are let go
    (``once``), and H beside it where the method selects by it or no bias takes up the mean; for one group at a time."""
    square = FLOAT * site.columns**2
    let_go = solving.once and not solving.stored and site.groups == 1
    covariance = square - (FLOAT * sums(site, solving) if let_go else 0)
    selects = bool(METHODS[solving.method].needs - PASSES) and not (solving.centred and site.biased)
    return covariance + (square if selects or (solving.refits and not site.biased) else 0)


def solve_bytes(site: SiteShape, solving: Solving, element: int = FLOAT, levels: int = 1) -> int:
    """The workspace of solving a site's single weights, its results included, beyond its statistics.

    With n columns, R rows of all layers, r of the largest, all of it float32 and for one group: the Cholesky factor and
    three of the blocks that it is made by; of the sweep the factor, the weights, their changes, pivots and results
    (n² + 3.5 R n) and three blocks of 128 columns; of admm the spectrum with LAPACK's workspace (5 n²); of the refit
    the solutions, and five matrices like the largest layer; of methods that sort rows, sorted indices. Results (weight
    and mask) are 1.25 R n, twice where groups are joined. Weights in half precision are held in float32, too.

    Args:
        site: What is solved.
        solving: How.
        element: Bytes of one weight in the model.
        levels: Patterns at once, as a scan solves them: the layers count so many times.
    """
    n, total = site.columns, levels * sum(site.rows)
    largest = max(site.rows, default=0)
    dense = 0 if element == FLOAT else total * n
    gram = solving.measured and solving.gram
    work = [(1.25 if site.groups == 1 else 2.5) * total * n]
    if solving.method in SWEEPS:
        by = LAUNCHED if solving.device_type == "cuda" else BLOCKED
        work += [n * n + 3 * min(by, n) * n, n * n + 3.5 * total * n + 3 * min(BLOCK, n) * total]
    elif solving.method == "admm":
        work += [5 * n * n, n * n + 7.25 * largest * n + 1.25 * total * n]
    else:
        work += [SCORED.get(solving.method, 1.0) * largest * n + 0.25 * total * n]
    if solving.refits and gram:
        work += [2.25 * total * n + 5 * largest * n]
    square = moments_bytes(site, solving) if gram else 0
    return square + int(FLOAT * (dense + max(work)))


def cut_bytes(sites: Sequence[SiteShape], solving: Solving) -> int:
    """The workspace of choosing units and solving for what stays, for layers that are cut together.

    With n inputs and r rows: the Hessian, its inverse and what the inverse without some columns is made of (6 n²), the
    weights and their compensated copies (3 r n); of every further layer an inverse and a copy. Without statistics,
    copies of the weights alone.
    """
    if not (solving.measured and solving.gram):
        return FLOAT * sum(3 * site.weights for site in sites)
    by_site = [FLOAT * (6 * s.columns**2 + 3 * s.weights) + moments_bytes(s, solving) for s in sites]
    more = [FLOAT * (s.columns**2 + s.weights) + moments_bytes(s, solving) for s in sites]
    return max((own + sum(more) - again for own, again in zip(by_site, more, strict=True)), default=0)


def changed_bytes(site: SiteShape, element: int) -> tuple[int, int]:
    """What a solved site leaves until the prune ends, on the device and on the host: its new weights, beside the dense
    ones that are put back if anything fails, and masks of one bit an entry (unless these two wait on a disk)."""
    stays = int(site.kept * site.weights)
    return (stays + site.producers) * element, -(-stays // 8) if site.masked else 0


def meanwhile_bytes(weights: int, element: int, keeps: bool, resting: bool, processes: int = 1) -> tuple[int, int]:
    """What a prune has on the disk before its output, of all processes.

    Args:
        weights: Entries that are pruned.
        element: Bytes of one.
        keeps: Whether solves are kept: of each weight the result (float32, and a byte of its mask), once, and in a file
            of each process the mask's bit that the report reads and, unless it rests there, the dense one.
        resting: Whether weights rest on that disk.
        processes: That prune together.

    Returns:
        What goes with the solves; and the new weights beside the dense ones that rest there, in a file of each process.
    """
    replaced = 0 if resting else weights * element
    kept = weights * (FLOAT + BOOL) + processes * (-(-weights // 8) + replaced)
    return kept if keeps else 0, processes * weights * element if resting else 0


def _keeps(solving: Solving, batches: Batches) -> bool:
    """Whether solves are kept as they are finished: of statistics that are there, or streamed."""
    return solving.stored or bool(batches.recorded)


def scan_bytes(scan: Scan, shapes: Shapes, solving: Solving) -> int:
    """What a scan that runs the denoiser holds beside weights and statistics: every level of the layers of one stage
    (float32 weights and masks), or those that one backward pass serves; the recorded calls; and the larger of solving
    a site at all levels and a call, which a backward pass keeps whole."""
    held = scan.levels * max(scan.stages, default=0) * (FLOAT + (0 if scan.cut else BOOL))
    if scan.cut:
        work = max((cut_bytes([s], solving) for s in shapes.sites if s.rows), default=0)
    else:
        work = max((solve_bytes(s, solving, shapes.element, scan.levels) for s in shapes.sites if s.rows), default=0)
    calling = scan.rows * (shapes.made if scan.backward else shapes.call)
    return max(held, scan.backward) + scan.probe + max(work, calling)


# ---- the run, moment by moment


def memory_plan(
    shapes: Shapes,
    solving: Solving,
    batches: Batches,
    *,
    prompts: int,
    images: int,
    on_host: bool,
    scan: Scan | None = None,
    processes: int = 1,
) -> MemoryPlan:
    """What a prune needs at each of its moments.

    Args:
        shapes: What is pruned.
        solving: How.
        batches: What was chosen.
        prompts: Of the calibration.
        images: Of the evaluation, by each of two pipelines.
        on_host: Whether it runs on the CPU.
        scan: The scan of a measured allocation, if there is one.
        processes: That share the work, and one disk; memory is that of each.
    """
    measured = [site for site in shapes.sites if solving.measured]
    store = sum(statistics_bytes(site, solving) for site in measured) if solving.stored else 0
    moments = tuple(_moments(shapes, solving, batches, prompts, images, on_host, scan))
    masks = sum(changed_bytes(site, shapes.element)[1] for site in shapes.sites)
    whole, pruned = sum(shapes.weights.values()), sum(site.weights for site in shapes.sites)
    kept, new = meanwhile_bytes(pruned, shapes.element, _keeps(solving, batches), shapes.on_disk, processes)
    return MemoryPlan(
        moments=moments,
        on_host=on_host,
        batches=batches,
        store_bytes=store,
        kept_bytes=kept,
        resting_bytes=processes * whole + new if shapes.on_disk else 0,
        output_bytes=whole + masks,
    )


def _moments(
    shapes: Shapes, solving: Solving, batches: Batches, prompts: int, images: int, on_host: bool, scan: Scan | None
) -> Iterator[Moment]:
    whole, offloaded = {"weights": sum(shapes.weights.values())}, bool(shapes.at_hand) and not shapes.on_disk
    weights, encoding = shapes.weights_while("denoiser"), shapes.weights_while("text")
    drawn = images * shapes.image
    at_first = {"process": shapes.imports}
    yield Moment("loading", {} if offloaded else whole, at_first if on_host else at_first | whole)  # the host reads all
    process = at_first | (whole if offloaded else {})
    drawing = _drawing(shapes, min(batches.images, images))
    if images:
        yield Moment("drawing", drawing, process | {"images": COPIES * drawn})
    host = process | {"images": drawn, "prompts": prompts * shapes.prompt if solving.measured else 0}
    host |= {"recorded calls": batches.recorded} if batches.recorded else {}
    by_name = {site.name: site for site in shapes.sites}
    changed = masks = 0
    spilled = _keeps(solving, batches)  # then dense weights and masks lie on the disk, too
    for number, names in enumerate(batches.packages, 1):
        sites = [by_name[name] for name in names]
        held = sum(statistics_bytes(site, solving) for site in sites) if solving.measured else 0
        here, beside = _placed(changed, offloaded)
        so_far, masked = weights | here, host | {"masks": masks} | beside
        if solving.measured and not solving.reused:
            what = f"calibrating, {'stage' if batches.recorded else 'pass'} {number} of {len(batches.packages)}"
            calling = shapes.observed * min(batches.prompts, prompts)
            saving = max(statistics_bytes(site, solving) for site in sites) if solving.stored else 0
            writing = {"file": saving} if saving else {}
            yield Moment(what, so_far | {"Hessians": held, "activations": calling}, masked | writing)
            text = encoding | {"changed weights": changed, "activations": shapes.text * min(ENCODED, prompts)}
            yield Moment("encoding prompts", text, masked)
        if solving.passes:
            back = {"activations": shapes.made * min(batches.prompts, prompts)}
            back["gradients"] = FLOAT * sum(site.weights for site in sites)
            yield Moment("backward passes", so_far | {"Hessians": held} | back, masked)
        if scan is not None:
            kept = 0 if solving.stored else held
            scanning = scan_bytes(scan, shapes, solving)
            yield Moment("scanning", so_far | {"Hessians": kept, "scan": scanning}, masked)
        if again := sum(statistics_bytes(site, solving) for site in sites if site.ranked):
            there = again + (0 if solving.stored else held)
            calling = shapes.observed * min(batches.prompts, prompts)
            yield Moment("trying ranks", so_far | {"Hessians": there, "activations": calling}, masked)
        for together in _together(sites):
            own = sum(statistics_bytes(site, solving) for site in together) if solving.measured else 0
            work = _work(together, solving, shapes.element)
            parts = {"Hessians": own if solving.stored else held, "solving": work}
            here, beside = _placed(changed, offloaded)
            yield Moment(f"solving {together[0].name}", weights | here | parts, host | {"masks": masks} | beside)
            held -= own if solving.once and not solving.stored else 0
            for site in together:
                new, mask = changed_bytes(site, shapes.element)
                changed, masks = changed + (0 if spilled or shapes.on_disk else new), masks + (0 if spilled else mask)
    if images:
        after = process | {"masks": masks, "images": (1 + COPIES) * drawn}
        yield Moment("drawing pruned images", drawing, after)
    one = {"weights": max(shapes.weights.values(), default=0)}  # a component at a time comes back from the device
    fetched = {} if on_host or offloaded else one
    all_masks = sum(changed_bytes(site, shapes.element)[1] for site in shapes.sites)
    written = whole if shapes.on_disk else weights
    yield Moment("writing", written, process | {"masks": all_masks, "images": 2 * drawn} | fetched)


def _placed(changed: int, offloaded: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Weights that are new beside dense ones as a part of what the device and the host hold: where weights rest on the
    host, those that are replaced stay there, too."""
    device, host = (0, changed) if offloaded else (changed, 0)
    return {"changed weights": device}, {"changed weights": host} if host else {}


def _drawing(shapes: Shapes, batch: int) -> dict[str, int]:
    """The largest of encoding prompts, running the denoiser and decoding."""
    sizes = {"text": shapes.text, "denoiser": shapes.call, "decode": shapes.decode}
    found = [shapes.weights_while(part) | {"activations": batch * size} for part, size in sizes.items()]
    return max(found, key=lambda parts: sum(parts.values()))


def _together(sites: Sequence[SiteShape]) -> Iterator[list[SiteShape]]:
    """Sites as they are solved: those that are cut in one go, else each by itself; those without layers never."""
    found: dict[str, list[SiteShape]] = {}
    for site in sites:
        if site.rows:
            found.setdefault(site.together or site.name, []).append(site)
    yield from found.values()


def _work(sites: Sequence[SiteShape], solving: Solving, element: int) -> int:
    cut = [site for site in sites if site.cut]
    return max(
        cut_bytes(cut, solving) if cut else 0,
        *(solve_bytes(site, solving, element) for site in sites if site.masked),
        0,
    )
