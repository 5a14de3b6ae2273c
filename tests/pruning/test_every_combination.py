"""Every method with every kind of pattern on the embedded pipelines: it works, or one line says why not."""

import copy

import pytest
import torch

import obsdiff
from obsdiff.allocation.stage import Folders, prune_stage
from obsdiff.criteria import METHODS
from obsdiff.models.info import attach_info, call_arguments, info_of
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import parse_pattern
from obsdiff.pruning import gates, gradients
from obsdiff.pruning.options import CalibrationOptions, PruningOptions, ScanOptions
from obsdiff.pruning.plan import kept_units
from obsdiff.pruning.trajectories import run_trajectories

PROMPTS = {"digits-sd3": ["a seven", "a two"], "digits-ddpm": ["", ""], "emoji-sd3": ["icon of a red apple", "a dog"]}
UNITS = {
    "digits-sd3": "structured:heads=0.5,ffn=0.25",
    "digits-ddpm": "structured:heads=0.5,channels=0.25",
    "emoji-sd3": "structured:heads=0.5,ffn=0.25",
}


class Case:
    """A pipeline, and the folder in which its one calibration is kept."""

    def __init__(self, name, folder):
        self.name, self.store = name, folder / "statistics"
        self.pipe = obsdiff.load_pipeline(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.info = info_of(self.pipe)
        [(self.component, self.dense)] = subject_of(self.pipe).components.items()
        self.prune("magnitude", "unstructured:0.5")  # calibrates, since a folder is named

    def prune(self, method, pattern, store=True):
        """As the command does it, on a fresh copy of the denoiser, with two prompts and two steps."""
        setattr(self.pipe, self.component, copy.deepcopy(self.dense))
        attach_info(self.pipe, self.info)
        calibration = CalibrationOptions(num_prompts=2, steps=2)
        scan = ScanOptions(triples=2) if "depth" in pattern else ScanOptions()
        allocation = None if pattern.startswith("depth") and "+" not in pattern else "uniform"
        options = PruningOptions(
            pattern=pattern, method=method, allocation=allocation, calibration=calibration, scan=scan, spare_blocks=[]
        )
        return prune_stage(self.pipe, options, PROMPTS[self.name], Folders(statistics=self.store if store else None))


@pytest.fixture(scope="module")
def few():
    """Passes of few steps and times: whether they work is asked here, not what they find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "STEPS", 2)
        patch.setattr(gradients, "TIMES", 3)
        yield


@pytest.fixture(scope="module")
def sd3(few, tmp_path_factory):
    return Case("digits-sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def ddpm(few, tmp_path_factory):
    return Case("digits-ddpm", tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def emoji(few, tmp_path_factory):
    return Case("emoji-sd3", tmp_path_factory.mktemp("emoji"))


def refusal(case, method, pattern):
    """The words of the one line, where a combination cannot be; None where it must work."""
    units = any(part.startswith("structured") for part in pattern.split("+"))
    if pattern == "depth:1" and method != "obs":
        return "depth:1 alone prunes no layers, so --method has no effect"
    if units and METHODS[method].structured is None:
        return f"method {method} cannot prune heads and neurons; use obs, .* or random with"
    if method == "ecodiff" and not units and "rank" not in pattern and pattern != "depth:1":
        return "method ecodiff removes whole heads, neurons and channels, no single weights; use it with structured"
    if pattern.startswith("depth") and case.name == "digits-ddpm":
        return "runs as a chain, and a UNet2DModel has none; use unstructured"
    return None


def check(case, method, pattern, store=True):
    if (words := refusal(case, method, pattern)) is not None:
        with pytest.raises(obsdiff.UserError, match=words) as refused:
            case.prune(method, pattern, store)
        assert "\n" not in str(refused.value)
        return
    report = case.prune(method, pattern, store)
    denoiser = getattr(case.pipe, case.component)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in denoiser.parameters())
    layers = parse_pattern(pattern.partition("+")[2] or "unstructured:0") if "depth" in pattern else report.pattern
    if "depth" in pattern:
        [gone] = report.plan.removed
        assert gone.startswith("transformer_blocks.")
        assert len(denoiser.transformer_blocks) == len(case.dense.transformer_blocks) - 1
    if not report.plan.structured:
        for name, mask in report.masks.items():
            weight = denoiser.get_submodule(name).weight
            assert bool((weight[~mask] == 0).all()), name
            # whole weights and whole groups: what is left over of a layer of few weights is rounding
            assert float((~mask).double().mean()) == pytest.approx(layers.sparsity, abs=0.5 / mask.numel() + 1e-12), (
                name
            )
        assert bool(report.masks) == (layers.sparsity > 0)
    elif "depth" not in pattern:
        graph, asked = subject_of(case_like(case)).graph, report.plan.entries
        assert report.masks.keys() <= asked.keys() and report.masks
        for name, mask in report.masks.items():
            assert int(mask.sum()) == kept_units(graph.group_of[name], asked[name]) < len(mask)
        kinds = {graph.group_of[name].kind for name in report.masks}
        named = {part.partition(":")[0] for part in pattern.split("+")} & {"rank", "lowrank"}
        assert kinds == named | {kind for kind in ("heads", "ffn", "channels") if kind in pattern}
    assert report.parameters["pruned"] == sum(p.numel() for p in denoiser.parameters())
    shrinks = any(part.startswith(("structured", "rank", "lowrank", "depth")) for part in pattern.split("+"))
    smaller = report.parameters["pruned"] < sum(p.numel() for p in case.dense.parameters())
    assert smaller == shrinks
    conditioning = obsdiff.models.conditioning.encode_prompts(
        case.pipe, PROMPTS[case.name][:1], call_arguments(case.pipe)
    )
    call = call_arguments(case.pipe, num_inference_steps=1)
    [(_, drawn)] = run_trajectories(subject_of(case.pipe), conditioning, [0], 1, call)
    assert bool(torch.isfinite(drawn).all())


def case_like(case):
    """The dense pipeline again."""
    setattr(case.pipe, case.component, case.dense)
    return case.pipe


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured:0.5", pytest.param(UNITS["digits-sd3"], marks=pytest.mark.slow)])
def test_digits_sd3(sd3, method, pattern):
    check(sd3, method, pattern)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [UNITS["digits-ddpm"], pytest.param("rank:8", marks=pytest.mark.slow)])
def test_digits_ddpm(ddpm, method, pattern):
    check(ddpm, method, pattern)


DEPTH = ["depth:1", "depth:1+unstructured:0.5"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "pattern",
    [
        "2:4",
        "4:8",
        "rank:8",
        "structured:heads=0.5,ffn=0.25+rank:8+lowrank:8",
        *DEPTH,
        "depth:1+structured:0.5+lowrank:8",
    ],
)
def test_digits_sd3_more(sd3, method, pattern):
    check(sd3, method, pattern, store="depth" not in pattern)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", "structured:heads=0.5,channels=0.5+rank:8", *DEPTH])
def test_digits_ddpm_more(ddpm, method, pattern):
    check(ddpm, method, pattern, store="depth" not in pattern)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4", UNITS["emoji-sd3"]])
def test_emoji_sd3(emoji, method, pattern):
    check(emoji, method, pattern)
