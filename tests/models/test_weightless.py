"""Pipelines without weights: built from config files alone, and told and answering like those with weights."""

import pytest
import torch

import obsdiff
from obsdiff.errors import UserError
from obsdiff.evaluation.call_memory import call_shapes
from obsdiff.files import write_json
from obsdiff.models.info import CALL_ARGUMENTS, PipelineInfo, attach_info, call_arguments
from obsdiff.models.subject import subject_of
from obsdiff.models.weightless import open_weightless
from tests.families.pipelines import PIPELINES

WEIGHTS = (".safetensors", ".bin")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "merges.txt")


def emptied(row, folder, without=()):
    """The pipeline of a row, and its folder with the weights (and files called ``without``) gone."""
    pipe = row.build()
    pipe.save_pretrained(folder)
    for file in [file for file in folder.rglob("*") if file.suffix in WEIGHTS or file.name in without]:
        file.unlink()
    call = {key: value for key, value in row.call.items() if key in CALL_ARGUMENTS}
    write_json(folder / "obsdiff.json", {"call": call})
    attach_info(pipe, PipelineInfo("tiny", call))
    return pipe


def sites(graph):
    return [site.layers for site in graph.sites]


SLOW = pytest.mark.slow
FAMILIES = [
    *("sd3", "flux", "sdxl", "ddpm", "wan21"),
    *(pytest.param(name, marks=SLOW) for name in PIPELINES if name not in ("sd3", "flux", "sdxl", "ddpm", "wan21")),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_without_weights_shows_what_the_one_with_weights_does(name, tmp_path):
    row = PIPELINES[name]
    if name == "lumina2":
        pytest.skip("its lengths are values: it does not run without weights, which a plan says")
    if name == "wan21-i2v":
        pytest.skip("it is told an image beside each prompt, so that nothing can be recorded of it")
    pipe = emptied(row, tmp_path / "p")
    subject, real = subject_of(open_weightless(str(tmp_path / "p"))), subject_of(pipe)
    assert all(p.is_meta for p in subject.denoiser.parameters())
    assert sites(subject.graph) == sites(real.graph)
    assert (subject.graph.chains, subject.graph.repeats) == (real.graph.chains, real.graph.repeats)
    call = call_arguments(pipe)
    chosen = [*real.graph.sites]
    found, expected = (call_shapes(s, call, chosen, "gram", drawn=True) for s in (subject, real))
    assert found.note == "" and found.image == expected.image and found.prompt == expected.prompt
    assert found.tokens == expected.tokens and found.rows == expected.rows
    assert found.call == pytest.approx(expected.call, rel=0.2)
    assert found.observed == pytest.approx(expected.observed, rel=0.2)


def test_a_folder_needs_neither_weights_nor_vocabularies(tmp_path):
    emptied(PIPELINES["sd3"], tmp_path / "p", VOCABULARIES)
    subject = subject_of(open_weightless(str(tmp_path / "p"), "bfloat16"))
    assert len(subject.graph.sites) == 21
    assert {p.dtype for p in subject.denoiser.parameters()} == {torch.bfloat16}
    assert call_shapes(subject, call_arguments(subject.pipe), [], "gram", drawn=True).note == ""


def test_counting_leaves_a_loaded_pipeline_as_it_was(pipe, images):
    before = images(pipe)
    subject = subject_of(pipe)
    call_shapes(subject, call_arguments(pipe), [*subject.graph.sites], "gram", drawn=True)
    assert torch.equal(before, images(pipe))
    assert "forward" not in vars(pipe.transformer) and "decode" not in vars(pipe.vae)
    obsdiff.prune(pipe, "unstructured:0.5", method="magnitude")


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without model_index\.json"):
        open_weightless(str(tmp_path))
    emptied(PIPELINES["ddpm"], tmp_path / "p")
    (tmp_path / "p" / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="do not make a pipeline without weights"):
        open_weightless(str(tmp_path / "p"))


def test_of_a_hub_repository_the_configs_are_fetched(tmp_path, monkeypatch):
    emptied(PIPELINES["ddpm"], tmp_path / "p")
    asked = {}

    def fetched(source, **given):
        asked.update(given, source=source)
        return str(tmp_path / "p")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert subject_of(open_weightless("someone/ddpm")).graph.sites
    assert asked["source"] == "someone/ddpm" and not any("safetensors" in rule for rule in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="cannot fetch the configs of someone/ddpm: OSError: no network"):
        open_weightless("someone/ddpm")
