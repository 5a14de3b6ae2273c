"""``obsdiff evaluate``: a run against the dense pipeline it was made of, other programs' scores, and mistakes."""

import json
import sys

import pytest
from PIL import Image

import obsdiff
from obsdiff.cli.main import main
from obsdiff.errors import UserError
from obsdiff.export.layouts import check_layout
from tests.cli.test_commands import QUICK

SMALL = ["--evaluation.num_images", "3", "--evaluation.batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def pruned(pipe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    main(["prune", "--pipeline", str(pipe_folder), *QUICK, "--pattern", "unstructured:0.6", "--output", str(folder)])
    return folder


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, args)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_a_run_is_compared_with_what_it_was_made_of(pruned, tmp_path, capsys):
    out = tmp_path / "out"
    main(["evaluate", str(pruned), *SMALL, "--output", str(out)])
    assert sorted(file.name for file in out.iterdir()) == ["evaluation.json", "evaluation.md", "samples.png"]
    found = json.loads((out / "evaluation.json").read_text())
    evaluation = found["evaluation"]
    assert evaluation["n"] == 3 and evaluation["pruned"]["mse"] > 0 and "alignment" in evaluation["dense"]
    assert found["size"]["pruned"]["nonzero"] < found["size"]["dense"]["nonzero"]
    assert found["size"]["pruned"]["flops"] == found["size"]["dense"]["flops"] > 0
    low, high = found["latency"]["interval"]
    assert 0 < low <= found["latency"]["share"] <= high
    report = json.loads((pruned / "report.json").read_text())["evaluation"]
    assert report.keys() == evaluation.keys()  # one schema
    said = capsys.readouterr().out
    assert "MSE to dense" in said and str(out) in said
    assert "| parameters |" in (out / "evaluation.md").read_text()
    assert str(out) in refused(capsys, pruned, *SMALL, "--output", out)
    main(["evaluate", str(pruned), *SMALL, "--output", str(out), "--overwrite", "true", "--latency", "false"])
    again = json.loads((out / "evaluation.json").read_text())
    assert again["latency"] is None and again["evaluation"]["pruned"] == evaluation["pruned"]


def test_figures_equal_those_of_the_report(pruned, pipe_folder):
    """The same prompts and seeds, measured by the command's function and by the run itself."""
    report = json.loads((pruned / "report.json").read_text())["evaluation"]
    found = obsdiff.evaluate(
        obsdiff.load_pipeline(pruned),
        obsdiff.load_pipeline(pipe_folder),
        what="pruned",
        num_images=report["n"],
        seed=report["first_seed"],
        latency=False,
    )["evaluation"]
    for name, value in report["pruned"].items():
        assert found["pruned"][name] == pytest.approx(value, rel=1e-5), name


def test_without_a_dense_pipeline_only_the_rest_is_measured(pruned, capsys):
    main(["evaluate", str(pruned), *SMALL, "--against", "none"])
    said = capsys.readouterr().out
    assert "alignment" in said and "MSE" not in said and "latency" not in said


@pytest.mark.slow
def test_other_programs_score(pruned, tmp_path, capsys):
    program = tmp_path / "score.py"
    program.write_text(
        "import json, pathlib, sys\n"
        "rows = [json.loads(line) for line in open(pathlib.Path(sys.argv[-1]) / 'metadata.jsonl')]\n"
        "assert all((pathlib.Path(sys.argv[-1]) / row['file_name']).stat().st_size for row in rows)\n"
        "print('loading')\nprint([len(row['prompt']) for row in rows])\n"
    )
    found = obsdiff.evaluate(
        obsdiff.load_pipeline(pruned), num_images=3, scorers={"reward": f"{sys.executable} {program}"}
    )
    lengths = [len(prompt) for prompt in found["prompts"]]
    assert found["evaluation"]["evaluated"]["reward"] == pytest.approx(sum(lengths) / 3)
    program.write_text("print([1, 2])")
    command = json.dumps({"reward": f"{sys.executable} {program}"})
    assert "JSON list of 3 numbers" in refused(capsys, pruned, *SMALL, "--scorers", command)
    program.write_text("raise SystemExit('no weights')")
    assert "failed with 1: no weights" in refused(capsys, pruned, *SMALL, "--scorers", command)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--evaluation.measures", "[fid]"], "evaluation.measures names 'fid'; choose one of mse, ssim"),
        (["--evaluation.measures", "[mse@clip]"], "mse is measured without a named network"),
        (
            ["--scorers", "{reward: nowhere/python score.py}"],
            "scorer reward: there is no program nowhere/python to run",
        ),
        (["--scorers", '{reward: "\'open"}'], "is no command"),
        (["--scorers", "{mse: python}"], "a scorer cannot be called 'mse'"),
        (["--overwrite", "true"], "name its folder with --output"),
        (["--output", "new", "--images", "new/images"], "--images new/images is inside --output new"),
        (["--evaluation.real", "photos"], "nothing is compared with it"),
        (["--evaluation.measures", "[frechet@vgg]"], "one of inception"),
        (["--evaluation.measures", "[mse,mse]"], "mse twice"),
        (["--evaluation.extractors", "{vgg: here}"], "evaluation.extractors names 'vgg'"),
        (["--evaluation.num_images", "0"], "evaluation.num_images is 0"),
        (["--against", "nowhere/at/all"], "nowhere/at/all"),
        (["--evaluation.prompts", "missing.txt"], "missing.txt not found"),
    ],
)
def test_mistakes_are_one_line(pruned, capsys, args, said):
    err = refused(capsys, pruned, "--device", "cpu", *args)
    assert said in err and len(err.strip().splitlines()) == 1


def test_images_lie_as_benchmarks_want_them(pruned, tmp_path, capsys):
    prompts = ["a digit one", "a digit two"]
    records = [{"tag": "single_object", "include": [{"class": "one"}], "prompt": prompt} for prompt in prompts]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = [*SMALL, "--against", "none", "--layout", "geneval"]
    known = ["--evaluation.prompts", str(tmp_path / "evaluation_metadata.jsonl"), "--evaluation.column", "prompt"]
    main(["evaluate", str(pruned), *asked, *known, "--images", str(tmp_path / "geneval")])
    found = {str(file.relative_to(tmp_path / "geneval")) for file in (tmp_path / "geneval").rglob("*.*")}
    assert found == {
        "images.json", "00000/metadata.jsonl", "00000/samples/0000.png", "00000/samples/0001.png",
        "00001/metadata.jsonl", "00001/samples/0000.png",
    }  # fmt: skip
    assert json.loads((tmp_path / "geneval" / "00001" / "metadata.jsonl").read_text()) == records[1]
    table = (
        "item_id,text,proposition_id\n7,a digit one,1\n7,a digit one,2\n9,a digit two,1\n"  # a row for each question
    )
    (tmp_path / "dpg_bench.csv").write_text(table)
    known = ["--evaluation.prompts", str(tmp_path / "dpg_bench.csv"), "--evaluation.column", "text"]
    asked = ["--against", "none", "--layout", "dpg", "--device", "cpu"]
    err = refused(capsys, pruned, *asked, *known, "--evaluation.num_images", "5", "--images", tmp_path / "dpg")
    assert "4 images of each prompt" in err
    main(["evaluate", str(pruned), *asked, *known, "--evaluation.num_images", "8", "--images", str(tmp_path / "dpg")])
    assert sorted(file.name for file in (tmp_path / "dpg").iterdir()) == ["7.png", "9.png", "images.json"]
    assert Image.open(tmp_path / "dpg" / "7.png").size == (2 * 16, 2 * 16)
    assert "name it with --images" in refused(capsys, pruned, "--layout", "dpg")
    assert "unknown layout 'grid'" in refused(capsys, pruned, *SMALL, "--layout", "grid", "--images", tmp_path / "x")
    assert "geneval needs" in refused(capsys, pruned, *SMALL, "--layout", "geneval", "--images", tmp_path / "x")


def test_the_function_refuses_what_the_command_refuses(pruned):
    pipe = obsdiff.load_pipeline(pruned)
    for wrong, said in (
        ({"measures": ["fid"]}, "evaluation.measures names 'fid'"),
        ({"batch_size": 0}, "evaluation.batch_size"),
        ({"what": "mine"}, "what is 'mine'; choose one of recovered, pruned, evaluated"),
        ({"scorers": {"reward": "nowhere/python"}}, "there is no program"),
    ):
        with pytest.raises(UserError, match=said):
            obsdiff.evaluate(pipe, **wrong)


def test_lines_of_a_benchmark_that_do_not_parse_are_passed_over(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text('\ufeff{"prompt": "a", "tag": "x"}\n{broken\n{"prompt": 3}\n[1]\n', encoding="utf-8")
    assert check_layout("geneval", ["a"], str(file)) == {"a": {"prompt": "a", "tag": "x"}}
    with pytest.raises(UserError, match="says nothing of 'b'"):
        check_layout("geneval", ["b"], str(file))
