import pytest

from obsdiff.models.modes import eval_mode


def modes(pipe):
    models = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
    return [module.training for model in models for module in model.modules()]


def test_all_models_are_in_eval_mode_and_every_submodule_gets_its_own_mode_back(pipe):
    pipe.transformer.train()
    pipe.transformer.transformer_blocks[1].eval()
    pipe.text_encoder_2.eval()
    pipe.vae.train()
    before = modes(pipe)
    assert True in before and False in before
    with eval_mode(pipe):
        assert not any(modes(pipe))
    assert modes(pipe) == before
    with pytest.raises(RuntimeError), eval_mode(pipe):
        raise RuntimeError
    assert modes(pipe) == before
