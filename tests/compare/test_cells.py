"""Which cells a comparison has, what they are kept by, and what is refused before anything is loaded."""

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest

from obsdiff.compare import run as running
from obsdiff.compare.cells import check, key_of, part_of, units_of
from obsdiff.compare.options import CompareOptions
from obsdiff.compare.run import Dense, _kept
from obsdiff.costs import calibration_cost
from obsdiff.errors import UserError
from obsdiff.obs.pattern import parse_request
from obsdiff.pruning.options import CalibrationOptions, EvaluationOptions, PruningOptions, ScanOptions
from obsdiff.pruning.plan import Plan
from obsdiff.pruning.report import PruneReport
from obsdiff.pruning.stream import Stream

RECIPE = "configs/recover/distill.yaml"


def options(**changes):
    given = {"pipeline": "digits-sd3", "output": "out", "methods": ["obs", "wanda"], "patterns": ["2:4"]}
    return CompareOptions(**given | changes)


def test_every_combination_is_a_unit_and_each_seed_has_its_own_images():
    units, left_out = units_of(options(patterns=["2:4", "unstructured:0.5"], seeds=[3, 5]))
    assert len(units) == 8 and not left_out
    assert {unit.evaluation.seed for unit in units if unit.seed == 3} == {1000}
    assert {unit.evaluation.seed for unit in units if unit.seed == 5} == {1064}
    assert all(unit.pruning.seed == unit.seed for unit in units)


def test_a_pattern_may_bring_its_budget():
    [unit] = units_of(options(methods=["obs"], patterns=["structured+rank parameters:0.5"]))[0]
    assert unit.pruning.pattern == "structured+rank" and unit.pruning.budget == "parameters:0.5"


def test_a_method_may_bring_its_refit():
    """The published CIFAR-10 row: Diff-Pruning's choice, compensated."""
    methods = ["diff-pruning", "diff-pruning+refit", "obs+refit"]
    given = options(methods=methods, reference="diff-pruning", patterns=["structured:0.5"])
    (plain, refitted), [left] = units_of(given)
    assert (plain.method, plain.pruning.method, plain.pruning.refit) == ("diff-pruning", "diff-pruning", None)
    assert (refitted.method, refitted.pruning.method, refitted.pruning.refit) == (methods[1], "diff-pruning", True)
    assert key_of(plain, None, {}, {}) != key_of(refitted, None, {}, {})
    assert left.method == "obs+refit" and left.reason == "obs refits anyway; leave out +refit"
    with pytest.raises(UserError, match="unknown method 'magic'"):
        check(options(methods=["obs", "magic+refit"]))


def test_a_method_may_train_its_shape_from_scratch():
    given = options(methods=["obs", "obs+scratch", "random+scratch"], patterns=["structured:0.5"])
    plain, own, free = units_of(given)[0]
    assert (plain.scratch, own.scratch, free.scratch) == (False, True, True)
    assert own.pruning == plain.pruning and free.pruning.method == "random"
    assert len({key_of(unit, None, {}, {}) for unit in (plain, own, free)}) == 3
    for wrong in ("magic+scratch", "obs+scratch+refit", "wanda+refit+scratch"):
        with pytest.raises(UserError, match="unknown method"):
            check(options(methods=["obs", wrong]))


def test_variants_change_other_options_alone():
    variants = {"usual": {}, "late": {"calibration": {"weighting": "log_increase"}}, "plain": {"refit": False}}
    given = options(methods=["obs"], calibration=CalibrationOptions(steps=7), variants=variants)
    usual, late, plain = units_of(given)[0]
    assert [unit.variant for unit in (usual, late, plain)] == list(variants)
    assert late.pruning == replace(usual.pruning, calibration=CalibrationOptions(steps=7, weighting="log_increase"))
    assert plain.pruning == replace(usual.pruning, refit=False) and str(late) == "2:4 by obs, uniform, late, seed 0"
    without = units_of(options(methods=["obs"], calibration=CalibrationOptions(steps=7)))[0]
    assert key_of(usual, None, {}, {}) == key_of(without[0], None, {}, {}) != key_of(late, None, {}, {})
    assert given.compared_with == ("variant", "usual") and options().compared_with == ("method", "obs")


def test_scan_options_reach_measured_cells_alone():
    scan = ScanOptions(by="backward")
    given = options(methods=["obs"], patterns=["unstructured:0.5"], allocations=["uniform", "measured"], scan=scan)
    uniform, measured = units_of(given)[0]
    assert uniform.pruning.scan == ScanOptions() and measured.pruning.scan == scan


def test_what_does_not_go_together_is_left_out_with_the_reason():
    units, left_out = units_of(options(patterns=["2:4", "structured:0.5"], seeds=[0, 1]))
    assert [(unit.method, unit.pattern) for unit in units[:3]] == [
        ("obs", "2:4"), ("obs", "structured:0.5"), ("wanda", "2:4"),
    ]  # fmt: skip
    [found] = left_out
    assert (found.method, found.pattern) == ("wanda", "structured:0.5") and "cannot prune heads" in found.reason


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": []}, "methods is empty"),
        ({"methods": ["obs", "obs"]}, "methods names obs twice"),
        ({"methods": ["obs", "magic"]}, "unknown method 'magic'"),
        ({"patterns": ["half"]}, "half"),
        ({"patterns": ["structured"]}, "has no number"),
        ({"patterns": ["structured parameters:2"]}, "out of range"),
        ({"allocations": ["fair"]}, "unknown allocation 'fair'"),
        ({"reference": "admm"}, "reference admm is none of the methods"),
        ({"seeds": [-1]}, "seeds is -1"),
        ({"budget": {"steps": 5}}, "recipes names none"),
        ({"budget": {"epochs": 5}, "recipes": {"a": RECIPE}}, "unknown budget 'epochs'"),
        ({"budget": {"steps": 0}, "recipes": {"a": RECIPE}}, "budget.steps is 0"),
        ({"recipes": {"a": "nowhere.yaml"}}, "recipe nowhere.yaml not found"),
        ({"recipes": {"a": "configs/prune/digits.yaml"}}, "names no classes of model and data"),
        ({"recipes": {"one shot": RECIPE}}, "cannot be called"),
        ({"recipes": {"a": RECIPE, "b": RECIPE}}, "recipes a and b say the same"),
        ({"scan": ScanOptions(by="backward")}, "belong to measured allocations"),
        ({"scan": ScanOptions(by="sideways"), "allocations": ["measured"]}, "scan.by is 'sideways'"),
        ({"variants": {"a": {"dampening": 1}}}, "variants.a names 'dampening'; choose of scan, limits"),
        ({"variants": {"a": {"calibration": {"damp": 1}}}}, "variants.a.calibration names 'damp'; choose of prompts"),
        ({"variants": {"a": {"seed": 1}}}, "variants.a names 'seed'"),
        ({"variants": {"a": {"calibration": {"damping": -1}}}}, "damping"),
        ({"variants": {"a": {"calibration": 3}}}, "variants.a.calibration is 3"),
        ({"variants": {"a": {}, "b": {}}}, "the variants a and b say the same"),
        ({"evaluation": EvaluationOptions(num_images=1)}, "at least 2"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_wrong_options_are_one_line(changes, told):
    with pytest.raises(UserError, match=told):
        check(options(**changes))


def test_nothing_to_compare_is_refused_with_the_reasons():
    with pytest.raises(UserError, match=r"no method goes with any.*cannot prune heads"):
        units_of(options(methods=["wanda"], reference="wanda", patterns=["structured:0.5"]))


def test_parts_are_all_of_it_once():
    units = units_of(options(patterns=["2:4", "unstructured:0.5"], seeds=[0, 1, 2]))[0]
    parts = [part_of(units, f"{at}/5") for at in range(5)]
    assert [unit for part in parts for unit in part] == units and max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("5/5", "a/b", "1", "-1/2"):
        with pytest.raises(UserError, match="part is"):
            part_of(units, wrong)


def test_a_row_is_kept_by_content(tmp_path):
    [unit] = units_of(options(methods=["obs"]))[0]
    content = {"pipeline": "a"}
    key = key_of(unit, None, {}, content)
    assert key == key_of(unit, None, {}, dict(content))
    faster = replace(unit.pruning, calibration=CalibrationOptions(prompts="a-copy.txt", batch_size=9))
    assert key == key_of(replace(unit, pruning=faster), None, {}, content)
    cached = replace(unit, evaluation=replace(unit.evaluation, real_cache="elsewhere"))
    assert key == key_of(cached, None, {}, content)
    steps = CalibrationOptions(steps=3)
    others = [
        key_of(unit, None, {}, {"pipeline": "b"}),
        key_of(replace(unit, pruning=replace(unit.pruning, calibration=steps)), None, {}, content),
        key_of(replace(unit, evaluation=EvaluationOptions(seed=7)), None, {}, content),
        key_of(unit, RECIPE, {}, content),
        key_of(unit, RECIPE, {"steps": 5}, content),
    ]
    assert len({key, *others}) == 6


def test_what_is_left_at_its_default_has_no_part_in_the_key():
    [unit] = units_of(options(methods=["obs"]))[0]

    @dataclass(kw_only=True)
    class Later(PruningOptions):
        invented: int = 3

    own = {field.name: getattr(unit.pruning, field.name) for field in fields(unit.pruning)}
    keys = [key_of(replace(unit, pruning=Later(**own)), None, {}, {}), key_of(unit, None, {}, {})]
    assert keys[0] == keys[1]
    assert keys[0] != key_of(replace(unit, pruning=replace(unit.pruning, refit=False)), None, {}, {})


def test_a_file_that_a_recipe_names_counts_by_its_content(tmp_path):
    [unit] = units_of(options(methods=["obs"]))[0]
    prompts, recipe = tmp_path / "prompts.txt", tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{class_path: a.B}}\ndata: {{class_path: a.C, init_args: {{prompts: {prompts}}}}}\n")
    keys = []
    for text in ("one", "two"):
        prompts.write_text(text)
        keys.append(key_of(unit, str(recipe), {}, {}))
    assert keys[0] != keys[1]


def test_real_images_and_weights_count_by_their_content(tmp_path):
    [unit] = units_of(options(methods=["obs"]))[0]

    def key(name, text):
        folder = tmp_path / name
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a.png").write_text(text)
        weights = tmp_path / f"{name}.safetensors"
        weights.write_text(text)
        real, extractors = EvaluationOptions(real=str(folder)), EvaluationOptions(extractors={"clip": str(weights)})
        return [key_of(replace(unit, evaluation=evaluation), None, {}, {}) for evaluation in (real, extractors)]

    first, copied, other = key("a", "one"), key("b", "one"), key("c", "two")
    assert first == copied and first[0] != other[0] and first[1] != other[1]


def test_what_is_measured_alike_is_kept_in_one_place_and_nothing_else(tmp_path):
    dense = Dense("digits-sd3", "cpu", tmp_path, EvaluationOptions())
    dense.__dict__["content"] = {"transformer": "a"}

    def places(pattern, allocation="measured", method="obs", prompts=("one",), **changes):
        given = options(methods=[method], reference=method, patterns=[pattern], allocations=[allocation])
        return _kept(units_of(replace(given, **changes))[0][0], dense, prompts)

    store, scan = places("unstructured:0.5")
    assert store.parent == scan.parent == tmp_path
    assert places("unstructured:0.7") == (store, scan) and places("unstructured:0.5", "uniform") == (store, None)
    for other in ("structured:0.5", "2:4", "2:8"):
        assert places(other)[0] == store and places(other)[1] != scan
    assert places("2:4")[1] == places("3:4")[1] != places("2:8")[1]
    assert (
        places("unstructured:0.5", method="admm")[0] == store and places("unstructured:0.5", method="admm")[1] != scan
    )
    refitted = replace(options(methods=["obs"], allocations=["measured"], patterns=["unstructured:0.5"]), variants={})
    for change in ({"refit": False}, {"compared_columns": 64}, {"exclude": ["*.ff.*"]}):  # solved otherwise, seen alike
        unit = units_of(replace(refitted, variants={"other": change}))[0][0]
        assert _kept(unit, dense, ("one",))[0] == store and _kept(unit, dense, ("one",))[1] != scan
    assert places("depth:1+unstructured:0.5")[0] != store
    assert places("unstructured:0.5", prompts=("two",))[0] != store
    assert places("unstructured:0.5", calibration=CalibrationOptions(steps=3))[0] != store
    assert places("unstructured:0.5", "uniform", "sparsegpt")[0] != store  # weighs steps otherwise
    for other in ("magnitude", "taylor"):  # measure no inputs, and are told their layer errors by the same calibration
        assert places("unstructured:0.5", "uniform", other)[0] == store
    assert places("unstructured:0.5", "uniform", "obs-diff")[0] is None  # four calibrations
    assert places("depth:1", "uniform")[0] is None  # no layer is solved


def test_recorded_calls_wait_on_the_disk_of_the_comparison(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(Stream, "keep_on_disk", lambda self, folder: places.append(folder))
    calibration = CalibrationOptions(num_prompts=2, steps=2, streamed=True, calls_on_disk=True)
    given = options(methods=["obs"], reference="obs", allocations=["uniform"], calibration=calibration)
    dense = Dense("digits-sd3", "cpu", tmp_path / "shared", EvaluationOptions())
    running._pruned(units_of(given)[0][0], dense, tmp_path / "pruned")
    assert places == [tmp_path]


@pytest.mark.parametrize(("method", "left"), [("magnitude", {}), ("taylor", {"rows": 6, "inputs": False})])
def test_a_calibration_that_a_method_does_not_need_costs_it_nothing(tmp_path, monkeypatch, method, left):
    """Its layer errors are measured by it; what it needs is a pass of its own, or nothing."""
    own = {"gradients": {"rows": 6, "inputs": True}} if left else {}
    given = {"num_prompts": 4, "steps": 5, "guidance_scale": 2.0, **own}
    plan = Plan(parse_request("2:4"), {})
    report = PruneReport(
        plan.pattern, method, False, 0, plan, fingerprint=given, time_s={"calibrate": 3.0, "solve": 1.0}
    )
    stored = SimpleNamespace(time_s={"calibrate": 3.0 - len(own)})
    monkeypatch.setattr(running, "open_statistics", lambda store: stored)
    running._leave_out_calibration(report, tmp_path)
    assert ((report.fingerprint or {}).get("gradients") or {}) == left
    cost = calibration_cost({"time_s": report.time_s, "statistics": report.fingerprint}, 10, 1)["calibration"]
    assert (cost.denoiser_flops, cost.wall_s) == (60.0 if left else 0.0, float(len(own)))
