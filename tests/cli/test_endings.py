"""How commands end: one line and an exit code for what the user can mend, and for Ctrl-C; a traceback for defects."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader

from obsdiff.cli.main import main
from obsdiff.cli.parse import clear_errors, instantiating
from obsdiff.errors import UserError
from tests.cli.test_commands import ROOT, refused


class MisconfigurationException(Exception):
    """Of the name that Lightning gives its own."""


def ending(capsys, error, kept=None):
    """Exit code and message of a command that ``error`` ends."""
    with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x") as session:
        session.kept = kept
        raise error
    [line] = capsys.readouterr().err.splitlines()
    return stopped.value.code, line.removeprefix("obsdiff x: ")


def test_user_errors_are_one_line_wherever_they_were_raised(capsys):
    assert ending(capsys, UserError("two\n lines")) == (2, "two lines")
    wrapped = RuntimeError("70 lines")
    wrapped.__cause__ = ValueError("of a parser")
    wrapped.__cause__.__cause__ = UserError("the cause")
    assert ending(capsys, wrapped) == (2, "the cause")
    text = "\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File ...\n"
    spawned = ProcessRaisedException(text + "obsdiff.errors.UserError: of a process\n", 1, 1)
    assert ending(capsys, spawned) == (2, "of a process")
    assert ending(capsys, MisconfigurationException("no GPU\nhere")) == (2, "no GPU here")
    assert ending(capsys, OSError(36, "File name too long", "xxx")) == (2, "xxx: File name too long")


def test_defects_keep_their_traceback():
    unrelated = RuntimeError("a defect")
    unrelated.__context__ = UserError("handled before")
    for error in (unrelated, KeyError("x"), OSError("no file"), ValueError("x")):
        with pytest.raises(type(error)), clear_errors("obsdiff x"):
            raise error


class Broken:
    """A data set that the user can mend."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError(f"image {index} is broken;\nremove it")


@pytest.mark.filterwarnings("ignore")
def test_user_errors_of_data_workers(capsys):
    with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x"):
        list(DataLoader(Broken(), num_workers=1))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["obsdiff x: image 0 is broken; remove it"]


def test_ctrl_c_is_one_line_and_says_what_is_kept(capsys):
    assert ending(capsys, KeyboardInterrupt()) == (130, "interrupted")
    assert ending(capsys, KeyboardInterrupt(), lambda: "all is kept") == (130, "interrupted; all is kept")
    with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x"):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does
    assert stopped.value.code == 130 and capsys.readouterr().err == "obsdiff x: interrupted\n"
    with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x"):
        sys.exit(7)
    assert stopped.value.code == 7


def test_sigterm_ends_like_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x") as session:
        session.kept = lambda: "all is kept"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.code == 143 and capsys.readouterr().err == "obsdiff x: terminated; all is kept\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_constructors_refuse_is_the_users_to_mend():
    for error, message in [
        (UserError("ours"), "ours"),
        (ValueError("bad\nvalue"), "bad value"),
        (TypeError("bad type"), "bad type"),
        (MisconfigurationException("theirs"), "theirs"),
        (
            ValueError("Does not validate against any\n  - Invalid decay\n  - Expected a None\nGiven value: x"),
            "Invalid decay",
        ),
    ]:
        with pytest.raises(UserError, match=f"^{message}$"), instantiating():
            raise error
    with pytest.raises(KeyError), instantiating():
        raise KeyError("a defect")


def test_a_process_that_torchrun_ends_says_why_it_failed_itself(capsys):
    """What fails first lets go of the others; torchrun sees one of these end, and ends the first as it tidies up."""
    gone = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:4229")
    lost = "another process of this run has ended (its own line says why, unless it was killed); all is kept"
    for error, code, message in ((UserError("why"), 2, "why"), (gone, 1, lost)):
        for signalled in (False, True):
            with pytest.raises(SystemExit) as stopped, clear_errors("obsdiff x") as session:
                session.kept = lambda: "all is kept"
                try:
                    raise error
                finally:
                    if signalled:
                        os.kill(os.getpid(), signal.SIGTERM)
                        time.sleep(5)
            assert stopped.value.code == code and capsys.readouterr().err == f"obsdiff x: {message}\n"
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    wrapped = ValueError("of Lightning")
    wrapped.__cause__ = gone
    assert ending(capsys, wrapped, lambda: "all is kept") == (1, lost)


TRAIN = ["train", "fit", "--config", str(ROOT / "configs/recover/finetune.yaml"), "--model.output"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.optimization.schedule", "foo"], "unknown schedule 'foo'; choose cosine or constant"),
        (["--model.optimization.lr", "abc"], "--model.optimization.lr is 'abc'; give a number"),
        (
            ["--model.optimisation.lr", "1"],
            "unknown option --model.optimisation.lr; did you mean --model.optimization?",
        ),
        (["--trainer.max_stps", "1"], "unknown option --trainer.max_stps; did you mean --trainer.max_steps?"),
        (["--model", "Foo"], "--model is 'Foo'; give the full path of a class that fits"),
        (["--trainer.accelerator", "foo"], "You selected an invalid accelerator name: `accelerator='foo'`."),
        (["--ema.decay", "5"], "ema.decay is 5; it must be at least 0 and below 1"),
        (["--budget.steps", "-1"], "budget.steps is -1; it must be a positive number"),
        (["--seed_everything", "1" + "0" * 30], "is not in bounds"),
        (["--model.pipeline", "nowhere"], "unknown pipeline 'nowhere'"),
        (["--model.pruning.seed", "1" + "0" * 30], "it must be a whole number from 0 to 2^63 - 1"),
        (["--model.seed", "-1"], "model.seed is -1"),
        (["--trainer.max_steps", "0"], "trainer.max_steps is 0"),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt does not exist"),
        (["--ckpt_path", ""], "ckpt_path is empty"),
    ],
)
def test_mistakes_in_training(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert message in refused(capsys, *TRAIN, tmp_path / "out", *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + bytes(100), b"\x80\x02]q\x00."])
def test_damaged_checkpoints(capsys, tmp_path, monkeypatch, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert f"checkpoint {path} is damaged" in refused(capsys, *TRAIN, tmp_path / "out", "--ckpt_path", path)


@pytest.mark.parametrize("sub", ["fit", "predict"])
def test_patterns_of_training_need_no_quotes(tmp_path, monkeypatch, sub):
    from obsdiff.cli.train import command_line

    class Parsed(command_line()):
        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

    monkeypatch.setattr(sys, "argv", ["train.py"])
    config = tmp_path / "c.yaml"
    text = (ROOT / "configs/recover/finetune.yaml").read_text().replace("unstructured:0.9", "4:8")
    config.write_text(text)
    for more, pattern in [([], "4:8"), (["--model.pruning.pattern", "2:4"], "2:4"),
                          (["--model.pruning.limits.choices", "[dense,2:4]"], "4:8")]:  # fmt: skip
        built = Parsed(args=[sub, "--config", str(config), *more])
        pruning = built.config[sub].model.init_args.pruning
        assert pruning.pattern == pattern and pruning.limits.choices in ([], ["dense", "2:4"])
    assert pruning.limits.choices == ["dense", "2:4"]


@pytest.mark.slow
def test_ctrl_c_in_training_names_the_checkpoint(capsys, tmp_path, monkeypatch):
    from obsdiff.callbacks.budget import Budget

    def stop(self, trainer, *args):
        if trainer.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Budget, "on_train_batch_start", stop, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    before = signal.getsignal(signal.SIGINT)
    quick = ["--model.pruning.method", "magnitude", "--model.evaluation.num_images", "0", "--data.batch_size", "4"]
    try:
        with pytest.raises(SystemExit) as stopped:
            main([*TRAIN, str(tmp_path / "out"), *quick])
    finally:
        signal.signal(signal.SIGINT, before)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("obsdiff")]
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert stopped.value.code == 130 and checkpoint.is_file()
    assert line.startswith(f"obsdiff train: interrupted; the last checkpoint is {checkpoint}; go on with")


@pytest.mark.slow
def test_ctrl_c_in_pruning(pipe_folder, tmp_path):
    """The real signal to a real process."""
    command = [
        sys.executable,
        str(ROOT / "prune.py"),
        "--pipeline",
        str(pipe_folder),
        "--output",
        str(tmp_path / "out"),
        "--calibration.num_prompts",
        "4000",
        "--evaluation.num_images",
        "0",
    ]
    # a shell starts what runs in the background deaf to Ctrl-C, and this suite may run there
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    said = ""
    while "calibration:" not in said:
        said += process.stderr.readline()
        assert process.poll() is None, said
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    line = f"obsdiff prune: interrupted; nothing was written to {tmp_path / 'out'}"
    assert line in said and list(tmp_path.iterdir()) == []


def test_what_an_interrupted_prune_keeps(capsys, pipe_folder, tmp_path, monkeypatch):
    from obsdiff.export import run

    store = tmp_path / "store"

    def stop(*args, **kwargs):
        store.mkdir()
        (store / "statistics.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prune_run", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--pipeline", str(pipe_folder), "--output", str(tmp_path / "out"), "--statistics", str(store)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"obsdiff prune: interrupted; nothing was written to {tmp_path / 'out'}; what was measured is kept in {store}, "
        "the same command goes on from there"
    )
