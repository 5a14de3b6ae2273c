"""Moments over two processes: the same to the bit on both, and those of all inputs together, whatever their offset."""

import torch
from torch import distributed, multiprocessing

from obsdiff.obs.hessian import Gram

OFFSETS = (0.0, 1e3, 1e5)


def inputs(offset):
    x = torch.randn(2, 300, 12, generator=torch.Generator().manual_seed(0)).mul(32).round() / 32
    x[:, :, ::2] += offset
    return x


def share(rank, folder):
    """One process: the whole of its share first, then a share without any inputs on process 1."""
    store = distributed.FileStore(f"{folder}/meet", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = []
    for offset in OFFSETS:
        for alone in (False, True):
            found = Gram.empty(12, groups=2)
            if rank == 0 or not alone:
                for part in inputs(offset)[:, rank * 100 : 300 if rank else 100].split(30, dim=1):
                    found.add(part, 0.5 + rank)
            found.add_up()
            results.append((found.comoment, found.centre, found.weight_sum, found.num_tokens))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_know_the_same(tmp_path):
    multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (comoment, centre, *counts), (other, other_centre, *other_counts) in zip(first, second, strict=True):
        assert all(torch.equal(*both) for both in zip(comoment, other, strict=True))
        assert torch.equal(centre, other_centre) and counts == other_counts
    for offset, (comoment, centre, weight_sum, tokens) in zip(OFFSETS, first[::2], strict=True):
        alpha = torch.cat([torch.full((100,), 0.5), torch.full((200,), 1.5)]).double()[None, :, None]
        x = inputs(offset).double()
        mean = (alpha * x).sum(1) / alpha.sum()
        expected = (alpha * (x - mean[:, None])).mT @ (x - mean[:, None])
        torch.testing.assert_close(comoment[0].triu().double(), expected.triu(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(centre, mean, rtol=0, atol=1e-5)
        assert (weight_sum, tokens) == (350.0, 300)
    assert all(tokens == 100 for *_, tokens in first[1::2])
