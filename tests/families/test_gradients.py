"""Methods that go by gradients, for every family: measured on its own calls, or refused in one line."""

import pytest
import torch

import obsdiff
from obsdiff.models.conditioning import Conditioning
from obsdiff.models.subject import subject_of
from tests.families.pipelines import PIPELINES, each
from tests.families.test_walk import SHARES, Case

REFUSED = {
    "sana-sprint": "training loss of this pipeline is not known.*SCMScheduler",
    "wan21-i2v": "is given 10 channels and answers 4: it works on an image too, whose training loss is not known",
}
NEED = "large_loss_gradient"


class Measured(Case):
    """One family with what Diff-Pruning needs, and nothing else."""

    def __init__(self, name):
        self.row, self.name = PIPELINES[name], name
        given = self.row.conditioning(2)
        self.conditioning = Conditioning({}, count=2) if set(given) <= {"batch_size"} else Conditioning(given)
        self.graph = subject_of(self.fresh(), self.conditioning).graph
        kinds = {group.kind for group in self.graph.groups}
        shares = [f"{kind}={share}" for kind, share in SHARES.items() if kind in kinds]
        self.structured = f"structured:{','.join(shares)},multiple_of=1"


@pytest.mark.parametrize("name", each(PIPELINES))
def test_every_family(name):
    case = Measured(name)
    pipe = case.traced()
    if name in REFUSED:
        with pytest.raises(obsdiff.UserError, match=REFUSED[name]):
            obsdiff.calibrate(pipe, case.conditioning, needs={NEED})
        return
    statistics = obsdiff.calibrate(pipe, case.conditioning, needs={NEED})
    found = statistics.gradients
    assert set(case.graph.layers) <= set(found.by_layer)
    assert all(torch.isfinite(gradient).all() for gradient in found.by_layer.values())
    still = {layer for layer, gradient in found.by_layer.items() if not gradient.any()}
    assert still <= set(subject_of(case.traced(), case.conditioning).dead)
    assert all(0 < loss < 1e4 for loss in found.losses.values()) and 0 < len(found.used) <= 20
    report = obsdiff.prune(pipe, case.structured, method="diff-pruning", statistics=statistics, spare_blocks=())
    assert report.masks.keys() == case.units() and report.parameters["pruned"] < report.parameters["dense"]
    for group_name, mask in report.masks.items():
        group = case.graph.group_of[group_name]
        scores = torch.zeros(group.count)
        for slices, axis in [*((s, 1) for s in group.consumers), *((s, 0) for s in group.producers)]:
            product = (case.graph.weight(slices.layer).detach() * found.by_layer[slices.layer]).abs()
            by_entry = product.transpose(0, axis).flatten(1).sum(1)
            for start in slices.starts:
                scores += by_entry[start : start + group.count * slices.size].view(group.count, -1).sum(1)
        gone = int((~mask).sum())
        torch.testing.assert_close(scores[~mask].sort().values, scores.sort().values[:gone], rtol=1e-3, atol=0)
    assert torch.isfinite(case.sample(pipe)).all()
