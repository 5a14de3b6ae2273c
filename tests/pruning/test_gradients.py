"""The gradient pass: against one image and one time at a time, written out; and what it refuses."""

import pytest
import torch

import obsdiff
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.costs import calibration_cost
from obsdiff.models.subject import subject_of
from obsdiff.obs import observers
from obsdiff.pruning import gradients
from obsdiff.pruning.options import PruningOptions, ScanOptions
from obsdiff.pruning.statistics import open_statistics
from obsdiff.pruning.trajectories import noise_seeds
from tests.conftest import CALL, make_pipe

PROMPTS = ["a seven", "a two", "the digit four"]
LAYER = "transformer_blocks.1.attn.to_q"


@pytest.fixture(scope="module")
def found():
    return obsdiff.calibrate(make_pipe(), PROMPTS, needs={"loss_gradient"})


@pytest.fixture(scope="module")
def large():
    return obsdiff.calibrate(make_pipe(), PROMPTS, needs={"gram", "large_loss_gradient"})


def last_calls(pipe):
    """What the transformer is given at the last step of each prompt, the prompt's own row."""
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: calls.append(given), with_kwargs=True)
    for prompt, seed in zip(PROMPTS, noise_seeds(0, len(PROMPTS)), strict=True):
        pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **CALL)
    handle.remove()
    steps = CALL["num_inference_steps"]
    return [{k: v[-1:] for k, v in call.items() if torch.is_tensor(v)} for call in calls[steps - 1 :: steps]]


def losses_of(pipe, times):
    """By time and image, with a graph: x₀ from the last step, one noise per image, the velocity as the target."""
    calls = last_calls(pipe)
    shift = pipe.scheduler.config.shift
    named = {}
    for number, call in enumerate(calls):
        with torch.no_grad():
            velocity = pipe.transformer(**call, return_dict=False)[0]
        clean = call["hidden_states"] - call["timestep"].view(-1, 1, 1, 1) / 1000 * velocity
        generator = torch.Generator().manual_seed(noise_seeds(1, len(calls))[number])
        noise = torch.randn(clean.shape[1:], generator=generator)[None]
        for at in times:
            sigma = at / 1000
            noisy = {"hidden_states": (1 - sigma) * clean + sigma * noise, "timestep": torch.tensor([at])}
            answer = pipe.transformer(**{**call, **noisy}, return_dict=False)[0]
            named[at, number] = (answer - (noise - clean)).square().mean()
    assert shift >= 1
    return named


def reference(used=None):
    pipe = make_pipe()
    pipe.transformer.eval()
    levels = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(20) + 0.5) / 20))
    shift = pipe.scheduler.config.shift
    times = (1000 * shift * levels / (1 + (shift - 1) * levels)).tolist()
    named = losses_of(pipe, times)
    by_time = {at: sum(float(named[at, i].detach()) for i in range(len(PROMPTS))) / len(PROMPTS) for at in times}
    chosen = times if used is None else [at for at in times if by_time[at] / max(by_time.values()) > used]
    total = sum(named[at, i] for at in chosen for i in range(len(PROMPTS))) / (len(chosen) * len(PROMPTS))
    total.backward()
    weights = {name.removesuffix(".weight"): p.grad for name, p in pipe.transformer.named_parameters()}
    return by_time, chosen, weights


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_every_image_and_time_by_itself(found):
    by_time, _, weights = reference()
    assert list(found.gradients.losses.values()) == pytest.approx(list(by_time.values()), rel=1e-4)
    assert list(found.gradients.losses) == pytest.approx(list(by_time), rel=1e-4)
    assert found.gradients.by_layer.keys() == subject_of(make_pipe()).graph.layers.keys()
    for name, gradient in found.gradients.by_layer.items():
        assert gradient.dtype == torch.float32
        close(gradient, weights[name])


def test_only_times_of_large_loss_count(monkeypatch):
    """The paper's set {t: L_t / L_max > T}, for a T that leaves some out here."""
    monkeypatch.setitem(observers.GRADIENTS, "large_loss_gradient", 0.97)
    found = obsdiff.calibrate(make_pipe(), PROMPTS, needs={"large_loss_gradient"}).gradients
    by_time, chosen, weights = reference(0.97)
    assert 1 < len(chosen) < 20 and list(found.used) == pytest.approx(chosen, rel=1e-4)
    assert list(found.losses.values()) == pytest.approx(list(by_time.values()), rel=1e-4)
    close(found.by_layer[LAYER], weights[LAYER])


def test_batches_change_nothing(found):
    for size in (1, 3, 64):
        again = obsdiff.calibrate(make_pipe(), PROMPTS, needs={"loss_gradient"}, batch_size=size)
        close(again.gradients.by_layer[LAYER], found.gradients.by_layer[LAYER])


def test_the_denoiser_is_as_before(found):
    pipe = make_pipe()
    model = pipe.transformer.train()
    model.proj_out.weight.grad = torch.ones_like(model.proj_out.weight)
    model.proj_out.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = obsdiff.calibrate(pipe, PROMPTS, needs={"loss_gradient"})
    close(again.gradients.by_layer[LAYER], found.gradients.by_layer[LAYER])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and bool((model.proj_out.weight.grad == 1).all())
    wanted = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert wanted == {"proj_out.bias", "pos_embed.pos_embed"} & {name for name, _ in model.named_parameters()}
    assert all(p.grad is None for name, p in model.named_parameters() if name != "proj_out.weight")


def test_alone_it_measures_no_layer_inputs(found):
    assert not found.inputs and list(found) == [] and found.time_s["calibrate"] > 0
    report = obsdiff.prune(make_pipe(), "unstructured:0.5", method="taylor", statistics=found)
    assert report.layer_error == {} and report.notes == ["no layer inputs were measured, so there are no layer errors"]
    kept = report.fingerprint["gradients"]
    assert kept["need"] == "loss_gradient" and len(kept["losses"]) == len(kept["used"]) == 20
    # 3 prompts, 3 steps with guidance, one more answer each, 20 times there and (twice) back
    assert kept["rows"] == 3 * (3 * 2 + 1 + 20 * 3) and kept["inputs"] is False
    manifest = {"statistics": report.fingerprint, "time_s": report.time_s, "packages": 1}
    assert calibration_cost(manifest, 10, 1)["calibration"].denoiser_flops == 10 * kept["rows"]


def test_what_it_cost_is_in_the_ledger(large):
    report = obsdiff.prune(make_pipe(), "structured:0.5", method="diff-pruning", statistics=large)
    rows = report.fingerprint["gradients"]["rows"]
    assert rows == 3 * (3 * 2 + 1 + 20 + 20 * 3)
    manifest = {"statistics": report.fingerprint, "time_s": report.time_s, "packages": 1}
    inputs = 3 * 3 * 2
    assert calibration_cost(manifest, 10, 1)["calibration"].denoiser_flops == 10 * (inputs + rows)


@pytest.mark.parametrize("method", ["taylor", "diff-pruning"])
def test_a_choice_by_gradients_with_compensation(large, method):
    """The published CIFAR-10 row: Diff-Pruning's choice, the weights that stay by OBS."""
    statistics = (
        large if method == "diff-pruning" else obsdiff.calibrate(make_pipe(), PROMPTS, needs=("gram", "loss_gradient"))
    )
    plain, compensated = (
        obsdiff.prune(make_pipe(), "structured:0.5", method=method, statistics=statistics, refit=refit)
        for refit in (False, True)
    )
    assert all(torch.equal(plain.masks[name], mask) for name, mask in compensated.masks.items())
    assert plain.layer_error.keys() == compensated.layer_error.keys()
    assert all(compensated.layer_error[name] <= error for name, error in plain.layer_error.items())
    assert compensated.mean_layer_error < 0.9 * plain.mean_layer_error
    other = obsdiff.prune(make_pipe(), "structured:0.5", method="obs", statistics=statistics)
    assert any(not torch.equal(other.masks[name], mask) for name, mask in plain.masks.items())


def test_through_the_stage_with_a_store_and_packages(tmp_path):
    options = PruningOptions(pattern="structured:0.5", method="diff-pruning", refit=True)
    report = prune_stage(make_pipe(), options, PROMPTS, Folders(statistics=tmp_path / "store"))
    assert open_statistics(tmp_path / "store").gradients is None  # a store keeps none, they are measured again
    again = prune_stage(make_pipe(), options, PROMPTS, Folders(statistics=tmp_path / "store"))
    assert all(torch.equal(report.masks[name], mask) for name, mask in again.masks.items())
    assert report.layer_error == pytest.approx(again.layer_error, rel=1e-4)
    options.calibration.packages = 2
    assert prune_stage(make_pipe(), options, PROMPTS).packages == 2


@pytest.mark.parametrize(("pattern", "method"), [("structured:0.3", "diff-pruning"), ("unstructured:0.5", "taylor")])
def test_with_the_measured_allocation(pattern, method):
    options = PruningOptions(pattern=pattern, method=method, allocation="measured", scan=ScanOptions(triples=2))
    report = prune_stage(make_pipe(), options, PROMPTS)
    assert report.allocation["rule"] == "measured" and report.layer_error


def test_after_whole_blocks_are_gone():
    """Gradients are then of the shorter model."""
    options = PruningOptions(pattern="depth:1+structured:0.5", method="diff-pruning", spare_blocks=[])
    report = prune_stage(make_pipe(), options, PROMPTS)
    assert report.masks and report.shrunk and report.fingerprint["gradients"]["need"] == "large_loss_gradient"


def test_missing_gradients_are_named(large):
    before = make_pipe()
    with pytest.raises(
        obsdiff.UserError, match=r"hold no loss_gradient, which method taylor needs \(a store keeps none\)"
    ):
        obsdiff.prune(before, "2:4", method="taylor", statistics=large)
    few = obsdiff.calibrate(make_pipe(), PROMPTS, needs={"loss_gradient"}, sites={LAYER})
    assert LAYER in few.gradients.by_layer and "transformer_blocks.0.attn.to_q" not in few.gradients.by_layer
    with pytest.raises(obsdiff.UserError, match=r"there is no gradient of transformer_blocks\.0\.attn\.to_q"):
        obsdiff.prune(before, "2:4", method="taylor", statistics=few)


def several(pipe, monkeypatch):
    monkeypatch.setattr(gradients, "world_size", lambda: 2)


def unknown_noise(pipe, monkeypatch):
    pipe.scheduler.register_to_config(invert_sigmas=True)


def half(pipe, monkeypatch):
    pipe.transformer.half()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (several, "measured by one process; run this without torchrun"),
        (
            unknown_noise,
            r"not known, so it has no gradient \(FlowMatch.*: invert_sigmas turns time around\); use a method",
        ),
        (half, "vanish or overflow in float16; use --dtype float32 or bfloat16"),
    ],
)
def test_refusals_come_before_anything_runs(spoil, match, monkeypatch):
    pipe = make_pipe()
    subject = subject_of(pipe)
    _ = subject.graph  # a trace of the denoiser
    spoil(pipe, monkeypatch)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *_, **__: pytest.fail("the denoiser ran"))
    with pytest.raises(obsdiff.UserError, match=match):
        obsdiff.calibrate(subject, PROMPTS, needs={"loss_gradient"})


def test_a_loss_that_is_not_finite():
    pipe = make_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("inf"))
    with pytest.raises(obsdiff.UserError, match="denoising loss is not finite"):
        obsdiff.calibrate(pipe, PROMPTS, needs={"loss_gradient"})
