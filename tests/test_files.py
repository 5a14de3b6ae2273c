"""Files appear whole or not at all; nothing that is not ours is ever replaced or removed."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from obsdiff import files
from obsdiff.errors import UserError
from obsdiff.files import (
    check_apart,
    check_folder,
    check_space,
    check_writable,
    read_json,
    remove_folder,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)

INDEX = "index.json"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def make(target, text="new", replace=False):
    with whole_folder(target, INDEX, replace=replace) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "data.txt").write_text(text)
        write_json(folder / INDEX, {"kind": "test"})


def dead_process():
    """The number of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    return int(done.stdout)


# ---- files


def test_a_file_replaces_the_one_before_only_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b.txt"
    write_text(target, "first")
    with pytest.raises(RuntimeError), whole_file(target) as temporary:
        assert temporary.parent == target.parent  # renaming is then never a copy between disks
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first" and names(tmp_path / "a") == ["b.txt"]
    write_text(target, "second")
    assert target.read_text() == "second" and names(tmp_path / "a") == ["b.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_full_disk_is_one_line_and_keeps_the_file_before(tmp_path):
    from safetensors import SafetensorError

    write_text(tmp_path / "x", "before")
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")):
        with pytest.raises(UserError, match=r"cannot write .*x: .*No space left") as caught, whole_file(tmp_path / "x"):
            raise error
        assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "x").read_text() == "before" and names(tmp_path) == ["x"]


def test_files_behind_a_link_are_replaced_where_they_are(tmp_path):
    write_text(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_write_that_was_killed_makes_no_folder_somebody_elses(tmp_path):
    """Found by killing streamed prunes at random moments: the next start was refused."""
    folder = tmp_path / "kept"
    folder.mkdir()
    index = folder / f".index.json.{files._HOST}-{dead_process()}-abc.part"
    index.write_text("{")
    check_folder(folder, "index.json", "parts", replace=True)
    assert not index.exists()
    write_json(folder / "index.json", {files.FILES: ["index.json", "000.safetensors"]})
    part = folder / f".000.safetensors.{files._HOST}-{dead_process()}-abc.part"
    part.write_text("half")
    check_folder(folder, "index.json", "parts", replace=True)
    assert not part.exists() and (folder / "index.json").exists()
    for name in (
        f".000.safetensors.{files._HOST}-{os.getpid()}-abc.part",
        f".mine.{files._HOST}-{dead_process()}-abc.part",
    ):
        (folder / name).write_text("half")
        with pytest.raises(UserError, match="1 file that it did not write"):
            check_folder(folder, "index.json", "parts", replace=True)
        (folder / name).unlink()


@pytest.mark.parametrize("kind", ["part", "old"])
def test_what_killed_processes_left_goes_with_the_next_write(tmp_path, kind):
    make(tmp_path / "out")
    gone = f".out.{files._HOST}-{dead_process()}-abc.{kind}"
    (tmp_path / "out").rename(tmp_path / gone)  # a whole folder of ours under a dead writer's temporary name
    running = tmp_path / f".out.{files._HOST}-{os.getpid()}-abc.part"
    elsewhere = tmp_path / ".out.00000000-1-abc.part"
    abandoned = tmp_path / ".out.00000000-2-abc.part"
    others = (tmp_path / ".out.notes", tmp_path / ".outer.txt", tmp_path / ".out.12345678-x-abc.part")
    for path in (running, elsewhere, abandoned, *others):
        path.write_text("keep")
    os.utime(abandoned, (time.time() - 2 * files._ABANDONED_S,) * 2)
    make(tmp_path / "out", "again", replace=True)
    assert not (tmp_path / gone).exists() and not abandoned.exists()
    assert all(path.read_text() == "keep" for path in (running, elsewhere, *others))
    assert (tmp_path / "out" / "inner" / "data.txt").read_text() == "again"


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    """Killed between the two renames of a replacement."""
    make(tmp_path / "out", "finished")
    (tmp_path / "out").rename(tmp_path / f".out.{files._HOST}-{dead_process()}-abc.old")
    files.remove_leftovers(tmp_path / "out", INDEX)
    assert (tmp_path / "out" / "inner" / "data.txt").read_text() == "finished" and names(tmp_path) == ["out"]


def test_killed_in_the_middle_of_a_write_the_file_before_stays_and_the_rest_is_cleaned(tmp_path):
    target = tmp_path / "x.txt"
    write_text(target, "before")
    code = (
        "import os, signal, sys; from pathlib import Path; from obsdiff.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert target.read_text() == "before" and len(names(tmp_path)) == 2
    write_text(target, "after")
    assert target.read_text() == "after" and names(tmp_path) == ["x.txt"]


# ---- folders


def test_a_folder_lists_its_files_and_only_then_is_replaced(tmp_path):
    target = tmp_path / "out"
    make(target, "one")
    assert read_json(target / INDEX, "")["files"] == [INDEX, "inner/data.txt"]
    with pytest.raises(UserError, match="already; choose another place or pass --overwrite true"):
        make(target, "two")
    assert (target / "inner" / "data.txt").read_text() == "one"
    make(target, "two", replace=True)
    assert (target / "inner" / "data.txt").read_text() == "two" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["thesis.txt", "inner/thesis.txt", "deep/er/thesis.txt"])
def test_a_users_own_file_in_a_folder_of_ours_stops_its_replacement(tmp_path, where):
    make(tmp_path / "out")
    own = tmp_path / "out" / where
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("precious")
    for refuse in (
        lambda: check_folder(tmp_path / "out", INDEX, "a run", replace=True),
        lambda: make(tmp_path / "out", "two", replace=True),
    ):
        with pytest.raises(UserError, match=f"1 file that it did not write, such as {where}"):
            refuse()
    assert own.read_text() == "precious" and (tmp_path / "out" / "inner" / "data.txt").read_text() == "new"


@pytest.mark.parametrize("index", [None, "", "{}", '{"files": null}', '{"files": ["a"]}', "[1]", '{"files": 3}'])
def test_a_folder_without_a_list_that_covers_it_is_left_alone(tmp_path, index):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    if index is not None:
        (tmp_path / "out" / INDEX).write_text(index)
    before = names(tmp_path / "out")
    with pytest.raises(UserError, match="out"):
        make(tmp_path / "out", replace=True)
    remove_folder(tmp_path / "out", INDEX)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
    assert set(names(tmp_path / "out")) <= set(before) and names(tmp_path) == ["out"]


def test_removing_a_folder_never_reaches_outside_it(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    make(tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text(json.dumps({"files": [INDEX, "inner/data.txt", "../mine.txt"]}))
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    remove_folder(tmp_path / "out", INDEX)
    assert (tmp_path / "mine.txt").read_text() == "keep" and names(tmp_path / "out") == ["link"]


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path):
    """Outputs on a larger disk, say."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    make(tmp_path / "link", "one")
    make(tmp_path / "link", "two", replace=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "inner" / "data.txt").read_text() == "two"
    assert names(tmp_path) == ["disk", "link"]


def test_a_file_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="is not a folder"):
        check_folder(tmp_path / "file", INDEX, "a run", replace=True)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert (tmp_path / "empty" / INDEX).is_file()


def test_a_failing_swap_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="Input/output error"):
        make(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "inner" / "data.txt").read_text() == "old" and names(tmp_path) == ["out"]


# ---- checks before any work


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deep", tmp_path)
    with pytest.raises(UserError, match=r"cannot write .*out"):
        check_writable(tmp_path / "file" / "out")
    for length in (300, 250):  # the second alone could be written, its temporary name could not
        with pytest.raises(UserError, match="File name too long"):
            check_writable(tmp_path / ("x" * length))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        check_writable(tmp_path / "out")
    assert names(tmp_path) == ["file"]


def test_a_mounted_disk_is_no_folder_to_replace(tmp_path, monkeypatch):
    """As a volume of a container: its root cannot be renamed, which would be found at the end of a run."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="choose a folder inside it"):
        check_folder(tmp_path, INDEX, "a run", replace=True)
    check_folder(tmp_path / "inside", INDEX, "a run", replace=True)


def test_folders_in_one_another(tmp_path):
    check_apart(output=tmp_path / "a", statistics=tmp_path / "b", sensitivity=None)
    check_apart(output=tmp_path / "a", statistics=tmp_path / "ab")
    with pytest.raises(UserError, match=r"--output .* is the same as --statistics"):
        check_apart(output=tmp_path / "a", statistics=tmp_path / "b" / ".." / "a")
    for statistics in ("a/stats", "a/../a/deep/er"):
        with pytest.raises(UserError, match=r"--statistics .* is inside --output"):
            check_apart(output=tmp_path / "a", statistics=tmp_path / statistics)
    with pytest.raises(UserError, match=r"--output .* is inside --statistics"):
        check_apart(output=tmp_path / "a" / "out", statistics=tmp_path / "a")


def test_a_disk_that_is_too_small(tmp_path):
    check_space(tmp_path / "new" / "out", 1)
    with pytest.raises(UserError, match="takes about 1,073,741,824,000,000 MiB"):
        check_space(tmp_path / "new" / "out", 2**50 * 10**6)


# ---- reading


class Schema(BaseModel):
    count: int
    layers: dict[str, list[int]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a thing"),
        ("{", "is not a thing"),
        ("[" * 100_000, "is not a thing"),
        ("1" * 5000, "is not a thing"),
        ('{"count": NaN}', "NaN is not JSON"),
        ("[]", "its content"),
        ('{"count": 1}', "layers: Field required"),
        ('{"count": "1", "layers": {}}', "count: Input should be a valid integer"),
        ('{"count": 1, "layers": {"a": [1, "b"]}}', "layers.a.1"),
        ('{"count": 1, "layers": {"a": null}}', "layers.a"),
    ],
)
def test_json_that_is_something_else_is_one_line(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_json(tmp_path / "x.json", "a thing", Schema)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


def test_json_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path, said in ((tmp_path, "cannot read"), (tmp_path / "none", "not found"), (tmp_path / "binary", "is not a")):
        with pytest.raises(UserError, match=said):
            read_json(path, "a thing")
    with pytest.raises(UserError, match="File name too long"):
        read_json(Path("x" * 300), "a thing")
    (tmp_path / "good.json").write_text('{"count": 2, "layers": {"a": [1]}, "more": 3}')
    assert read_json(tmp_path / "good.json", "a thing", Schema) == {"count": 2, "layers": {"a": [1]}, "more": 3}
