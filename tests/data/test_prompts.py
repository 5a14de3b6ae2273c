import csv

import pyarrow
import pyarrow.parquet
import pytest

from obsdiff.data.prompts import load_prompts
from obsdiff.embedded.digits import DIGIT_WORDS, HELD_OUT_WORDINGS, TRAIN_WORDINGS, digit_of_prompt
from obsdiff.errors import UserError


def test_embedded_sets_are_disjoint_and_balanced():
    train, held_out = load_prompts("digits-train"), load_prompts("digits-heldout")
    assert not set(train) & set(held_out)
    assert len(train) == 10 * len(TRAIN_WORDINGS) and len(held_out) == 10 * len(HELD_OUT_WORDINGS)
    assert [digit_of_prompt(prompt) for prompt in train[:10]] == list(range(10))
    assert digit_of_prompt("one pen stroke drawing of the digit four") == 4
    assert digit_of_prompt("a horse") is None
    assert set(DIGIT_WORDS) <= {prompt.split()[-1] for prompt in train}


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet"])
def test_files(tmp_path, kind):
    path = tmp_path / f"p.{kind}"
    table = {"id": [1, 2, 3, 4], "caption": ["a cat", " ", "a dog, sitting", None]}
    if kind == "txt":
        path.write_text("a cat\n\n  \na dog, sitting\n")
        assert load_prompts(str(path)) == ["a cat", "a dog, sitting"]
        return
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([table.keys(), *zip(*table.values(), strict=True)])
    with pytest.warns(UserWarning, match=r"2 of 4 rows .* hold no caption"):
        assert load_prompts(str(path)) == ["a cat", "a dog, sitting"]


def test_column_and_draw(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("words\n" + "".join(f"prompt {i}\n" for i in range(20)))
    drawn = load_prompts(str(path), "words", 5, seed=3)
    assert len(set(drawn)) == 5 and drawn == load_prompts(str(path), "words", 5, seed=3)
    assert drawn != load_prompts(str(path), "words", 5, seed=4)
    assert len(load_prompts(str(path), "words", 50)) == 50
    with pytest.raises(UserError, match=r"no column 'caption'; its columns are words"):
        load_prompts(str(path))
    with pytest.raises(UserError, match="no column 'text'"):
        load_prompts(str(path), "text")


def test_bad_files(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 no")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    other = tmp_path / "prompts.docx"
    other.write_text("x")
    for source, word in (
        (empty, "holds no prompts"),
        (damaged, "cannot read prompts"),
        (binary, "UTF-8"),
        (other, "use .txt"),
        (tmp_path / "missing.csv", "not found"),
        ("nonsense", "not found"),
    ):
        with pytest.raises(UserError, match=word):
            load_prompts(str(source))
    with pytest.raises(UserError, match="at least 1"):
        load_prompts("digits-train", num=0)


def test_hugging_face_dataset(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"caption": ["x", "y"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    assert load_prompts("owner/name:validation") == ["x", "y"]
    assert load_prompts("owner/name") == ["x", "y"]
    assert asked == [("owner/name", "validation"), ("owner/name", "train")]
