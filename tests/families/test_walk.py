"""Every family through the whole house: trace, calibrate, prune, shrunk equals masked, save, load, sample, again."""

import copy
import math

import pytest
import torch
from diffusers import DiffusionPipeline

import obsdiff
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.graph import pays, shapes_with
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info
from obsdiff.models.loading import absent
from obsdiff.models.subject import graph_of, subject_of
from obsdiff.obs.hessian import weight_matrices
from obsdiff.obs.pattern import Depth
from obsdiff.pruning.masks import weight_masks
from obsdiff.pruning.options import PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.scratch import draw_weights
from tests.families.pipelines import PIPELINES, each

ROWS = 2
SHARES = {"heads": 0.5, "ffn": 0.4, "channels": 0.5}


class Case:
    """One family: its pipeline, what it is told, its statistics."""

    def __init__(self, name):
        self.name, self.row = name, PIPELINES[name]
        given = self.row.conditioning(ROWS)
        self.conditioning = Conditioning({}, count=ROWS) if set(given) <= {"batch_size"} else Conditioning(given)
        pipe = self.fresh()
        self.graph = subject_of(pipe, self.conditioning).graph
        kinds = {group.kind for group in self.graph.groups}
        shares = [f"{kind}={share}" for kind, share in SHARES.items() if kind in kinds]
        self.structured = f"structured:{','.join(shares)},multiple_of=1"
        self.statistics = obsdiff.calibrate(pipe, self.conditioning, batch_size=ROWS)

    def units(self):
        """Groups whose units are entries of tensors."""
        return {group.name for group in self.graph.groups if group.basis is None}

    def fresh(self):
        pipe = self.row.build(encoders=False)
        call = {name: value for name, value in self.row.call.items() if name in CALL_ARGUMENTS}
        attach_info(pipe, PipelineInfo(self.row.pipeline, call))
        return pipe

    def traced(self):
        pipe = self.fresh()
        _ = subject_of(pipe, self.conditioning).call  # remembered with the pipeline
        return pipe

    def sample(self, pipe):
        return self.row.sample_rows(pipe, self.row.conditioning(ROWS), range(ROWS))


@pytest.fixture(scope="module", params=each(PIPELINES))
def case(request):
    return Case(request.param)


def plainly(folder, **options):
    """What diffusers alone loads."""
    pipe = DiffusionPipeline.from_pretrained(folder, **absent(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4"])
def test_masks(case, pattern, tmp_path):
    """Sparsity to the weight, the layers' errors true, the same images from disk, and nothing dense comes back."""
    pipe = case.traced()
    exclude = [name for name in case.graph.layers if weight_matrices(case.graph.layer(name)).shape[-1] % 4]
    report = obsdiff.prune(pipe, pattern, statistics=case.statistics, exclude=exclude)
    assert report.masks.keys() == case.graph.layers.keys() - set(exclude)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert all(0 <= error < 1.5 for error in report.layer_error.values())
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    drawn = case.sample(pipe)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, case.sample(case.fresh()))
    close(case.sample(plainly(tmp_path / "out" / "pipeline")), drawn)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    with pytest.raises(obsdiff.UserError, match="pruned already"):
        _ = subject_of(loaded, case.conditioning).call
        obsdiff.prune(loaded, pattern, method="magnitude")


def masked_like(case, pipe, report):
    """The dense pipeline with the columns of what went zeroed, and the columns that stayed as they came out."""
    masked = case.fresh()
    denoiser, cut = subject_of(masked).denoiser, subject_of(pipe).denoiser
    keeps = {}
    for name, mask in report.masks.items():
        for slices in case.graph.group_of[name].consumers:
            columns = keeps.setdefault(slices.layer, torch.ones(case.graph.weight(slices.layer).shape[1], dtype=bool))
            columns[slices.entries(~mask)] = False
    with torch.no_grad():
        for layer, columns in keeps.items():
            old, new = denoiser.get_submodule(layer), cut.get_submodule(layer)
            old.weight.zero_()
            old.weight[:, columns] = new.weight
            if old.bias is not None:
                old.bias.copy_(new.bias)
    return masked


def test_structured(case, tmp_path):
    pipe = case.traced()
    walk_structured(case, pipe, case.structured, tmp_path, spare_blocks=())


@pytest.mark.parametrize("case", each(PIPELINES, {"sd35", "wan22"}), indirect=True)
def test_structured_as_measured(case, tmp_path):
    pipe = case.traced()
    scan = ScanOptions(triples=4, levels=[0.5])
    asked = PruningOptions(pattern=case.structured, allocation="measured", budget="parameters:0.9", scan=scan)
    plan = obsdiff.allocate(pipe, asked, case.statistics, case.conditioning).plan
    report = walk_structured(case, pipe, plan, tmp_path)
    assert report.parameters["pruned"] <= 0.9 * report.parameters["dense"]


def walk_structured(case, pipe, pattern, tmp_path, **options):
    """The smaller model is the masked one, comes back from disk with plain diffusers, and can be pruned again."""
    dense = sum(p.numel() for p in subject_of(pipe).denoiser.parameters())
    report = obsdiff.prune(pipe, pattern, statistics=case.statistics, **options)
    assert report.masks.keys() == case.units()
    assert report.parameters["pruned"] == sum(p.numel() for p in subject_of(pipe).denoiser.parameters()) < dense
    drawn = case.sample(pipe)
    close(drawn, case.sample(masked_like(case, pipe, report)))
    assert not torch.allclose(drawn, case.sample(case.fresh()), rtol=1e-3)
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    plain = plainly(tmp_path / "out" / "pipeline", trust_remote_code=True)
    assert torch.equal(case.sample(plain), drawn)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    _ = subject_of(loaded, case.conditioning).call
    again = obsdiff.prune(loaded, case.structured, method="magnitude", prune_again=True, spare_blocks=())
    assert again.parameters["pruned"] < report.parameters["pruned"]
    drawn = case.sample(loaded)
    assert torch.isfinite(drawn).all()
    obsdiff.save_pipeline(loaded, tmp_path / "again", again)
    assert torch.equal(case.sample(obsdiff.load_pipeline(tmp_path / "again")), drawn)
    return report


def test_new_weights_for_what_is_left(case):
    """Cut tensors come as zeros out of their class: layers of them are drawn, norms let their channels through."""
    pipe = case.traced()
    report = obsdiff.prune(pipe, case.structured, method="random", spare_blocks=())
    denoiser = subject_of(pipe).denoiser
    shapes = {name: value.shape for name, value in denoiser.state_dict().items()}
    trained = case.sample(pipe)
    draw_weights(denoiser, {}, seed=0)
    assert {name: value.shape for name, value in denoiser.state_dict().items()} == shapes
    for name in report.shrunk["tensors"]:
        owner = denoiser.get_submodule(name.rpartition(".")[0])
        tensor = denoiser.get_parameter(name)
        if "Norm" in type(owner).__name__:
            assert bool((tensor == name.endswith("weight")).all()), name
        else:
            assert tensor.numel() < 2 or float(tensor.std()) > 0, name
    drawn = case.sample(pipe)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, trained)


def projected_like(case, pipe, report):
    """The dense pipeline with the weights multiplied out: what is projected and then read, in one matrix."""
    whole = case.fresh()
    denoiser, cut = subject_of(whole).denoiser, subject_of(pipe).denoiser
    with torch.no_grad():
        for group in (case.graph.group_of[name] for name in report.masks):
            for layer in group.layers:
                old, new = denoiser.get_submodule(layer), cut.get_submodule(layer)
                old.weight.copy_(new.weight @ cut.get_submodule(group.basis).weight)
                if old.bias is not None:
                    old.bias.copy_(new.bias)
    return whole


def test_ranks(case, tmp_path):
    """What reads a few directions of a vector is the projected model, and everything else goes on from it."""
    pipe = case.traced()
    assert case.graph.family.ranks == bool(case.graph.vectors) or case.name == "wan22-ti2v"  # that makes them by token
    if not case.graph.vectors:
        with pytest.raises(obsdiff.UserError, match="none in its blocks that is whole"):
            obsdiff.prune(pipe, "rank:0.25", statistics=case.statistics)
        return
    report = obsdiff.prune(pipe, "rank:0.25", statistics=case.statistics)
    assert report.masks.keys() == {group.name for group in case.graph.groups if group.kind == "rank"}
    for name, mask in report.masks.items():
        group = case.graph.group_of[name]
        kept = round(0.25 * group.count)
        assert int(mask.sum()) == kept and report.sparsity_per_layer[name] == 1 - kept / group.count
        assert subject_of(pipe).denoiser.get_submodule(group.basis).weight.shape == (kept, group.count)
        assert all(0 <= report.layer_error[layer] < 1 for layer in group.layers)
    drawn = case.sample(pipe)
    close(drawn, case.sample(projected_like(case, pipe, report)))
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(case.sample(plainly(tmp_path / "out" / "pipeline", trust_remote_code=True)), drawn)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    _ = subject_of(loaded, case.conditioning).call
    assert not subject_of(loaded, case.conditioning).graph.vectors
    again = obsdiff.prune(loaded, case.structured, method="magnitude", prune_again=True, spare_blocks=())
    assert again.parameters["pruned"] < report.parameters["pruned"]
    obsdiff.save_pipeline(loaded, tmp_path / "again", again)
    assert torch.equal(case.sample(obsdiff.load_pipeline(tmp_path / "again")), case.sample(loaded))


def test_ranks_and_units_at_once(case):
    pipe = case.traced()
    if case.graph.vectors:
        pattern = f"{case.structured}+rank:0.25"
        report = obsdiff.prune(pipe, pattern, statistics=case.statistics, spare_blocks=())
        assert {case.graph.group_of[name].kind for name in report.masks} >= {"rank"}
        assert report.masks.keys() == {group.name for group in case.graph.groups if group.kind != "lowrank"}
        assert torch.isfinite(case.sample(pipe)).all()


def test_low_ranks_of_tokens(case, tmp_path):
    """What reads a few directions of its tokens is the projected model, alone and beside units."""
    pipe, tokens = case.traced(), {group.name: group for group in case.graph.groups if group.kind == "lowrank"}
    report = obsdiff.prune(pipe, "lowrank:0.25", statistics=case.statistics, spare_blocks=())
    smaller = {name for name, group in tokens.items() if pays(case.graph, group, round(0.25 * group.count))}
    assert smaller and report.masks.keys() == tokens.keys()
    assert {name for name, mask in report.masks.items() if not bool(mask.all())} == smaller
    drawn = case.sample(pipe)
    report.masks = {name: report.masks[name] for name in smaller}
    close(drawn, case.sample(projected_like(case, pipe, report)))
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(case.sample(plainly(tmp_path / "out" / "pipeline", trust_remote_code=True)), drawn)
    both = case.traced()
    report = obsdiff.prune(both, f"{case.structured}+lowrank:0.25", statistics=case.statistics, spare_blocks=())
    kept = {name: int(mask.sum()) for name, mask in report.masks.items()}
    counts = {name: parameter.numel() for name, parameter in case.graph.denoiser.named_parameters()}
    counts |= {name: math.prod(shape) for name, shape in shapes_with(case.graph, kept)["tensors"].items()}
    assert report.parameters["pruned"] == sum(counts.values())
    assert torch.isfinite(case.sample(both)).all()


def test_units_then_weights(case, tmp_path):
    """What is left of a layer is pruned in its place: the dense pipeline with all of it zeroed gives the same."""
    pipe = case.traced()
    odd = [name for name in case.graph.layers if weight_matrices(case.graph.layer(name)).shape[-1] % 4]
    report = obsdiff.prune(pipe, f"{case.structured}+2:4", statistics=case.statistics, exclude=odd, spare_blocks=())
    denoiser, weights = subject_of(pipe).denoiser, weight_masks(report.masks, True)
    assert weights.keys() == case.graph.layers.keys() - set(odd)
    whole = [layer for layer, mask in weights.items() if bool(mask.all())]
    assert len(whole) < len(weights) / 2
    for layer, mask in weights.items():
        weight = denoiser.get_submodule(layer).weight
        assert weight.shape == mask.shape and bool((weight[~mask] == 0).all())
        if layer not in whole:
            assert bool((mask.flatten(1).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    drawn = case.sample(pipe)
    assert torch.isfinite(drawn).all()
    close(drawn, case.sample(both_like(case, pipe, report)))
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    assert torch.equal(case.sample(obsdiff.load_pipeline(tmp_path / "out")), drawn)
    assert torch.equal(case.sample(plainly(tmp_path / "out" / "pipeline", trust_remote_code=True)), drawn)


def both_like(case, pipe, report):
    """The dense pipeline with the kept rows and columns as they came out, and the other columns zero."""
    masked = case.fresh()
    denoiser, cut = subject_of(masked).denoiser, subject_of(pipe).denoiser
    lost = {}
    for name in report.plan.modules:
        group = case.graph.group_of[name]
        for axis, all_slices in ((0, group.producers), (1, group.consumers)):
            for s in all_slices:
                lost.setdefault((s.layer, axis), []).append(s.entries(~report.masks[name]))
    with torch.no_grad():
        for layer in {*report.plan.weights, *(layer for layer, _ in lost)}:
            old, new = denoiser.get_submodule(layer), cut.get_submodule(layer)
            rows, columns = (
                [i for i in range(old.weight.shape[axis]) if i not in set(torch.cat(lost[layer, axis]).tolist())]
                if (layer, axis) in lost
                else list(range(old.weight.shape[axis]))
                for axis in (0, 1)
            )
            gone = [i for i in range(old.weight.shape[1]) if i not in set(columns)]
            old.weight[:, gone] = 0
            old.weight[torch.tensor(rows)[:, None], torch.tensor(columns)] = new.weight
            if old.bias is not None:
                old.bias[rows] = new.bias
    return masked


UNCOUNTED = {"sd15", "sd21", "sdxl", "ddpm", "chroma"}  # no count in the config, or blocks told by their number


def test_depth(case, request, tmp_path):
    """A model without a block of each kind is the one that skips them, and plain diffusers loads it by its config."""
    pipe = case.traced()
    subject = subject_of(pipe, case.conditioning)
    options = PruningOptions(pattern="depth:1", scan=ScanOptions(triples=2))
    if request.node.callspec.params["case"] in UNCOUNTED:
        assert not subject.stacks
        with pytest.raises(obsdiff.UserError, match=r"runs as a chain, and a .* has none; use unstructured"):
            obsdiff.allocate(pipe, options, None, case.conditioning)
        return
    found = obsdiff.allocate(pipe, options, None, case.conditioning)
    counted = sum(stack.count for stack in subject.stacks)
    kinds = {stage.rpartition(".")[0] for stage in case.graph.stages}
    assert len(found.record["alone"]) == counted - (subject.family.denoiser == "SD3Transformer2DModel")
    assert {stack.name for stack in subject.stacks} == kinds - {"noise_refiner", "context_refiner"}
    assert found.plan.removed == (min(found.record["alone"], key=found.record["alone"].get),)
    first = [stack.stage(0) for stack in subject.stacks]
    skipped = case.traced()
    for name in first:
        owner, _, child = name.rpartition(".")
        blocks = subject_of(skipped).denoiser.get_submodule(owner)
        del blocks[int(child)]
    wanted = case.sample(skipped)
    report = obsdiff.prune(pipe, Plan(Depth(len(first)), {}, removed=tuple(first)))
    assert report.parameters["pruned"] == sum(p.numel() for p in subject_of(pipe).denoiser.parameters())
    drawn = case.sample(pipe)
    assert torch.equal(drawn, wanted) and not torch.equal(drawn, case.sample(case.fresh()))
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    folder = tmp_path / "out" / "pipeline"
    assert not list(folder.rglob("*.py"))
    plain = plainly(folder)
    assert torch.equal(case.sample(plain), drawn)
    before, after = (subject_of(made).denoiser for made in (case.fresh(), plain))
    assert type(before) is type(after)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    _ = subject_of(loaded, case.conditioning).call
    again = obsdiff.prune(loaded, "unstructured:0.5", method="magnitude", prune_again=True)
    assert again.sparsity == pytest.approx(0.5, abs=0.02) and torch.isfinite(case.sample(loaded)).all()


def test_groups_survive_copies_and_the_meta_device(case):
    """Without a call, and without weights, the same groups are found, in some order."""
    found = graph_of(copy.deepcopy(case.graph.denoiser).to("meta"))
    assert found.group_of.keys() == case.units()
    assert all(found.group_of[name].count == case.graph.group_of[name].count for name in found.group_of)
