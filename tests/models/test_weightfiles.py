"""Variants and single files: what diffusers users have on their disks."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import obsdiff
from obsdiff.cli.main import main
from obsdiff.models.info import info_of
from obsdiff.models.loading import check_source
from obsdiff.models.subject import subject_of
from obsdiff.pruning.manifest import read_manifest
from obsdiff.training.stage import start_from
from tests.families.pipelines import PIPELINES

PLAIN = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Stable Diffusion pipeline, plain and as fp16."""
    path = tmp_path_factory.mktemp("pipelines") / "sd15"
    pipe = PIPELINES["sd15"].build()
    pipe.save_pretrained(path)
    pipe.to(torch.float16).save_pretrained(path, variant="fp16")
    return path


def only(folder, target, *variants):
    """A copy with the files of some variants alone."""
    shutil.copytree(folder, target)
    for file in [*target.rglob("*.safetensors")]:
        variant = file.stem.partition(".")[2]
        if variant not in variants:
            file.unlink()
    return target


def weights(pipe):
    return subject_of(pipe).denoiser.state_dict()


def test_variants_are_chosen_or_found(folder, tmp_path):
    plain, half = obsdiff.load_pipeline(folder), obsdiff.load_pipeline(folder, variant="fp16")
    alone = obsdiff.load_pipeline(only(folder, tmp_path / "half", "fp16"))
    for name, tensor in weights(plain).items():
        assert torch.equal(weights(half)[name], tensor.half().float())
        assert torch.equal(weights(alone)[name], weights(half)[name])
    assert not all(torch.equal(weights(half)[name], tensor) for name, tensor in weights(plain).items())


def test_a_variant_that_is_not_there_is_refused(folder, tmp_path):
    with pytest.raises(obsdiff.UserError, match="variant 'bf16'; it has fp16 and the plain ones"):
        obsdiff.load_pipeline(folder, variant="bf16")
    target = only(folder, tmp_path / "several", "fp16")
    for file in [*target.rglob("*.fp16.safetensors")]:
        shutil.copy(file, str(file).replace("fp16", "bf16"))
    with pytest.raises(obsdiff.UserError, match=r"variants alone, bf16, fp16; choose one \(--variant\)"):
        obsdiff.load_pipeline(target)


def changed(pipe):
    return {name: tensor * 0.5 for name, tensor in weights(pipe).items()}


@pytest.mark.parametrize("name", ["sd15", "flux", "dit", "ddpm"])
def test_a_single_file_stands_in_place_of_the_denoiser(name, tmp_path):
    """Whether or not the class of the denoiser reads single files itself."""
    pipe = PIPELINES[name].build(encoders=False)
    pipe.save_pretrained(tmp_path / "pipeline")
    expected = changed(pipe)
    save_file(expected, tmp_path / "mine.safetensors")
    loaded = obsdiff.load_pipeline(tmp_path / "pipeline", denoiser=tmp_path / "mine.safetensors", dtype="bfloat16")
    assert {tensor.dtype for tensor in loaded.components[next(iter(PIPELINES[name].denoisers))].parameters()} == {
        torch.bfloat16
    }
    assert all(torch.equal(weights(loaded)[key], tensor.bfloat16()) for key, tensor in expected.items())
    assert info_of(loaded).source.endswith("mine.safetensors") and not subject_of(loaded).denoiser.training


AUTHORS = {  # of Wan: diffusers' names, and the authors'
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn2": "cross_attn",
    "attn1": "self_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    ".norm2.": ".norm3.",
    ".scale_shift_table": ".modulation",
}


def test_single_files_of_the_authors_are_converted(tmp_path):
    """Tensors under their own names and the prefix of whole checkpoints, as other programs write them."""
    pipe = PIPELINES["wan21"].build(encoders=False)
    pipe.save_pretrained(tmp_path / "pipeline")
    expected, theirs = changed(pipe), {}
    for name, tensor in expected.items():
        own = "head.modulation" if name == "scale_shift_table" else name
        for ours, other in AUTHORS.items():
            own = own.replace(ours, other)
        theirs[f"model.diffusion_model.{own}"] = tensor
    save_file(theirs, tmp_path / "theirs.safetensors")
    loaded = obsdiff.load_pipeline(tmp_path / "pipeline", denoiser=tmp_path / "theirs.safetensors")
    assert all(torch.equal(weights(loaded)[name], tensor) for name, tensor in expected.items())
    theirs.pop("model.diffusion_model.blocks.0.ffn.0.weight")
    save_file(theirs, tmp_path / "less.safetensors")
    with pytest.raises(obsdiff.UserError, match="does not hold the weights of this WanTransformer3DModel"):
        obsdiff.load_pipeline(tmp_path / "pipeline", denoiser=tmp_path / "less.safetensors")


def test_other_files_are_refused(folder, tmp_path):
    def load(tensors, match):
        save_file(tensors, tmp_path / "file.safetensors")
        with pytest.raises(obsdiff.UserError, match=match) as caught:
            obsdiff.load_pipeline(folder, denoiser=tmp_path / "file.safetensors")
        assert "\n" not in str(caught.value)

    load({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, "is a LoRA; load and fuse it")
    load({"other": torch.ones(2)}, "0 of its 1 tensors are called like the model's")
    own = load_file(folder / "unet" / PLAIN)
    load({**own, "conv_in.weight": torch.ones(3, 4, 3, 3)}, "does not hold the weights of this UNet2DConditionModel")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(obsdiff.UserError, match=r"no readable \.safetensors file"):
        obsdiff.load_pipeline(folder, denoiser=tmp_path / "text.safetensors")
    with pytest.raises(obsdiff.UserError, match=r"--denoiser .* is no \.safetensors file"):
        obsdiff.load_pipeline(folder, denoiser=tmp_path / "missing.safetensors")
    with pytest.raises(obsdiff.UserError, match="leave them out for a pipeline that is loaded already"):
        obsdiff.load_pipeline(PIPELINES["ddpm"].build(), variant="fp16")


def test_two_denoisers_are_not_replaced_by_one_file(tmp_path):
    pipe = PIPELINES["wan22"].build(encoders=False)
    pipe.save_pretrained(tmp_path / "pipeline")
    save_file({"a": torch.ones(2)}, tmp_path / "mine.safetensors")
    with pytest.raises(obsdiff.UserError, match="has 2 denoisers"):
        obsdiff.load_pipeline(tmp_path / "pipeline", denoiser=tmp_path / "mine.safetensors")


def test_the_command_line_takes_both(pipe_folder, tmp_path, capsys):
    """A file in place of the denoiser, through ``prune`` and ``sample``."""
    expected = {name: tensor * 0.5 for name, tensor in load_file(pipe_folder / "transformer" / PLAIN).items()}
    save_file(expected, tmp_path / "mine.safetensors")
    shared = ["--pipeline", str(pipe_folder), "--denoiser", str(tmp_path / "mine.safetensors"), "--device", "cpu"]
    output = tmp_path / "out"
    options = ["--method", "magnitude", "--evaluation.num_images", "0", "--output", str(output)]
    main(["prune", *shared, *options])
    pruned = load_file(output / "pipeline" / "transformer" / PLAIN)
    name = "transformer_blocks.1.attn.to_q.weight"
    kept = pruned[name] != 0
    assert torch.equal(pruned[name][kept], expected[name][kept]) and 0.4 < kept.float().mean() < 0.6
    called = read_manifest(output)["pipeline"]
    assert called == f"{pipe_folder} with {tmp_path / 'mine.safetensors'}" == check_source(called)
    teacher = start_from(str(output), None, tmp_path / "run", "cpu", False, lambda dense: None).teacher
    for dense in (teacher.pipe, obsdiff.load_pipeline(called)):  # a recovery finds what was pruned by its name
        assert torch.equal(dense.transformer.state_dict()[name], expected[name])
    main(["sample", *shared, "--prompt", "a seven", "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").is_file()
    with pytest.raises(obsdiff.UserError, match=r"missing.safetensors is no \.safetensors file"):
        check_source(f"{pipe_folder} with {tmp_path / 'missing.safetensors'}")
    for wrong, message in (("--denoiser", "is no .safetensors file"), ("--variant", "has no weight files")):
        with pytest.raises(SystemExit):
            main(["sample", "--pipeline", str(pipe_folder), "--prompt", "a", wrong, "nothing"])
        assert message in capsys.readouterr().err
