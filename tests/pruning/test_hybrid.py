"""Units and directions go first, then single weights of what is left: one plan, one calibration."""

import re
import shutil

import lightning
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

import obsdiff
from obsdiff.allocation.request import check_values
from obsdiff.allocation.stage import prune_stage
from obsdiff.data.digits import DigitsDataModule
from obsdiff.export.inspection import inspect_run
from obsdiff.files import read_json
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import subject_of
from obsdiff.obs.hessian import Gram
from obsdiff.obs.linalg import damped
from obsdiff.obs.pattern import NM, Depth, Hybrid, Structured, Unstructured, parse_request
from obsdiff.pruning.layers import SolveOptions
from obsdiff.pruning.masks import weight_masks
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions, ReconstructionOptions
from obsdiff.pruning.plan import make_plan
from obsdiff.pruning.planfile import read_plan, write_plan
from obsdiff.pruning.solve import solve_layers
from obsdiff.training.options import Objective, Trained
from obsdiff.training.recovery import Recovery
from tests.conftest import CALL, make_pipe

PROMPTS = ["a seven", "a two", "a handwritten digit nine"]
FEW = CalibrationOptions(num_prompts=3)


@pytest.fixture(scope="module")
def statistics():
    return obsdiff.calibrate(make_pipe(), PROMPTS)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("structured:0.3+2:4", Hybrid(Structured(0.3, 0.3, channels=0.3), NM(2, 4))),
        ("2:4+rank:8", Hybrid(Structured(0.0, 0.0, rank=8), NM(2, 4))),
        (
            "rank:8+structured:0.3+unstructured:0.5",
            Hybrid(Structured(0.3, 0.3, channels=0.3, rank=8), Unstructured(0.5)),
        ),
        ("depth:1+rank:8+2:4", Depth(1, Hybrid(Structured(0.0, 0.0, rank=8), NM(2, 4)))),
    ],
)
def test_patterns(text, found):
    assert parse_request(text) == found
    assert parse_request(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("structured:0.3+2:4+unstructured:0.5", "2:4 and unstructured:0.5, which exclude each other"),
        ("2:4+1:4", "2:4 and 1:4, which exclude each other"),
        ("structured:0.3+unstructured:0", "prunes no single weights"),
        ("structured:0.3+5:4", "pattern 5:4 is impossible"),
        ("rank:8+rank:4+2:4", "joins what cannot be joined"),
    ],
)
def test_impossible_patterns(text, message):
    with pytest.raises(obsdiff.UserError, match=message):
        parse_request(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "structured+2:4"}, "has no number; give one, or --budget"),
        ({"pattern": "structured+2:4", "budget": "sparsity:0.5"}, "does not say how .* shares it between units and"),
        ({"pattern": "structured:0.3+2:4", "method": "wanda"}, "cannot prune heads and neurons"),
        ({"pattern": "rank:4+2:4", "budget": "latency:0.9"}, "ranks hardly change latency"),
    ],
)
def test_requests_that_are_refused_early(options, message):
    with pytest.raises(obsdiff.UserError, match=message):
        check_values(PruningOptions(**options))


def test_several_calibrations_are_refused():
    options = PruningOptions(
        pattern="structured:0.5+2:4", allocation="uniform", calibration=CalibrationOptions(packages=2)
    )
    with pytest.raises(obsdiff.UserError, match="one calibration of the dense model"):
        prune_stage(make_pipe(), options, PROMPTS)


def weights_of(pipe, name):
    layer = pipe.transformer.get_submodule(name)
    return layer.weight.detach().double(), layer.bias.detach().double()


def test_what_single_weights_are_solved_for(statistics):
    """The same as compensating by hand, then pruning that on the kept columns of H; whatever the units leave.

    The brute force knows nothing of graphs: it takes the units that stayed, solves the normal equations, and gives
    what comes out to the same method as a layer of its own, on moments of the kept inputs alone.
    """
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "structured:0.5+2:4", statistics=statistics, spare_blocks=[])
    name, layer = "transformer_blocks.1.ff", "transformer_blocks.1.ff.net.2"
    kept, mask = report.masks[name], report.masks[f"{layer}.weight"]
    assert mask.shape == (16, int(kept.sum())) and not bool(kept.all())
    assert bool((mask.view(16, -1, 4).sum(-1) == 2).all())

    site = statistics.site(layer)
    c = site.covariance().double()
    mean = site.mean()
    dense, bias = weights_of(make_pipe(), layer)
    h = damped(c.float(), 0.01).double()
    start = dense[:, kept] + dense[:, ~kept] @ h[~kept][:, kept] @ torch.linalg.inv(h[kept][:, kept])
    started = bias + dense @ mean - start @ mean[kept]

    alone = torch.nn.Linear(int(kept.sum()), 16)
    with torch.no_grad():
        alone.weight.copy_(start)
        alone.bias.copy_(started)
    # inputs with exactly the moments of the kept ones
    factor = torch.linalg.cholesky(c[kept][:, kept] + 1e-12 * torch.eye(int(kept.sum())))
    n = 4 * int(kept.sum())
    basis = torch.linalg.qr(
        torch.randn(n, int(kept.sum()) + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), basis], 1))[0][:, 1 : int(kept.sum()) + 1]
    x = n**0.5 * basis @ factor.T + mean[kept]
    seen = Gram.empty(int(kept.sum()))
    seen.add(x[None], 1.0)
    torch.testing.assert_close(seen.covariance().double(), c[kept][:, kept], rtol=1e-4, atol=1e-5 * float(c.max()))
    seen.num_tokens = site.num_tokens

    class One:
        def layer(self, _):
            return alone

        def weight(self, _):
            return alone.weight

    [wanted] = solve_layers(One(), [layer], [NM(2, 4)], seen, SolveOptions("obs"))
    now, now_bias = weights_of(pipe, layer)
    assert torch.equal(wanted.mask, mask)
    torch.testing.assert_close(now, wanted.weight.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(now_bias, started + wanted.bias_shift.double(), rtol=1e-3, atol=1e-4)


def test_compensated_weights_answer_the_normal_equations():
    """The error of any weights on the kept inputs is that of the compensated ones plus their distance under H_KK."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64, generator=generator) @ torch.randn(
        12, 12, dtype=torch.float64, generator=generator
    )
    w = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    kept = torch.arange(12) % 3 != 0
    h = x.T @ x
    least = w[:, kept] + w[:, ~kept] @ h[~kept][:, kept] @ torch.linalg.inv(h[kept][:, kept])
    other = least * (torch.rand(least.shape, generator=generator) > 0.5)
    error = (x @ w.T - x[:, kept] @ other.T).square().sum()
    change = other - least
    base = (x @ w.T - x[:, kept] @ least.T).square().sum()
    torch.testing.assert_close(error, base + (change @ h[kept][:, kept] * change).sum())


@pytest.mark.parametrize("method", ["obs", "obs-diff", "taylor", "magnitude", "random"])
def test_methods(statistics, method):
    """All that cut units; masks as asked, zeros where they say so, gradients of what is left."""
    pipe = make_pipe()
    options = PruningOptions(pattern="structured:0.5+rank:8+2:4", method=method, allocation="uniform", calibration=FEW)
    report = prune_stage(pipe, options, PROMPTS)
    graph = subject_of(make_pipe()).graph
    weights = weight_masks(report.masks, True)
    assert weights.keys() == graph.layers.keys()
    for layer, mask in weights.items():
        weight = pipe.transformer.get_submodule(layer).weight
        assert weight.shape == mask.shape and bool((weight[~mask] == 0).all())
        assert float(mask.float().mean()) == 0.5
    assert report.packages == 1
    assert report.parameters["nonzero"] < report.parameters["pruned"] < report.parameters["dense"]
    assert report.sparsity == 1 - report.parameters["pruned"] / report.parameters["dense"]


def test_unstructured_counts_are_of_what_is_left(statistics):
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "structured:0.5+unstructured:0.7", statistics=statistics, spare_blocks=[])
    for mask in weight_masks(report.masks, True).values():
        assert int(mask.sum()) == mask.numel() - round(0.7 * mask.numel())


def test_a_layer_that_does_not_divide_keeps_its_weights(statistics):
    """Three of 16 neurons are no multiple of four; the report says so, and the layer is whole."""
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "structured:heads=0,ffn=0.8,multiple_of=1+2:4", statistics=statistics, spare_blocks=[])
    name = "transformer_blocks.1.ff.net.2"
    left = pipe.transformer.get_submodule(name).weight
    assert left.shape[1] % 4 and bool(report.masks[f"{name}.weight"].all()) and bool((left != 0).all())
    assert any("keep all their weights: the inputs that are left are no multiple of 4" in note for note in report.notes)
    assert report.plan.weights[name] == Unstructured(0.0)


def test_units_meet_the_budget_and_weights_follow(statistics, tmp_path):
    """What a budget in parameters counts is stored dense: single weights change nothing in it."""
    base = PruningOptions(pattern="structured+rank", budget="parameters:0.7", calibration=FEW)
    alone = obsdiff.allocate(make_pipe(), base, statistics, PROMPTS)
    both = obsdiff.allocate(
        make_pipe(),
        PruningOptions(pattern="structured+rank+2:4", budget="parameters:0.7", calibration=FEW),
        statistics,
        PROMPTS,
    )
    assert both.plan.modules == alone.plan.modules and both.record["achieved"] == alone.record["achieved"] <= 0.7
    assert both.record["joint_error"] > alone.record["joint_error"]
    pipe = make_pipe()
    report = obsdiff.prune(pipe, both.plan, statistics=statistics)
    assert report.parameters["pruned"] <= 0.7 * report.parameters["dense"]
    write_plan(both.plan, tmp_path / "plan.yaml", "SD3Transformer2DModel", None)
    again = read_plan(tmp_path / "plan.yaml", subject_of(make_pipe()).graph)
    assert again.entries == both.plan.entries and again.pattern == both.plan.pattern


def test_rules_of_names_choose_among_modules_and_layers():
    graph = subject_of(make_pipe()).graph
    plan = make_plan(graph, parse_request("structured:0.5+2:4"), exclude=["*.attn.to_q", "*.ff"], spare_blocks=[])
    assert "transformer_blocks.1.ff" not in plan.modules and "transformer_blocks.1.attn" in plan.modules
    assert "transformer_blocks.1.attn.to_q" not in plan.weights and "transformer_blocks.1.ff.net.2" in plan.weights
    with pytest.raises(obsdiff.UserError, match="leaves nothing for 2:4"):
        make_plan(graph, parse_request("structured:0.5+2:4"), include=["*.ff"])
    with pytest.raises(obsdiff.UserError, match="matches none"):
        make_plan(graph, parse_request("structured:0.5+2:4"), exclude=["nothing"])


@pytest.fixture(scope="module")
def run(tmp_path_factory, statistics):
    """A saved hybrid."""
    folder = tmp_path_factory.mktemp("hybrid") / "out"
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "structured:0.5+rank:8+2:4", statistics=statistics, spare_blocks=[])
    obsdiff.save_pipeline(pipe, folder, report)
    return folder, pipe, report


def test_it_comes_back(run, images):
    folder, pipe, _ = run
    drawn = images(pipe)
    assert torch.equal(images(obsdiff.load_pipeline(folder)), drawn)
    plain = DiffusionPipeline.from_pretrained(folder / "pipeline", trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    attach_info(plain, PipelineInfo("plain", CALL))
    assert torch.equal(images(plain), drawn)
    text = inspect_run(folder)
    assert "structured:0.5+rank:8+2:4 by obs" in text
    assert re.search(r"transformer_blocks.0.attn.to_q.weight +2:4 +50.00%", text)
    manifest = read_json(folder / "pruning.json", "a manifest")
    assert manifest["plan"]["transformer_blocks.1.ff.net.2.weight"] == "2:4"
    with pytest.raises(obsdiff.UserError, match="pruned already"):
        obsdiff.prune(obsdiff.load_pipeline(folder), "2:4", method="magnitude")


def test_changed_zeros_are_found(run, tmp_path):
    folder, _, _ = run
    shutil.copytree(folder, tmp_path / "out")
    path = tmp_path / "out" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.1.ff.net.2.weight"][:] = 1.0
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(obsdiff.UserError, match="are not zero where their masks say so"):
        obsdiff.load_pipeline(tmp_path / "out")


def test_a_plan_file_is_checked(run, tmp_path):
    text = (run[0] / "plan.yaml").read_text()
    wrong = tmp_path / "plan.yaml"
    wrong.write_text(
        text.replace(
            "transformer_blocks.1.ff.net.2.weight: '2:4'", "transformer_blocks.1.ff.net.2.weight: structured:0.5"
        )
    )
    with pytest.raises(obsdiff.UserError, match=r"single weights are of LAYER\.weight"):
        read_plan(wrong, subject_of(make_pipe()).graph)


@pytest.mark.parametrize("lora_rank", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_zeros_are_held_in_recovery(tmp_path, lora_rank, pipe_folder):
    """Pruned in the setup of a run, trained, exported: shapes and zeros are those of the prune."""
    pruning = PruningOptions(
        pattern="structured:0.5+rank:8+2:4", allocation="uniform", spare_blocks=[], calibration=FEW
    )
    module = Recovery(
        str(pipe_folder),
        str(tmp_path / "out"),
        pruning,
        Objective(denoise=1.0),
        trained=Trained(lora_rank=lora_rank),
        evaluation=EvaluationOptions(num_images=0),
    )
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4))
    before = obsdiff.load_pipeline(tmp_path / "out" / "pruned").transformer
    assert module.start.masks.keys() == subject_of(make_pipe()).graph.layers.keys()
    trained = obsdiff.load_pipeline(tmp_path / "out" / "pruned").transformer
    module.load_trained(trained, {name: tensor.detach() for name, tensor in module.denoiser.state_dict().items()})
    changed = 0
    for layer, mask in module.start.masks.items():
        weight = trained.get_submodule(layer).weight
        assert bool((weight[~mask] == 0).all())
        changed += not torch.equal(weight, before.get_submodule(layer).weight)
    assert changed > len(module.start.masks) / 2


def test_reconstruction_keeps_the_zeros(statistics):
    pipe = make_pipe()
    options = PruningOptions(
        pattern="structured:0.5+2:4",
        allocation="uniform",
        spare_blocks=[],
        calibration=FEW,
        reconstruction=ReconstructionOptions(steps=4, triples=6, batch_size=2),
    )
    report = prune_stage(pipe, options, PROMPTS)
    assert report.reconstruction["steps"] == 4
    for layer, mask in weight_masks(report.masks, True).items():
        assert bool((pipe.transformer.get_submodule(layer).weight[~mask] == 0).all())


def test_after_a_stage(statistics):
    pipe = make_pipe()
    options = PruningOptions(pattern="depth:1+structured:0.5+2:4", allocation="uniform", calibration=FEW)
    report = prune_stage(pipe, options, PROMPTS)
    assert str(report.pattern) == "depth:1+structured:0.5+2:4"
    assert len(pipe.transformer.transformer_blocks) == 2 and len(report.plan.removed) == 1
    assert weight_masks(report.masks, True).keys() == subject_of(pipe).graph.layers.keys()


def test_a_lora_of_the_dense_model_finds_its_place(statistics):
    """Rows and columns go by the units; masked weights take the update whole."""
    pipe = make_pipe()
    report = obsdiff.prune(pipe, "structured:0.5+2:4", statistics=statistics, spare_blocks=[])
    layer = "transformer_blocks.1.ff.net.2"
    rows, columns = make_pipe().transformer.get_submodule(layer).weight.shape
    down, up = torch.randn(2, columns), torch.randn(rows, 2)
    lora = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    found = obsdiff.load_lora(pipe, lora, masks=report.masks)
    kept = report.masks["transformer_blocks.1.ff"]
    assert found.kept == {layer: pytest.approx(float((up @ down[:, kept]).square().sum() / (up @ down).square().sum()))}
    adapted = pipe.transformer.get_submodule(layer)
    assert adapted.lora_A["default_0"].weight.shape == (2, int(kept.sum()))
