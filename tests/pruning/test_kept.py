"""Parts of a long piece of work that are kept as they are finished."""

import torch

from obsdiff.pruning.kept import KeptParts


def test_tensors_of_one_storage_are_kept_apart(tmp_path):
    """As they come from other processes; safetensors refuses tensors that share memory."""
    parts = KeptParts(tmp_path / "kept", "kept.json", "key", ["one", "two"])
    flat = torch.arange(6.0)
    parts.write("one", {"a": flat[:2], "b": flat[2:].view(2, 2).T, "all": flat}, {"told": "x"})
    again = KeptParts(tmp_path / "kept", "kept.json", "key", ["one", "two"])
    assert "one" in again and "two" not in again and len(again) == 1
    said, tensors = again.read("one")
    assert said["told"] == "x" and tensors["a"].tolist() == [0, 1] and tensors["b"].tolist() == [[2, 4], [3, 5]]
    assert torch.equal(tensors["all"], flat)
    assert len(KeptParts(tmp_path / "kept", "kept.json", "other", ["one"])) == 0
