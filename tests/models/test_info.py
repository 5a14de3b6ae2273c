"""``obsdiff.json`` may come from anyone: types are checked, and prompts lie inside the folder or are embedded."""

import json
import shutil
import warnings

import pytest

import obsdiff
from obsdiff.data.prompts import EMBEDDED, load_prompts
from obsdiff.errors import UserError
from obsdiff.models.info import PipelineInfo, attach_info, info_of, read_info, write_info
from obsdiff.names import EMBEDDED_PROMPTS
from obsdiff.pruning.folder import load_pipeline


def info_in(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "obsdiff.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the file is []"),
        ("null", "the file is None"),
        ("3", "the file is 3"),
        ({"calls": {}}, "unknown key 'calls'"),
        ({"call": None}, "call is None"),
        ({"call": [1]}, "call is "),
        ({"call": {"callback": "x"}}, "unknown key 'callback'"),
        ({"call": {"num_inference_steps": 0}}, "call.num_inference_steps is 0"),
        ({"call": {"num_inference_steps": 2.5}}, "call.num_inference_steps is 2.5"),
        ({"call": {"num_inference_steps": True}}, "call.num_inference_steps is True"),
        ({"call": {"num_inference_steps": "20"}}, "call.num_inference_steps is '20'"),
        ({"call": {"num_inference_steps": 10**9}}, "call.num_inference_steps is 1000000000"),
        ({"call": {"height": None}}, "call.height is None"),
        ({"call": {"width": {"a": 1}}}, "call.width is "),
        ({"call": {"guidance_scale": "2"}}, "call.guidance_scale is '2'"),
        ({"call": {"guidance_scale": 10**400}}, "call.guidance_scale is 1000"),
        ('{"call": {"guidance_scale": NaN}}', "NaN is not JSON"),
        ('{"call": {"guidance_scale": -Infinity}}', "-Infinity is not JSON"),
        ({"alignment": "horses"}, "alignment is 'horses'"),
        ({"alignment": ["digits"]}, "alignment is "),
        ({"alignment": 0}, "alignment is 0"),
        ({"prompts": "digits-train"}, "prompts is 'digits-train'"),
        ({"prompts": ["digits-train"]}, "prompts is "),
        ({"prompts": {"calibration": None}}, "prompts.calibration is None"),
        ({"prompts": {"calibration": ["a"]}}, "prompts.calibration is "),
        ({"prompts": {"evaluation": ""}}, "prompts.evaluation is ''"),
        ({"prompts": {"training": "digits-train"}}, "unknown key 'training'"),
    ],
)
def test_anything_odd_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read_info(info_in(tmp_path / "p", content))
    text = str(error.value)
    assert message in text and "obsdiff.json" in text and "\n" not in text and len(text) < 400


def test_what_is_known_is_read_as_it_stands(tmp_path):
    content = {
        "call": {"guidance_scale": 2, "height": 16},
        "alignment": None,
        "prompts": {"evaluation": "digits-heldout"},
    }
    assert read_info(info_in(tmp_path / "p", content)) == content
    assert read_info(info_in(tmp_path / "p", {})) == {}
    assert read_info(tmp_path) == {}


def test_prompts_of_a_folder_lie_inside_it(tmp_path):
    folder = tmp_path / "p"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "own.txt").write_text("a cat\n")
    (folder / "inner.txt").symlink_to(folder / "sub" / "own.txt")
    for name in ("sub/own.txt", "inner.txt", str(folder / "sub" / "own.txt"), "sub/../sub/own.txt"):
        found = read_info(info_in(folder, {"prompts": {"calibration": name}}))["prompts"]["calibration"]
        assert load_prompts(found) == ["a cat"]


def test_prompts_elsewhere_are_left_to_the_user_to_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "p"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n")
    (tmp_path / "p-other").mkdir()
    (tmp_path / "p-other" / "s.txt").write_text("secret\n")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    for name in (
        "/etc/passwd", "secret.txt", "../secret.txt", "../p-other/s.txt", "link.txt", "up/secret.txt", "loop", ".",
        "owner/name", "https://example.org/p.txt", "~/p.txt", "x" * 5000, "a\0b", "missing.txt", "digits-train/../x",
    ):  # fmt: skip
        with pytest.warns(UserWarning, match="unless you name them yourself"):
            assert read_info(info_in(folder, {"prompts": {"calibration": name}}))["prompts"] == {}, name


def test_embedded_sets_have_one_list_of_names():
    assert tuple(EMBEDDED) == EMBEDDED_PROMPTS


def changed(pipe_folder, folder, **changes):
    shutil.copytree(pipe_folder, folder)
    content = json.loads((folder / "obsdiff.json").read_text())
    info_in(folder, {**content, **changes})
    return folder


def test_a_loaded_pipeline_holds_no_foreign_prompts(pipe_folder, tmp_path):
    folder = changed(pipe_folder, tmp_path / "p", prompts={"calibration": "/etc/passwd"})
    with pytest.warns(UserWarning, match="/etc/passwd"):
        pipe = load_pipeline(folder)
    assert info_of(pipe).prompts == {}


def test_own_prompts_travel_with_a_pruned_pipeline(pipe_folder, tmp_path):
    folder = changed(pipe_folder, tmp_path / "p", prompts={"calibration": "own.csv", "evaluation": "digits-heldout"})
    (folder / "own.csv").write_text("caption\nthe digit two\n")
    pipe = load_pipeline(folder)
    report = obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts = info_of(load_pipeline(tmp_path / "out")).prompts
    assert load_prompts(prompts["calibration"]) == ["the digit two"]
    assert prompts["evaluation"] == "digits-heldout"


def test_call_arguments_that_the_pipeline_does_not_take(pipe_folder, tmp_path, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    def call(self, prompt=None, num_inference_steps=28, guidance_scale=7.0, height=None, width=None):
        raise AssertionError

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", call)
    with pytest.raises(UserError, match="StableDiffusion3Pipeline takes no max_sequence_length; delete it there"):
        load_pipeline(changed(pipe_folder, tmp_path / "p"))


def test_information_given_in_python_is_trusted_and_written_with_its_files(pipe, tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\n")
    attach_info(pipe, PipelineInfo("x", {}, None, {"calibration": str(tmp_path / "mine.txt")}))
    folder = tmp_path / "p"
    folder.mkdir()
    write_info(info_of(pipe), folder)
    assert json.loads((folder / "obsdiff.json").read_text())["prompts"] == {"calibration": "prompts-calibration.txt"}
    assert read_info(folder)["prompts"] == {"calibration": str(folder / "prompts-calibration.txt")}
