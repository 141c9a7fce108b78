"""Mistakes that would go unseen: each is named, and nothing is changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.routing.consolidation import Consolidation, Interpolate

torch.set_num_threads(1)
NO_STEP = "the router saw no step since the last boundary.*attach the router"


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batches(seed=0, n=6):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=draw) for _ in range(n)]


def loss_on(model):
    return lambda x: model(x).square().mean()


def train(model, optimizer, seed=0):
    for x in batches(seed):
        optimizer.zero_grad()
        loss_on(model)(x).backward()
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def merging(**settings):
    model = network()
    optimizer = adamw(model)
    merge = dmr.FisherMerge(**settings)
    router = dmr.MomentRouter(
        model, optimizer, routing="decoupled", consolidation=merge
    )
    return model, optimizer, router


@pytest.mark.parametrize("curvature", ["gradients", "factored", "moment"])
def test_a_domain_that_another_optimizer_trained_is_not_undone(curvature):
    model, optimizer, router = merging(curvature=curvature)
    train(model, optimizer)
    router.consolidate()
    train(model, adamw(model), seed=1)  # the router is on the old one
    trained, past = weights(model), copy.deepcopy(router.consolidation.past)
    with pytest.warns(UserWarning, match=NO_STEP) as said:
        report = router.consolidate()
    assert len(said) == 1 and said[0].filename == __file__
    assert report == {} and router.domains == 2
    assert same(weights(model), trained)
    # the next merge starts from here, with what is known of the past
    assert same(router.consolidation.before, trained)
    assert same(router.consolidation.past, past)
    train(model, optimizer, seed=2)
    ends = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < router.consolidate()["consolidation"]["share"] < 1
    for name, p in model.named_parameters():
        low, high = torch.minimum(trained[name], ends[name]), ends[name]
        high = torch.maximum(trained[name], high)
        assert ((p >= low - 1e-6) & (p <= high + 1e-6)).all()


def test_a_first_boundary_without_a_step():
    model, optimizer, router = merging()
    start = weights(model)
    with pytest.warns(UserWarning, match=NO_STEP):
        assert router.consolidate() == {}
    assert same(weights(model), start) and not router.consolidation.before
    train(model, optimizer)
    trained = weights(model)
    router.consolidate()  # the first that counts: it merges nothing
    assert same(weights(model), trained)
    assert same(router.consolidation.before, trained)


def test_a_boundary_right_after_protect():
    model, optimizer, router = merging()
    router.protect(batches(), loss_on(model))
    start, past = weights(model), copy.deepcopy(router.consolidation.past)
    with pytest.warns(UserWarning, match=NO_STEP):
        router.consolidate()
    assert same(weights(model), start)
    assert same(router.consolidation.past, past)
    train(model, optimizer, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert router.consolidate()["consolidation"]["share"] < 1


def test_a_second_boundary_in_a_row_changes_nothing():
    model, optimizer, router = merging()
    for seed in range(2):
        train(model, optimizer, seed)
        router.consolidate()
    merge, before = router.consolidation, weights(model)
    kept = copy.deepcopy(merge.state_dict())
    with pytest.warns(UserWarning, match=NO_STEP):
        router.consolidate()
    assert same(weights(model), before)
    for key in ("before", "past"):
        assert same(merge.state_dict()[key], kept[key])


def test_what_needs_no_gradient_merges_without_a_step():
    class Counted(Consolidation):
        merges = 0

        def merge(self):
            self.merges += 1
            return {"merges": self.merges}

    model = network()
    own = Counted()
    router = dmr.MomentRouter(model, adamw(model), consolidation=own)
    assert router.consolidate() == {"consolidation": {"merges": 1}}
    model = network()
    plain = Interpolate(0.5)
    router = dmr.MomentRouter(model, adamw(model), consolidation=plain)
    router.anchor()
    before = weights(model)
    train(model, adamw(model))
    after = weights(model)
    router.consolidate()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), (before[name] + after[name]) / 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["weight", "before", "curvature"])
def test_a_merge_of_what_is_not_finite_leaves_the_domain_open(bad, what):
    model = network()
    optimizer = adamw(model)
    method = dmr.Projection(rank=1, every=1)
    merge = dmr.FisherMerge()
    router = dmr.MomentRouter(
        model, optimizer, method, consolidation=merge, check_finite=False
    )
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1)
    broken = {
        "weight": model[2].weight.data,
        "before": merge.before["2.weight"],
        "curvature": merge.recorder.sums["2.weight"],
    }[what]
    kept = broken[0, 0].item()
    broken[0, 0] = bad
    before = copy.deepcopy(router.state_dict())
    now = weights(model)
    for move in (router.consolidate, merge.pull):
        with pytest.raises(ValueError, match="'2.weight'.*nothing was merged"):
            move()
    broken[0, 0] = kept
    assert before["domains"] == router.domains == 1
    assert same(before["edit"]["bases"], method.bases)
    assert method.fed  # what the domain taught is still there
    now["2.weight"] = weights(model)["2.weight"]
    assert same(now, weights(model))
    router.consolidate()
    assert router.domains == 2


@pytest.mark.parametrize("given", [None, Interpolate(0.5)])
def test_an_interpolation_with_a_nan_is_refused_too(given):
    model = network()
    optimizer = adamw(model)
    router = dmr.MomentRouter(model, optimizer, consolidation=given)
    once = {} if given else {"interpolate": 0.5}
    train(model, optimizer)
    router.consolidate(**once)
    model[0].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="'0.bias' has NaN"):
        router.consolidate(**once)
    assert router.domains == 1


@pytest.mark.parametrize("merge", [dmr.FisherMerge, lambda: Interpolate(0.5)])
def test_frozen_weights_have_nothing_to_merge(merge):
    model = network().requires_grad_(False)
    optimizer = adamw(model)
    with pytest.raises(ValueError, match="all 4 parameters.*are frozen"):
        dmr.MomentRouter(model, optimizer, consolidation=merge())
    assert not optimizer._optimizer_step_pre_hooks
    model[2].bias.requires_grad_(True)
    dmr.MomentRouter(model, optimizer, consolidation=merge())


@pytest.mark.parametrize("which", ["old", "new"])
def test_checkpoints_with_a_nan_are_not_merged(which):
    ones = {"w": torch.ones(3), "mask": torch.tensor([0.0, -torch.inf])}
    sides = {"old": ones, "new": copy.deepcopy(ones)}
    sides[which]["w"][1] = float("nan")
    fisher = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=f"'w' has NaN.*the {which} check"):
        dmr.merge(*sides.values(), fisher, fisher)


def test_an_optimizer_of_another_model_is_refused():
    model, twin = network(), network()
    optimizer = adamw(twin)
    words = r"AdamW steps no parameter of this Sequential.*AdamW\(model\.par"
    with pytest.raises(ValueError, match=words):
        dmr.MomentRouter(model, optimizer, dmr.Projection(rank=1))
    assert not optimizer._optimizer_step_pre_hooks
    pair = [adamw(model), optimizer]
    with pytest.raises(ValueError, match=words):
        dmr.MomentRouter(model, pair)
    dmr.MomentRouter(twin, optimizer)


@pytest.mark.parametrize("merge", [None, dmr.FisherMerge])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.RMSprop(p),
    ],
)
@pytest.mark.parametrize("routing", ["decoupled", "denominator"])
def test_a_routing_without_a_modification_says_that_it_does_nothing(
    routing, make, merge
):
    ends = []
    for given in (routing, None):
        model = network()
        optimizer = make(model.parameters())
        own = None if merge is None else merge()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            router = dmr.MomentRouter(
                model, optimizer, None, given, consolidation=own
            )
        words = f"routing={routing!r} does nothing here"
        assert sum(words in str(w.message) for w in said) == (given is routing)
        for seed in range(2):
            train(model, optimizer, seed)
            router.consolidate()
        ends.append(weights(model))
    assert same(*ends)
    with pytest.raises(ValueError, match="choose '"):
        dmr.MomentRouter(
            model, make(model.parameters()), dmr.Projection(rank=1), routing
        )


def test_muon_alone_says_what_it_leaves_untrained():
    model = network()
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.ndim == 2]
    rest = [p for p in named.values() if p.ndim != 2]
    muon = lambda: torch.optim.Muon(matrices)
    words = r"2 parameters, such as '0.bias', are trained by none.*\[muon, ada"
    with pytest.warns(UserWarning, match=words) as said:
        dmr.MomentRouter(model, muon(), consolidation=dmr.FisherMerge())
    assert said[0].filename == __file__
    few = torch.optim.AdamW(rest[:1])
    with pytest.warns(UserWarning, match="1 parameters, such as '2.bias'"):
        dmr.MomentRouter(model, [muon(), few], dmr.Projection(rank=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = [muon(), torch.optim.AdamW(rest)]
        dmr.MomentRouter(model, pair, dmr.Projection(rank=1))
        dmr.MomentRouter(model, torch.optim.AdamW(matrices))  # meant so
        for p in rest:
            p.requires_grad_(False)
        dmr.MomentRouter(model, muon(), dmr.Projection(rank=1))


def test_a_method_that_edited_no_step_of_a_domain_says_so():
    model = network()
    optimizer = adamw(model)
    method = dmr.Projection(bases={"0.weight": torch.eye(6)[:, :2]})
    router = dmr.MomentRouter(model, optimizer, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate()  # an open past, before any training
        train(model, optimizer)
        router.consolidate()
    train(model, adamw(model), seed=1)
    with pytest.warns(UserWarning, match="so Projection edited none") as said:
        router.consolidate()
    assert len(said) == 1 and said[0].filename == __file__
    grown = dmr.MomentRouter(
        model, adamw(model), dmr.Projection(rank=1, every=1)
    )
    with pytest.raises(ValueError, match="that the router is attached to"):
        grown.consolidate()


def test_a_parameter_that_was_exchanged_is_spoken_of():
    model, optimizer, router = merging()
    train(model, optimizer)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.warns(UserWarning, match="1 parameters.*'2.weight'.*replaced"):
        router.consolidate()


def test_a_merge_serves_one_set_of_weights():
    model, optimizer, router = merging()
    train(model, optimizer)
    router.consolidate()
    merge, other = router.consolidation, network()
    with pytest.raises(ValueError, match="this FisherMerge serves a router of"):
        dmr.MomentRouter(other, adamw(other), consolidation=merge)
    assert merge.trained is router
    new = adamw(model)  # of the same weights: it goes along
    router = dmr.MomentRouter(model, new, consolidation=merge)
    train(model, new, seed=1)
    assert router.consolidate()["consolidation"]["share"] < 1
    router.close()
    dmr.MomentRouter(other, adamw(other), consolidation=merge)


@pytest.mark.parametrize("merge", [None, dmr.FisherMerge])
def test_a_past_that_another_model_was_shown_is_none(merge):
    model, other = network(), network()
    own = None if merge is None else merge()
    router = dmr.MomentRouter(model, adamw(model), consolidation=own)
    with pytest.raises(ValueError, match="reaches no parameter that the opt"):
        router.protect(batches(), loss_on(other))
    assert router.domains == 0


def test_a_past_whose_curvature_overflows_is_forgotten_whole():
    model = network()
    method = dmr.Projection(rank=1, every=1)
    merge = dmr.FisherMerge(samples=1e37)
    router = dmr.MomentRouter(model, adamw(model), method, consolidation=merge)
    huge = lambda x: 1e4 * loss_on(model)(x)  # its squares times 1e37
    with pytest.raises(ValueError, match="nothing was merged"):
        router.protect(batches(), huge)
    assert router.domains == 0 and not merge.past and not merge.before
    assert all(not U.shape[1] for U in method.bases.values())


def test_an_empty_include_is_not_all():
    model = network()
    for empty in ([], ()):
        with pytest.raises(ValueError, match="names no weight; pass None"):
            dmr.MomentRouter(
                model, adamw(model), dmr.Projection(rank=1), include=empty
            )


@pytest.mark.parametrize(
    "storage, words",
    [
        (torch.int8, "would round the weights away"),
        ("bfloat16", "is no device; pass one, such as 'cpu'"),
    ],
)
def test_a_storage_that_holds_no_weights_is_refused(storage, words):
    with pytest.raises(ValueError, match=words):
        dmr.FisherMerge(storage=storage)


def test_half_precision_storage_is_spoken_of():
    with pytest.warns(UserWarning, match="takes squared gradients below"):
        dmr.FisherMerge(storage=torch.float16)
