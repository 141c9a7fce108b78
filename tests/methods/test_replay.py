"An added term, a penalty or a replayed loss, under shared routing."

import copy
import gc
import weakref

import pytest
import torch

import dmr
import dmr.routing.router as module
from dmr.methods.agem import AGEM
from dmr.methods.penalty import EWC, SI
from dmr.routing.conformance import Problem, train
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["ewc", "si", "replay"])
def test_shared_routing_of_an_added_term_is_plain_training_on_the_summed_loss(
    method,
):
    """The published form: the term stands in the loss, and torch's Adam sees
    the gradient of the sum.
    """
    problem = Problem(torch.float64)
    buffer = dmr.ReplayBuffer(seed=2)
    modification = {
        "ewc": lambda: EWC(problem.loss_fn, lam=40.0, samples=24),
        "si": lambda: SI(c=2.0, xi=1e-2),
        "replay": lambda: dmr.ReplayMix(buffer, problem.loss_fn, fraction=0.5),
    }[method]()
    strength = 0.3 if method == "replay" else 1.0
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2)
    router = MomentRouter(
        problem.model, optimizer, modification, "shared", strength
    )
    train(problem, optimizer, router, 0, range(9))
    router.consolidate()
    twin = copy.deepcopy(problem)
    twin_optimizer = torch.optim.Adam(twin.model.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_buffer = copy.deepcopy(buffer)
    anchor = [p.detach().clone() for p in twin.model.parameters()]
    if method != "replay":
        weight = [
            modification.importance[n].clone()
            for n, _ in twin.model.named_parameters()
        ]
        assert (
            all((w >= 0).all() for w in weight)
            and sum(w.sum() for w in weight) > 0
        )
    train(problem, optimizer, router, 1, range(12))
    for step in range(12):
        twin_optimizer.zero_grad()
        loss = twin.loss_fn(twin.batch(1, step))
        if method == "replay":
            # draws from the buffer's generator as well
            twin_buffer.observe(twin.batch(1, step), capacity=12)
            loss = 0.7 * loss + 0.3 * twin.loss_fn(twin_buffer.sample(8))
        else:
            scale = 0.5 * 40.0 if method == "ewc" else 2.0
            loss = loss + scale * sum(
                (w * (p - a) ** 2).sum()
                for w, p, a in zip(weight, twin.model.parameters(), anchor)
            )
        loss.backward()
        twin_optimizer.step()
    for a, b in zip(problem.model.parameters(), twin.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def show(router, loss_fn, batch):
    "Offer a batch, and make its gradients anew."
    router.observe(batch)
    router.optimizer.zero_grad()
    loss_fn(batch).backward()


def applied(max_norm, length=1.0):
    "The norm of the gradient that SGD applies in each domain; g is clipped."
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)
    )
    loss_fn = lambda x: 300 * (model(x) - x[:, :2]).square().mean()
    mix = dmr.ReplayMix(
        dmr.ReplayBuffer(capacity=8), loss_fn, None, max_norm=max_norm
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, mix)
    flat = torch.nn.utils.parameters_to_vector
    found = []
    for _ in range(2):
        for _ in range(3):
            show(router, loss_fn, torch.randn(8, 4))
            torch.nn.utils.clip_grad_norm_(model.parameters(), length)
            before = flat(model.parameters()).detach().clone()
            optimizer.step()
            after = flat(model.parameters()).detach()
            norm = (after - before).norm() / 1e-2
        found.append(float(norm))
        router.consolidate()
    return found, mix


def test_the_replayed_gradient_is_clipped_as_the_loop_clips_its_own():
    (first, second), _ = applied(max_norm=None)
    assert abs(first - 1) < 1e-3 and second > 10
    (first, second), mix = applied(max_norm=1.0)
    assert abs(first - 1) < 1e-3 and second < 1 + 1e-3
    assert "max_norm=1" in repr(mix)


def test_a_bound_that_is_not_reached_changes_no_bit():
    assert applied(None)[0] == applied(1e6)[0]


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "1"])
def test_a_bound_that_is_none_is_refused(bad):
    buffer = dmr.ReplayBuffer(capacity=8)
    with pytest.raises(ValueError, match="max_norm="):
        dmr.ReplayMix(buffer, lambda x: x.sum(), None, max_norm=bad)


class TwoHeads(torch.nn.Module):
    "A batch goes through the head that it names."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(4, 5)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(5, 2) for _ in "ab")

    def forward(self, x, head):
        h = self.body(x).tanh()
        return self.heads[int(head[0])](h)


def heads_in_turn(
    routing="shared", strength=0.5, optimizers=1, cls=dmr.ReplayMix
):
    "Both heads in turn, one domain each; p.grad of the old one at the end."
    model = TwoHeads()
    loss_fn = lambda b: (model(*b) - b[0][:, :2]).square().mean()
    parts = [[*model.body.parameters()], [*model.heads.parameters()]]
    parts = parts if optimizers == 2 else [sum(parts, [])]
    several = [torch.optim.AdamW(part, lr=1e-2) for part in parts]
    mix = cls(dmr.ReplayBuffer(capacity=8), loss_fn, None)
    router = MomentRouter(model, several, mix, routing, strength)
    moved = []
    for domain in range(2):
        draw = torch.Generator().manual_seed(domain)
        old = model.heads[0].weight.detach().clone()
        for _ in range(4):
            batch = (
                torch.randn(8, 4, generator=draw),
                torch.full((8,), domain),
            )
            router.observe(batch)
            for optimizer in several:
                optimizer.zero_grad()
            loss_fn(batch).backward()
            for optimizer in several:
                optimizer.step()
        moved.append(float((model.heads[0].weight.detach() - old).norm()))
        router.consolidate()
    return moved[1], model, router


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_head_that_the_batch_leaves_out_is_stepped_by_what_is_replayed(
    optimizers,
):
    moved, model, router = heads_in_turn(optimizers=optimizers)
    assert moved > 1e-3
    assert all(p.grad is None for p in model.heads[0].parameters())
    assert all(p.grad is not None for p in model.heads[1].parameters())


def test_such_a_step_is_that_of_the_mixed_loss():
    _, model, router = heads_in_turn()
    twin, mix = copy.deepcopy(model), router.modification
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(router.optimizer.state_dict()))
    buffer = copy.deepcopy(mix.buffer)
    batch = torch.ones(8, 4), torch.ones(8, dtype=torch.long)
    loss = lambda net, b: (net(*b) - b[0][:, :2]).square().mean()
    picks = buffer.sample(8)
    # one example at a time: a draw may hold both heads
    mix.loss_fn = lambda b: sum(
        loss(model, (x[None], head[None])) for x, head in zip(*b)
    )
    router.optimizer.zero_grad()
    loss(model, batch).backward()
    router.optimizer.step()
    optimizer.zero_grad()
    old = sum(loss(twin, (x[None], head[None])) for x, head in zip(*picks))
    (0.5 * loss(twin, batch) + 0.5 * old).backward()
    optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"routing": "decoupled"}, {"strength": 0.0}, {"cls": AGEM}],
)
@pytest.mark.filterwarnings("ignore")
def test_elsewhere_such_a_head_stays_as_it_is(options):
    moved, model, _ = heads_in_turn(**options)
    assert moved == 0.0 and model.heads[0].weight.grad is None


def test_a_step_that_fails_leaves_no_gradient_behind():
    _, model, router = heads_in_turn()
    optimizer = router.optimizer

    def fails(*_):
        raise RuntimeError("stop")

    handle = optimizer.register_step_pre_hook(fails)
    model(torch.ones(8, 4), torch.ones(8)).sum().backward()
    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step()
    handle.remove()
    assert model.heads[0].weight.grad is not None
    router.close()
    assert model.heads[0].weight.grad is None


def test_no_step_outlives_itself():
    "A cycle would keep the gradients of past steps until Python looks."
    seen, made = [], module.new_step

    def watched(*args, **options):
        step = made(*args, **options)
        seen.append(weakref.ref(step))
        return step

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    loss = lambda batch: model(batch).square().mean()
    optimizer = torch.optim.Adam(model.parameters())
    edit = dmr.ReplayMix(dmr.ReplayBuffer(capacity=8), loss, fraction=None)
    router = dmr.MomentRouter(model, optimizer, edit, "shared", 0.5)
    gc.disable()
    try:
        module.new_step = watched
        for _domain in range(2):
            for _ in range(4):
                show(router, loss, torch.randn(6, 4))
                optimizer.step()
            router.consolidate()
        assert len(seen) == 8
        assert not any(ref() is not None for ref in seen[:-1])
    finally:
        module.new_step = made
        gc.enable()


@pytest.mark.parametrize("between", [False, True])
def test_examples_of_another_length_are_refused_at_the_first_batch(between):
    "Not at the end of the domain, which would then never end."
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn = lambda x: model(x.float().mean(1, keepdim=True)).square().mean()
    buffer = dmr.ReplayBuffer(capacity=4)
    edit = dmr.ReplayMix(buffer, loss_fn, fraction=None)
    router = MomentRouter(model, optimizer, edit)
    show(router, loss_fn, torch.ones(4, 12))
    optimizer.step()
    if between:
        router.consolidate()
    for length in (16, 1):
        with pytest.raises(ValueError, match=rf"\({length},\), earlier ones"):
            router.observe(torch.ones(4, length))
    show(router, loss_fn, torch.ones(4, 12))
    optimizer.step()
    router.consolidate()
    assert router.domains == 1 + between
