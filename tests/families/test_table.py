"""What the rows claim is what the graphs have, and the pages that are written from the rows are up to date."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

import obsdiff
from obsdiff.cli.main import main
from obsdiff.export.families import document, table
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.families import FAMILIES
from obsdiff.models.info import PipelineInfo, attach_info
from obsdiff.models.subject import graph_of, subject_of
from tests.families.making import embeddings, fill, masks
from tests.families.pipelines import PIPELINES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PIPELINES)
def test_rows_say_which_kinds_of_units_there_are(name):
    row = PIPELINES[name]
    pipe = row.build(encoders=False)
    for component, kind in row.denoisers.items():
        graph = graph_of(getattr(pipe, component))
        assert graph.family.denoiser == kind and graph.family.known
        assert {group.kind for group in graph.groups} == set(graph.family.cuts)


def test_every_family_has_a_tiny_pipeline():
    tried = {kind for row in PIPELINES.values() for kind in row.denoisers.values()}
    assert tried == {family.denoiser for family in FAMILIES}


def test_the_command_prints_the_table(capsys):
    main(["inspect", "--families"])
    assert capsys.readouterr().out == table() + "\n"
    rows = table().splitlines()
    assert len(rows) == 2 + len(FAMILIES) + 1 and len({len(row) for row in rows}) == 1


def test_the_page_is_written_from_the_rows():
    """python -c "from obsdiff.export.families import document; print(document(), end='')" > docs/families.md"""
    assert (ROOT / "docs" / "families.md").read_text() == document()


def test_the_guide_shows_what_is_in_the_files():
    """Its excerpts are lines of the family that was added by it."""
    text = (ROOT / "docs" / "adding-a-family.md").read_text()
    blocks = [block for block in re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL) if "ura" in block][1:]
    files = ["src/obsdiff/models/families/aura_flow.py", "src/obsdiff/models/parts.py", "tests/families/dits.py"]
    for block, file in zip(blocks, files, strict=True):
        assert block in (ROOT / file).read_text()


def test_the_readme_names_every_family():
    text = " ".join((ROOT / "README.md").read_text().split())
    assert not [family.title for family in FAMILIES if family.title not in text]


@pytest.fixture
def unknown():
    """Mochi, of which nothing is written anywhere, and what it is told."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    pipe = diffusers.MochiPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )
    fill(transformer, 0)
    pipe.set_progress_bar_config(disable=True)
    attach_info(pipe, PipelineInfo("unknown", {"num_inference_steps": 2, "height": 64, "width": 64, "num_frames": 7}))
    text = {"prompt_embeds": embeddings(2, 16, 32, salt=1), "negative_prompt_embeds": embeddings(2, 16, 32, salt=2)}
    real = {name: masks(2, 16) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    return pipe, Conditioning({**text, **real})


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "2:4"])
def test_classes_that_nobody_knows_are_pruned_by_tracing_alone(unknown, pattern, tmp_path):
    pipe, conditioning = unknown
    graph = subject_of(pipe, conditioning).graph
    assert not graph.family.known and graph.stages == ("transformer_blocks.0", "transformer_blocks.1")
    odd = [name for name in graph.layers if pattern == "2:4" and graph.weight(name).shape[1] % 4]
    report = obsdiff.prune(pipe, pattern, statistics=obsdiff.calibrate(pipe, conditioning), exclude=odd)
    assert any("MochiTransformer3DModel is known by tracing alone" in note for note in report.notes)
    assert report.masks.keys() == graph.layers.keys() - set(odd) and len(graph.layers) == 21
    assert report.sparsity == pytest.approx(0.5, abs=1e-3) and max(report.layer_error.values()) < 1
    obsdiff.save_pipeline(pipe, tmp_path / "out", report)
    loaded = obsdiff.load_pipeline(tmp_path / "out")
    weights = loaded.transformer.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in pipe.transformer.state_dict().items())


def test_ranks_of_classes_that_nobody_knows(unknown):
    pipe, conditioning = unknown
    groups = subject_of(pipe, conditioning).graph.groups
    [group] = [group for group in groups if group.kind == "rank"]
    report = obsdiff.prune(pipe, "rank:4", statistics=obsdiff.calibrate(pipe, conditioning))
    assert int(report.masks[group.name].sum()) == 4 and set(group.layers) == report.layer_error.keys()
    blocks = [f"transformer_blocks.{i}.{norm}" for i in (0, 1) for norm in ("norm1.linear", "norm1_context.linear")]
    assert set(group.layers) == {*blocks[:3], "transformer_blocks.1.norm1_context.linear_1", "norm_out.linear"}


def test_low_ranks_of_classes_that_nobody_knows(unknown):
    """Whatever linear layers read in their blocks: nothing there is known to be cut."""
    pipe, conditioning = unknown
    graph = subject_of(pipe, conditioning).graph
    groups = {group.name: group for group in graph.groups if group.kind == "lowrank"}
    assert {layer for group in groups.values() for layer in group.layers} == graph.layers.keys()
    report = obsdiff.prune(pipe, "lowrank:4", statistics=obsdiff.calibrate(pipe, conditioning))
    assert report.masks.keys() == groups.keys() and report.parameters["pruned"] < report.parameters["dense"]
    assert max(report.layer_error.values()) < 1


def test_classes_that_nobody_knows_are_not_cut(unknown):
    pipe, conditioning = unknown
    _ = subject_of(pipe, conditioning).call
    with pytest.raises(obsdiff.UserError, match=r"tracing alone; use unstructured:RATIO or N:M \(docs/adding-a-family"):
        obsdiff.prune(pipe, "structured:0.3", method="magnitude")
