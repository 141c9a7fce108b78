"""A merge by curvature beside every method, under every routing that it has:
the curvature is the raw gradient's, whatever is made of it.
"""

import pytest
import torch

import dmr
from dmr.methods.registry import FAMILIES, make
from dmr.routing.conformance import Problem, train, weights

torch.set_num_threads(1)

CASES = [(f, routing) for f in FAMILIES for routing in FAMILIES[f].routings]
OPTIONS = {"replay": {"fraction": 0.5}, "control": {"every": 1, "rank": 2}}


def built(name, problem):
    "A method with settings for so small a problem."
    family = FAMILIES[name]
    options = OPTIONS.get(family.kind, {})
    if "buffer" in family.needs:
        options = OPTIONS["replay"]
    elif name == "projection":
        options = OPTIONS["control"]
    return make(
        name, loss_fn=problem.loss_fn, logit_fn=problem.logit_fn, **options
    )


def domain(problem, optimizer, router, which):
    "Train on one; the weights it ends with, and the mean square of g."
    seen = []

    def keep(it, args, kwargs):
        named = problem.model.named_parameters()
        seen.append({n: p.grad.double().square() for n, p in named})

    hook = optimizer.register_step_pre_hook(keep)
    optimizer._optimizer_step_pre_hooks.move_to_end(hook.id, last=False)
    train(problem, optimizer, router, which, range(4))
    hook.remove()
    mean = {n: torch.stack([s[n] for s in seen]).mean(0) for n in seen[0]}
    return weights(problem), mean


@pytest.mark.parametrize("name, routing", CASES)
@pytest.mark.filterwarnings("ignore:the basis of")
@pytest.mark.filterwarnings("ignore:.*edits whole gradients")
def test_a_merge_beside_every_method(name, routing):
    problem = Problem(torch.float64)
    model = problem.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = dmr.MomentRouter(
        model,
        optimizer,
        built(name, problem),
        routing,
        0.7,
        consolidation=dmr.FisherMerge(0.6, keep=0.5),
    )
    before, f_old = domain(problem, optimizer, router, 0)
    router.consolidate()
    for which in (1, 2):
        after, f_new = domain(problem, optimizer, router, which)
        report = router.consolidate()["consolidation"]
        expected = dmr.merge(before, after, f_old, f_new, 0.6)
        for key, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), expected[key], rtol=1e-10, atol=1e-13
            )
        assert 0 < report["share"] < 1
        before = weights(problem)
        f_old = {n: 0.5 * f_old[n] + f for n, f in f_new.items()}
