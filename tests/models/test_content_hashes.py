import shutil

import torch

import obsdiff
from obsdiff.models.content import component_hashes


def test_names_and_use_do_not_count_and_every_component_does(pipe_folder, tmp_path):
    shutil.copytree(pipe_folder, tmp_path / "elsewhere")
    pipe, other = obsdiff.load_pipeline(pipe_folder), obsdiff.load_pipeline(tmp_path / "elsewhere")
    before = component_hashes(pipe)
    assert before.keys() >= {"transformer", "vae", "text_encoder_3", "tokenizer", "tokenizer_3", "scheduler"}
    obsdiff.sample(pipe, ["a seven", "a somewhat longer prompt"], [0, 1])
    assert component_hashes(pipe) == before == component_hashes(other)


def test_any_change_changes_its_component_alone(pipe_folder):
    for name in ("transformer", "vae", "text_encoder"):
        pipe = obsdiff.load_pipeline(pipe_folder)
        before = component_hashes(pipe)
        with torch.no_grad():
            next(getattr(pipe, name).parameters()).flatten()[0] += 1
        assert {key for key, now in component_hashes(pipe).items() if now != before[key]} == {name}
    pipe.scheduler.register_to_config(shift=3.0)
    pipe.tokenizer_3.add_tokens(["novel"])
    changed = {key for key, now in component_hashes(pipe).items() if now != before[key]}
    assert changed == {"text_encoder", "scheduler", "tokenizer_3"}
