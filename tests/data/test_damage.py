"""Random damage to captions, images and a pipeline's information ends in one kind of error, or in a right value."""

import json
from io import BytesIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from obsdiff.data.captionfiles import KINDS
from obsdiff.data.pixels import Undecodable, decode
from obsdiff.data.prompts import load_prompts
from obsdiff.errors import UserError
from obsdiff.models.info import CALL_ARGUMENTS, read_info
from obsdiff.names import EMBEDDED_PROMPTS

fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELLS = st.text(st.sampled_from('a,;\t"\n\r\\{}[]:\u2028\xe9 0N'), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(
    kind=st.sampled_from(KINDS), content=st.binary(max_size=80) | CELLS.map(lambda text: f"caption\n{text}".encode())
)
def test_caption_files(tmp_path, kind, content):
    path = tmp_path / f"p{kind}"
    path.write_bytes(content)
    try:
        found = load_prompts(str(path))
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert found and all(text.strip() == text != "" for text in found)


def pictures():
    image = Image.effect_noise((12, 9), 80)
    for mode, kind in (("RGB", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("F", "TIFF"), ("RGB", "BMP")):
        file = BytesIO()
        image.convert(mode).save(file, kind)
        yield file.getvalue()


PICTURES = list(pictures())


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(which=st.sampled_from(PICTURES), data=st.data())
def test_images(which, data):
    content = bytearray(which)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    try:
        pixels = decode({"bytes": bytes(content), "path": None}, 4, 3)
    except Undecodable:
        return
    assert pixels.shape == (3, 4, 4) and bool(torch.isfinite(pixels).all()) and float(pixels.abs().max()) <= 1


@fuzz
@given(
    content=JSON
    | st.fixed_dictionaries(
        {},
        optional={
            "call": JSON | st.dictionaries(st.sampled_from(CALL_ARGUMENTS), JSON, max_size=2),
            "alignment": JSON | st.just("digits"),
            "prompts": JSON | st.dictionaries(st.sampled_from(["calibration", "evaluation"]), JSON, max_size=2),
        },
    )
)
def test_information(tmp_path, content):
    (tmp_path / "obsdiff.json").write_text(json.dumps(content))
    try:
        found = read_info(tmp_path)
    except UserError as error:
        assert "obsdiff.json" in str(error)
        return
    assert found.keys() == content.keys() and found.get("alignment") in (None, "digits")
    assert all(
        source in EMBEDDED_PROMPTS or tmp_path.as_posix() in source for source in found.get("prompts", {}).values()
    )
    assert all(isinstance(value, int | float) for value in found.get("call", {}).values())
