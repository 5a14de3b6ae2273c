import pytest
import torch

from obsdiff.data.loader import ResumableLoader
from obsdiff.errors import UserError


def numbers(done=0, count=23):
    return ResumableLoader(torch.arange(count), 4, seed=3, batches_done=lambda: done)


def drawn(loader):
    return [batch.tolist() for batch in loader]


def test_an_epoch_is_shuffled_by_seed_and_epoch_alone():
    first, again = drawn(numbers()), drawn(numbers())
    assert first == again and len(first) == 5
    assert len({n for batch in first for n in batch}) == 20
    other = numbers()
    other.sampler.set_epoch(1)
    assert drawn(other) != first


def test_goes_on_in_the_middle_of_an_epoch():
    whole = drawn(numbers())
    resumed = numbers()
    resumed.load_state_dict(numbers(done=3).state_dict())
    assert drawn(resumed) == whole[3:]
    resumed.sampler.set_epoch(1)
    assert len(drawn(resumed)) == 5  # the next epoch is whole


def test_too_few_items_are_refused():
    with pytest.raises(UserError, match="fewer than one batch"):
        numbers(count=3)
