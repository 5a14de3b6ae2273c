"""What a training command shows while it works, leaves in its logs, and says at its end."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from obsdiff import progress
from obsdiff.callbacks.progress import BudgetProgress
from obsdiff.cli.main import main
from tests.training.common import arguments, fit, fit_elsewhere

MEASURED = "--model.pruning.allocation=measured"
SHOWN = ("--trainer.enable_progress_bar=true", "--trainer.enable_model_summary=true")


@pytest.fixture(scope="module")
def said(pipe_folder, tmp_path_factory):
    """Output and what standard output and error got of a run of six steps with validations every two."""
    import contextlib
    import io

    output, out, err = tmp_path_factory.mktemp("said") / "run", io.StringIO(), io.StringIO()
    extra = ("--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(progress, "FIRST_S", 0.0)  # a line for each update,
        patch.setattr(progress, "LONGEST_S", 0.0)  # however long a step took before
        patch.setattr("obsdiff.callbacks.progress.REFRESH_S", 0.0)
        fit(pipe_folder, output, *SHOWN, *extra, MEASURED, steps=6)
    return output, out.getvalue(), err.getvalue()


def test_a_run_says_first_what_it_will_do(said, pipe_folder):
    output, _, err = said
    first = err.splitlines()[:4]
    assert first[0] == (
        f"recovery: prune {pipe_folder} to unstructured:0.5 by obs, then train on 1 x distill_output "
        "(cosine learning rate from 0.001); budget 6 steps"
    )
    assert f"the result will lie in {output / 'recovered'}" in first
    assert re.search(r"^calibration: 4 prompts x 3 steps", err, re.M)
    assert re.search(r"^training: [\d,]+ of [\d,]+ parameters", err, re.M)


def test_training_is_counted_in_steps_of_the_budget(said):
    _, _, err = said
    lines = [line for line in err.splitlines() if line.startswith("training ")]
    form = re.compile(r"training (\d)/6 steps, (\d+)%(?:, loss [\d.e-]+)?, [\d.]+ s(, about .* left)?")
    found = [form.fullmatch(line) for line in lines]
    assert all(found), lines
    steps = [int(match[1]) for match in found]
    assert steps == sorted(steps) and steps[-1] == 6 and {2, 3, 4} <= set(steps)
    assert all(int(match[2]) == round(100 * int(match[1]) / 6) for match in found)
    assert "Epoch" not in err


def test_each_validation_is_one_line(said):
    _, _, err = said
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert all(re.search(r"MSE to dense [\d.e-]+, alignment [\d.]+%, Fréchet [\d.]+ \(measured in", x) for x in lines)


def test_the_end_sums_it_up(said):
    output, out, _ = said
    report = json.loads((output / "recovered" / "report.json").read_text())
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert list(rows) == ["recovered", "parameters", "MSE to dense", "alignment", "Fréchet", "budget", "time", "result"]
    assert rows["recovered"].endswith("unstructured:0.5 by obs, sparsity 50.00%, 6 steps")
    before, after = (report["evaluation"][stage]["mse"] for stage in ("pruned", "recovered"))
    assert rows["MSE to dense"].startswith(f"{before:.3g} -> {after:.3g} (95% ") and "2 images" in rows["MSE to dense"]
    assert rows["budget"] == "6 of 6 steps"
    assert rows["result"].startswith(str(output / "recovered"))
    assert re.match(r"[\d.]+ s \(.*allocating .*training .*\), peak memory", rows["time"])


def test_libraries_are_quiet(said):
    _, _, err = said
    ours = (
        "recovery: ",
        "evaluation: ",
        "calibration: ",
        "sensitivity scan: ",
        "training: ",
        "step ",
        "the result will ",
    )
    work = ("calibrating ", "scanning ", "solving ", "training ", "sampling ")
    rest = [line for line in err.splitlines() if not line.startswith((*ours, *work)) and "it/s]" not in line]
    [plan] = [line for line in rest if line]  # (tqdm's bars are turned off when it is imported, here too early)
    assert "measured allocation" in plan


def test_tensorboard_gets_rate_and_budget(said):
    output, _, _ = said
    events = EventAccumulator(str(output / "logs"))
    events.Reload()
    used = [event.value for event in events.Scalars("budget/used")]
    assert used == pytest.approx([i / 6 for i in range(1, 7)])
    assert [event.value for event in events.Scalars("budget/steps")] == [1, 2, 3, 4, 5, 6]
    rates = [event.value for event in events.Scalars("lr-AdamW")]
    assert rates[0] == pytest.approx(1e-3) and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.5e-3
    assert len(events.Scalars("grad_norm")) == 6


def test_time_budgets_are_shown_as_a_share():
    from types import SimpleNamespace

    from obsdiff.callbacks.budget import Budget
    from obsdiff.callbacks.progress import used_of_budget

    module = SimpleNamespace(budget_fraction=0.25)

    def shown(**limits):
        trainer = SimpleNamespace(
            global_step=1234, callbacks=[Budget(**limits)], estimated_stepping_batches=float("inf")
        )
        return used_of_budget(trainer, module)

    assert shown(wall_s=100) == (0.25, 1.0, "1,234 steps")
    assert shown(wall_s=100, steps=5000) == (0.25, 1.0, "1,234 steps")
    assert shown(steps=5000) == (1234, 5000, "1,234/5,000 steps")
    assert shown() == (1234, float("inf"), "1,234 steps")


def test_validate_and_predict_say_what_they_found(said, pipe_folder, capsys):
    output, _, _ = said
    args = arguments(pipe_folder, output, MEASURED)
    main(["train", "validate", *args, "--ckpt_path=last"])
    shown = capsys.readouterr().out
    assert shown.startswith("evaluated") and "MSE to dense  " in shown and "2 images" in shown
    assert "Validate metric" not in shown
    main(["train", "predict", *args, "--ckpt_path=last"])
    shown = capsys.readouterr().out
    assert re.search(r"^drawn   2 images", shown) and f"{output / 'predictions' / '00000.png'} to 00001.png" in shown


def test_a_bar_that_is_turned_off_or_brought_is_respected():
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ProgressBar, RichModelSummary, RichProgressBar

    from obsdiff.cli.train_session import own_looks

    def bars(given=(), **options):
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=list(given), **options)
        own_looks(trainer, list(given))
        return [type(part) for part in trainer.callbacks if isinstance(part, (ProgressBar, RichModelSummary))]

    assert bars(enable_model_summary=False) == [BudgetProgress]
    assert bars(enable_progress_bar=False, enable_model_summary=False) == []
    assert bars([RichProgressBar(), RichModelSummary()]) == [RichProgressBar, RichModelSummary]


@pytest.mark.slow
def test_the_command_itself_is_short(said, pipe_folder):
    """In a process of its own, with Lightning's bar and table as they are by default, and nothing left to do."""
    output, _, _ = said
    args = [arg for arg in arguments(pipe_folder, output, MEASURED) if "enable_" not in arg]
    done = fit_elsewhere("fit", *args, "--ckpt_path=last")
    assert done.stderr == ""
    assert done.stdout.startswith("finished: ") and len(done.stdout.splitlines()) == 9
