"""Plans on disk: what is written comes back, and what does not fit is refused in one line."""

import pytest
import torch
import yaml

import obsdiff
from obsdiff.models.subject import subject_of
from obsdiff.obs.pattern import NM, Structured, Unstructured
from obsdiff.pruning.plan import Plan, make_plan
from obsdiff.pruning.planfile import fitted_plan, kinds_of, read_plan, write_plan
from obsdiff.pruning.statistics import model_hash

Q, K, UP = (f"transformer_blocks.{name}" for name in ("0.attn.to_q", "0.attn.to_k", "1.ff.net.0.proj"))


def written(tmp_path, plan, pipe, model=True):
    path = tmp_path / "plan.yaml"
    write_plan(plan, path, "SD3Transformer2DModel", model_hash(pipe.transformer) if model else None)
    return path


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Unstructured(0.5), {Q: Unstructured(0.123456789), UP: Unstructured(0.0)}, "measured", "sparsity:0.5"),
        Plan(NM(2, 4), {Q: NM(1, 4), K: Unstructured(0.0), UP: NM(2, 4)}),
        Plan(Structured(0.5, 0.25), {"transformer_blocks.1.attn": Structured(0.25, 0), "transformer_blocks.1.ff":
             Structured(0, 1 / 3, 2)}, "owl", "flops:0.7"),
    ],
)  # fmt: skip
def test_a_plan_comes_back(tmp_path, pipe, plan):
    graph = subject_of(pipe).graph
    back = read_plan(written(tmp_path, plan, pipe), graph)
    assert (back.rule, back.budget, list(back.entries)) == (plan.rule, plan.budget, list(plan.entries))
    for name, pattern in plan.entries.items():
        assert back.entries[name].sparsity == pytest.approx(pattern.sparsity, abs=1e-9)
        assert type(back.entries[name]) is type(pattern)


def test_a_plan_gives_each_layer_its_own(tmp_path, pipe, prompts):
    plan = Plan(Unstructured(0.5), {UP: Unstructured(0.75), Q: NM(1, 4), K: Unstructured(0.0)})
    before = pipe.transformer.get_submodule(K).weight.clone()
    statistics = obsdiff.calibrate(pipe, prompts)
    report = obsdiff.prune(
        pipe, read_plan(written(tmp_path, plan, pipe), subject_of(pipe).graph), statistics=statistics
    )
    assert list(report.masks) == [Q, K, UP]  # in the order of a forward pass
    assert report.sparsity_per_layer == pytest.approx({Q: 0.75, K: 0.0, UP: 0.75})
    assert bool((report.masks[Q].view(-1, 4).sum(1) == 1).all())
    assert torch.equal(pipe.transformer.get_submodule(K).weight, before)


@pytest.mark.parametrize("method", ["obs", "admm", "sparsegpt", "wanda", "magnitude", "random"])
def test_ratio_zero_leaves_a_layer_as_it_is(pipe, prompts, method):
    statistics = obsdiff.calibrate(pipe, prompts)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    obsdiff.prune(pipe, Plan(Unstructured(0.5), {Q: Unstructured(0.0), K: Unstructured(0.5)}), method=method,
                  statistics=statistics)  # fmt: skip
    assert torch.equal(before[Q + ".weight"], pipe.transformer.get_submodule(Q).weight)
    assert not torch.equal(before[K + ".weight"], pipe.transformer.get_submodule(K).weight)
    torch.testing.assert_close(before[Q + ".bias"], pipe.transformer.get_submodule(Q).bias, rtol=0, atol=1e-7)


def test_a_structured_plan_gives_each_module_its_own(dual_pipe, prompts, tmp_path, images):
    pipe = dual_pipe
    plan = Plan(Structured(0.5, 0.5), {
        "transformer_blocks.0.attn": Structured(0.25, 0), "transformer_blocks.1.ff": Structured(0, 0.5),
        "transformer_blocks.2.ff": Structured(0, 0), "transformer_blocks.0.attn2": Structured(0.75, 0)})  # fmt: skip
    report = obsdiff.prune(pipe, plan, statistics=obsdiff.calibrate(pipe, prompts))
    blocks = pipe.transformer.transformer_blocks
    assert (blocks[0].attn.heads, blocks[0].attn2.heads, blocks[1].attn.heads) == (3, 1, 4)
    assert blocks[1].ff.net[2].in_features == 32 and blocks[2].ff.net[2].in_features == 64
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    again = obsdiff.load_pipeline(tmp_path / "out")
    assert torch.equal(images(again), images(pipe))
    assert read_plan(tmp_path / "out" / "plan.yaml", subject_of(make(dual=True)).graph).entries == report.plan.entries


def make(dual=False):
    from tests.conftest import make_pipe

    return make_pipe(dual_attention_layers=(0, 1)) if dual else make_pipe()


GOOD = {"pattern": "unstructured:0.5", "layers": {Q: "unstructured:0.4", K: "dense"}}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers": {"transformer_blocks.9.attn.to_q": "unstructured:0.5"}}, "transformer_blocks.9.attn.to_q"),
        ({"layers": {Q: "unstructured:1.2"}}, "below 1"),
        ({"layers": {Q: "unstructured:-0.1"}}, "at least 0"),
        ({"layers": {Q: "half"}}, "unknown pattern"),
        ({"layers": {Q: "3:7"}}, "multiple of 7"),
        ({"layers": {Q: "structured:0.5"}}, "does not go with"),
        ({"pattern": "structured:0.5", "layers": {Q: "structured:0.5"}}, f"does not go with {Q}; use lowrank:RANK"),
        ({"pattern": "structured:0.5", "layers": {Q + ".x": "structured:0.5"}}, "no attention or feed-forward module"),
        ({"layers": {}}, "not a plan"),
        ({"layers": None}, "not a plan"),
        ({"pattern": ""}, "unknown pattern"),
        ({"ratios": {}}, "unknown keys ratios"),
        ({"format": 7}, "format 7"),
        ({"denoiser": "FluxTransformer2DModel"}, "made for a FluxTransformer2DModel"),
        ({"model": "0" * 64}, "other weights"),
    ],
)
def test_bad_plans_are_refused(tmp_path, pipe, change, word):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(obsdiff.UserError, match=word) as raised:
        read_plan(path, subject_of(pipe).graph)
    assert "\n" not in str(raised.value)


def test_a_plan_by_hand_is_enough_and_files_that_are_none_are_refused(tmp_path, pipe):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert read_plan(path, subject_of(pipe).graph).entries == {Q: Unstructured(0.4), K: Unstructured(0.0)}
    for text in ("[1, 2", "- a\n- b\n", "just words"):
        path.write_text(text)
        with pytest.raises(obsdiff.UserError, match="not a plan"):
            read_plan(path, subject_of(pipe).graph)
    with pytest.raises(obsdiff.UserError, match="cannot read"):
        read_plan(tmp_path / "none.yaml", subject_of(pipe).graph)


def test_a_plan_object_is_checked_too(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    for plan, options, word in [
        (Plan(Unstructured(0.5), {}), {}, "names no layer"),
        (Plan(Unstructured(0.5), {"nothing": Unstructured(0.5)}), {}, "nothing"),
        (Plan(Unstructured(0.5), {Q: Unstructured(0.5)}), {"include": ["*"]}, "leave out include"),
    ]:
        with pytest.raises(obsdiff.UserError, match=word):
            obsdiff.prune(pipe, plan, method="magnitude", **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_how_a_plan_spreads(pipe):
    graph = subject_of(pipe).graph
    assert kinds_of(make_plan(graph, Unstructured(0.5))) == "50.0% to 50.0%, median 50.0%"
    nm = Plan(NM(2, 4), {Q: NM(1, 4), K: Unstructured(0.0), UP: NM(1, 4)})
    assert kinds_of(fitted_plan(nm, graph)) == "2 x 1:4, 1 x dense"


def test_a_stage_goes_once(tmp_path, pipe):
    path = tmp_path / "plan.yaml"
    stage = "transformer_blocks.1"
    path.write_text(yaml.safe_dump({"pattern": "depth:2", "removed": [stage, stage], "layers": {}}))
    with pytest.raises(obsdiff.UserError, match=r"removed names 'transformer_blocks\.1' more than once"):
        read_plan(path, subject_of(pipe).graph)
