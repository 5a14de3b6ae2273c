"""Pretraining replaces what it made before, and nothing else."""

import pytest

from obsdiff.embedded.pretrain_ddpm import DigitsDDPMPretraining
from obsdiff.embedded.pretrain_sd3 import DigitsSD3Pretraining
from obsdiff.embedded.train_classifier import DigitClassifierTraining
from obsdiff.errors import UserError


@pytest.mark.parametrize("kind", [DigitsSD3Pretraining, DigitsDDPMPretraining, DigitClassifierTraining])
def test_a_users_folder_is_refused_before_training(tmp_path, kind):
    (tmp_path / "README.md").write_text("mine")
    module = kind(str(tmp_path))
    with pytest.raises(UserError, match=r"holds something else than a (pretrained pipeline|trained classifier)"):
        module.setup("fit")
    kind(str(tmp_path / "new")).setup("fit")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
