"What a method keeps of a domain is a uniform sample of it."

import numpy as np
import torch

from dmr.methods.examples import DomainSample

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
