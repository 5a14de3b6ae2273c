import torch


def same_sums(a, b):
    """Whether two moments are equal, bit by bit and part by part."""
    return torch.equal(a.centre, b.centre) and all(
        torch.equal(*both) for both in zip(a.comoment, b.comoment, strict=True)
    )
