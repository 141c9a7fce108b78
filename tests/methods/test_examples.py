"What a method keeps of a domain is a uniform sample of it."

import numpy as np
import torch
from torch import nn

from dmr.methods.examples import DomainSample, gradients_of

torch.set_num_threads(1)


def test_the_domain_sample_is_uniform():
    from scipy import stats

    counts = np.zeros(40)
    for seed in range(600):
        sample = DomainSample(5, seed)
        for part in torch.arange(40).split(7):
            sample.observe(part)
        counts[torch.cat(list(sample.batches(3))).numpy()] += 1
    assert counts.sum() == 5 * 600 and stats.chisquare(counts).pvalue > 1e-3


def test_what_is_frozen_has_no_gradient_and_is_no_error():
    model = nn.Linear(3, 2)
    params = dict(model.named_parameters())
    model.weight.requires_grad_(False)
    found = gradients_of(model(torch.ones(1, 3)).sum(), params)
    assert [*found] == ["weight", "bias"] and found["weight"] is None
    assert torch.equal(found["bias"], torch.ones(2))
    model.requires_grad_(False)
    found = gradients_of(model(torch.ones(1, 3)).sum(), params)
    assert found == {"weight": None, "bias": None}
