"""Whatever is kept is keyed by the content of all that stands upstream of it."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

import obsdiff
from obsdiff.allocation.latency import timing_of
from obsdiff.data.trajectories import TrajectoryDataModule
from obsdiff.models import content
from obsdiff.models.conditioning import encode_prompts
from obsdiff.models.content import component_hash, component_hashes
from obsdiff.models.info import info_of
from obsdiff.models.subject import subject_of
from obsdiff.obs import hessian
from obsdiff.pruning.fingerprint import conditioning_hash, prompts_hash
from obsdiff.pruning.options import PruningOptions, ScanOptions
from tests.conftest import make_pipe


def drop(pipe, name):
    setattr(pipe, name, None)


def nudge(pipe, name):
    next(getattr(pipe, name).parameters()).data.view(-1)[3] += 0.5  # .data: no version counter sees it


def word(pipe, name):
    getattr(pipe, name).add_tokens(["zebra"])


def length(pipe, name):
    getattr(pipe, name).model_max_length -= 1


def config(pipe, name):
    model = getattr(pipe, name)
    key = "patch_size" if name == "transformer" else "hidden_act"
    if name == "transformer":
        model.register_to_config(**{key: 1})
    else:
        setattr(model.config, key, "relu")


CHANGES = [
    (nudge, "text_encoder"),
    (nudge, "text_encoder_2"),
    (drop, "text_encoder_3"),
    (config, "text_encoder"),
    (config, "transformer"),
    (nudge, "transformer"),
    (word, "tokenizer"),
    (word, "tokenizer_3"),
    (length, "tokenizer_2"),
]


@pytest.mark.parametrize(("change", "name"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_store_is_refused_when_a_component_changed(pipe, prompts, tmp_path, change, name):
    store = tmp_path / "store"
    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=store)
    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=store)
    change(pipe, name)
    with pytest.raises(obsdiff.UserError, match=rf"other settings: .*\b{name} \(\w+ there, \w+ now\)"):
        obsdiff.calibrate(pipe, prompts[:2], steps=1, store=store)


def test_latents_do_not_depend_on_the_decoder(pipe, prompts, tmp_path):
    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=tmp_path / "store")
    nudge(pipe, "vae")
    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=tmp_path / "store")


def test_encoded_prompts_count_themselves_not_their_encoders(pipe, prompts, tmp_path):
    store = tmp_path / "store"
    encoded = encode_prompts(pipe, prompts[:2], info_of(pipe).call)
    obsdiff.calibrate(pipe, encoded, steps=1, store=store)
    drop(pipe, "text_encoder_3")
    drop(pipe, "tokenizer_3")
    obsdiff.calibrate(pipe, encoded, steps=1, store=store)
    unmasked = replace(encoded, text_mask=None, negative_text_mask=None)
    other = encoded.text_mask.clone()
    other[0, -1] = ~other[0, -1]
    for changed in (unmasked, replace(encoded, text_mask=other)):
        with pytest.raises(obsdiff.UserError, match="prompts"):
            obsdiff.calibrate(pipe, changed, steps=1, store=store)


def test_hashes_are_of_content(pipe, pipe_folder):
    """Saved, loaded, used, and remembered: the same; and hashed once."""
    before = component_hashes(pipe)
    assert set(before) == {
        "pipeline", "transformer", "scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
        "tokenizer", "tokenizer_2", "tokenizer_3",
    }  # fmt: skip
    pipe(["a seven"], output_type="latent", **info_of(pipe).call)
    assert component_hashes(pipe) == before == component_hashes(obsdiff.load_pipeline(pipe_folder))
    assert component_hashes(make_pipe()) == before
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.5)
    assert {key for key, value in component_hashes(pipe).items() if value != before[key]} == {"scheduler"}


def test_unchanged_weights_are_hashed_once(pipe, monkeypatch):
    read = []
    monkeypatch.setattr(content, "tensor_bytes", lambda tensor: read.append(1) or b"")
    first = component_hash(pipe.transformer)
    once = len(read)
    assert once > 0 and component_hash(pipe.transformer) == first and len(read) == once
    nudge(pipe, "transformer")
    component_hash(pipe.transformer)
    assert len(read) == 2 * once


def test_a_store_of_an_earlier_format_is_one_clear_line(pipe, prompts, tmp_path):
    store = tmp_path / "store"
    obsdiff.calibrate(pipe, prompts[:2], steps=1, store=store)
    index = json.loads((store / "statistics.json").read_text())
    (store / "statistics.json").write_text(json.dumps({**index, "format": 1}))
    with pytest.raises(obsdiff.UserError, match=r"written in format 1, .* delete the folder and calibrate again"):
        obsdiff.calibrate(pipe, prompts[:2], steps=1, store=store)


def test_a_store_of_whole_matrices_serves(prompts, tmp_path, monkeypatch):
    """Format 2: what the strips of a Hessian's upper triangle are now was one matrix."""
    monkeypatch.setattr(hessian, "STRIP", 16)
    store, pruned = tmp_path / "store", {}
    for form in ("strips", "whole"):
        pipe = make_pipe()
        found = obsdiff.calibrate(pipe, prompts[:2], store=store)
        assert any("comoment.1" in found.site(name).tensors() for name in found)
        if form == "whole":
            index = json.loads((store / "statistics.json").read_text())
            for name, entry in index["sites"].items():
                site = found.site(name)
                sums = torch.stack([site.covariance(group) for group in range(len(site.centre))]) * site.weight_sum
                content = save({"comoment": sums, "mean": site.centre})
                (store / entry["file"]).write_bytes(content)
                entry["sha256"] = hashlib.sha256(content).hexdigest()
            (store / "statistics.json").write_text(json.dumps({**index, "format": 2}))
            monkeypatch.setattr("obsdiff.pruning.calibrate._measure", lambda *_: pytest.fail("measured again"))
            found = obsdiff.calibrate(pipe, prompts[:2], store=store)
        report = obsdiff.prune(pipe, "unstructured:0.5", statistics=found)
        pruned[form] = dict(report.masks), report.mean_layer_error
    assert all(torch.equal(mask, pruned["whole"][0][name]) for name, mask in pruned["strips"][0].items())
    assert pruned["whole"][1] == pytest.approx(pruned["strips"][1], rel=1e-4)


def test_a_scan_is_keyed_by_what_the_denoiser_is_told(pipe, prompts):
    before = conditioning_hash(pipe, prompts)
    nudge(pipe, "vae")
    nudge(pipe, "transformer")
    assert conditioning_hash(pipe, prompts) == before
    nudge(pipe, "text_encoder_2")
    assert conditioning_hash(pipe, prompts) != before
    encoded = encode_prompts(pipe, prompts, info_of(pipe).call)
    assert conditioning_hash(pipe, encoded) == prompts_hash(encoded)


def test_a_scan_of_a_changed_text_encoder_is_refused(pipe, prompts, tmp_path):
    statistics = obsdiff.calibrate(pipe, prompts[:2], steps=1)
    asked = PruningOptions(scan=ScanOptions(levels=[0.5], triples=2), include=["transformer_blocks.1.ff.*"])

    def allocated():
        return obsdiff.allocate(pipe, asked, statistics, prompts[:2], store=tmp_path)

    allocated()
    allocated()
    nudge(pipe, "text_encoder")
    with pytest.raises(obsdiff.UserError, match=r"sensitivity scan .* prompts"):
        allocated()


def test_times_are_of_a_config_as_well(pipe):
    def depends_on():
        return timing_of(pipe, subject_of(pipe).graph, info_of(pipe).call, None).depends_on

    before = depends_on()
    assert depends_on() == before
    config(pipe, "transformer")
    assert depends_on() != before


def test_trajectories_follow_content_not_the_name(pipe, tmp_path):
    """The pipeline behind a folder was replaced: its recording is refused; moved elsewhere it is the same."""
    from obsdiff.files import write_json
    from obsdiff.models.info import INFO_FILE

    def save(folder):
        pipe.save_pretrained(folder)
        write_json(folder / INFO_FILE, info_of(pipe).to_json())

    def record(source):
        TrajectoryDataModule(
            str(source), str(tmp_path / "kept"), "digits-train", num_prompts=2, steps=1, batch_size=2
        ).prepare_data()

    save(tmp_path / "one")
    record(tmp_path / "one")
    save(tmp_path / "two")
    before = (tmp_path / "kept" / "trajectories.safetensors").stat().st_mtime_ns
    record(tmp_path / "two")
    assert (tmp_path / "kept" / "trajectories.safetensors").stat().st_mtime_ns == before
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).view(-1)[0] += 1
    save(tmp_path / "one")
    with pytest.raises(obsdiff.UserError, match=r"trajectories in .* text_encoder_2 \("):
        record(tmp_path / "one")
