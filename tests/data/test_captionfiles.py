"""Caption files are text: encodings, quotes, rows that do not parse, and values that look like something else."""

import warnings

import pyarrow
import pyarrow.parquet
import pytest

from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError

ODD = ["NA", "null", "None", "nan", "1", "1.50", "007", "true", "2:4", "a dog", "#hash", "-"]


def load(path, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_prompts(str(path), *args)


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_no_types_are_guessed(tmp_path, kind):
    path = tmp_path / f"p.{kind}"
    lines = [f'{{"caption": "{text}"}}' for text in ODD] if kind == "jsonl" else ODD
    head = ["caption"] if kind in ("csv", "tsv") else []
    path.write_text("\n".join([*head, *lines]) + "\n")
    assert load(path) == ODD


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "csv"])
def test_encodings_follow_the_byte_order_mark(tmp_path, kind, encoding):
    path = tmp_path / f"p.{kind}"
    text = ("caption\r\n" if kind == "csv" else "") + "eine Möwe\r\n猫\r\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_bytes((mark + text).encode(encoding))
    assert load(path) == ["eine Möwe", "猫"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9\n", "no UTF-8 text: byte 3 "),
        ("a cat\n".encode("utf-16-le"), "no text file: byte 1 is zero"),
        (b"\xff\xfea\x00b", "no UTF-16-LE text: byte 4 "),
        (b"\x89PNG\r\n\x1a\n\0\0", "byte 0 "),
        (b"a cat\0\n", "byte 5 is zero"),
        (b"", "holds no prompts"),
    ],
)
def test_what_is_no_text_is_refused_with_its_byte(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_lines_end_at_line_ends_only(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("a\u2028b\x0bc\x85d\re\r\nf\n".encode())
    assert load(path) == ["a\u2028b\x0bc\x85d", "e", "f"]


def test_quotes_as_the_format_says(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('id,caption\n1,"a dog, sitting"\n2,"a ""big"" cat"\n3,"two\nlines"\n4,it is 5" tall\n')
    assert load(path) == ["a dog, sitting", 'a "big" cat', "two\nlines", 'it is 5" tall']
    path = path.with_suffix(".tsv")
    path.write_text('id\tcaption\n1\ta dog, sitting\n2\t"a\ttab"\n')
    assert load(path) == ["a dog, sitting", "a\ttab"]


def test_few_rows_that_do_not_parse_are_named_and_left_out(tmp_path):
    path = tmp_path / "p.csv"
    rows = [f"{i},caption {i}" for i in range(100)]
    rows[7], rows[50], rows[60] = "7,a dog, sitting", "50", '60,"a" dog'
    path.write_text("\n".join(["id,caption", *rows]))
    with pytest.warns(UserWarning, match=r"3 of 101 lines do not parse .*: 9, 52, 62; they are left out"):
        found = load_prompts(str(path))
    assert found == [f"caption {i}" for i in range(100) if i not in (7, 50, 60)]


@pytest.mark.parametrize(
    "content",
    [
        "caption\na cat\na dog, sitting\na horse, a cow\n",
        "id,caption\n1,a dog, sitting\n",
        'caption\na cat\n"a dog\n' + "a horse\n" * 30,
        "id,caption\n1\n",
    ],
)
def test_text_is_never_cut_without_a_word(tmp_path, content):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"lines do not parse .*double quotes"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"caption\n', "the header does not parse"),
        ("caption,caption\na,b\n", "2 columns called 'caption'"),
        ("id;caption\n1;a\n", "no column 'caption'; its columns are id;caption"),
        ("caption\n", "holds no prompts"),
    ],
)
def test_tables_without_captions(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load(path)


def test_json_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"a cat"\n\n["a dog", "a puppy"]\n{"text": "a horse", "n": 3}\n')
    assert load(path) == ["a cat", "a dog", "a puppy", "a horse"]
    good = "".join(f'{{"words": "w{i}"}}\n' for i in range(60))
    path.write_text(good + '{"words": 3}\n{"words": \n')
    with pytest.warns(UserWarning, match="2 of 63 lines do not parse .*: 61, 62"):
        assert load_prompts(str(path), "words") == [f"w{i}" for i in range(60)]
    with pytest.raises(UserError, match="no column 'nothing'"):
        load_prompts(str(path), "nothing")
    path.write_text('{"words": 3}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match="2 of 3 lines do not parse"):
        load_prompts(str(path), "words")


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_columns_hold_text_or_lists_of_it(tmp_path):
    path = parquet(
        tmp_path / "p.parquet",
        text=["NA", "7"],
        several=[["a", "b", None], ["c"]],
        words=pyarrow.array(["x", "y"]).dictionary_encode(),
        number=[1, 2],
        mapping=[{"a": 1}, {"a": 2}],
        numbers=[[1], [2]],
    )
    assert load(path) == ["NA", "7"]
    assert load(path, "several") == ["a", "b", "c"] and load(path, "words") == ["x", "y"]
    for column, kind in (("number", "int64"), ("mapping", "struct"), ("numbers", "list")):
        with pytest.raises(UserError, match=rf"column '{column}' of .* holds {kind}.*, not text"):
            load(path, column)


def test_captions_that_no_tokenizer_takes_are_left_out_and_counted(tmp_path):
    path = parquet(tmp_path / "p.parquet", caption=["a cat", None, "", "a\0b", "x" * 100_001])
    with pytest.warns(UserWarning, match="4 of 5 rows .* hold no caption"):
        assert load_prompts(str(path)) == ["a cat"]
    text = tmp_path / "p.txt"
    text.write_text("a cat\n\n" + "x" * 100_001)
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert load_prompts(str(text)) == ["a cat"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('"a cat"\n"\\ud800"\n')
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert load_prompts(str(rows)) == ["a cat"]


def test_a_dataset_column_that_is_no_text_is_refused(monkeypatch):
    import datasets

    labels = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"label": [0, 1]}, features=labels)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    with pytest.raises(UserError, match="column 'label' of owner/name holds int64, not text"):
        load_prompts("owner/name", "label")


def test_places_that_are_no_files(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for source, message in (
        (tmp_path / "folder.txt", "it is a folder"),
        (tmp_path / ("x" * 300 + ".txt"), "File name too long"),
        ("/dev/null", "a folder or a device"),
        ("a\0b.txt", "not found"),
        ("", "not found"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_prompts(str(source))
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_numbers_out_of_range():
    for options in ({"num": 0}, {"num": 2.5}, {"num": True}, {"seed": -1}, {"seed": 2**63}, {"num": 2, "seed": 1.0}):
        with pytest.raises(UserError, match=r"the (number|seed) of (the )?prompts is"):
            load_prompts("digits-train", **options)
