"""Mistakes that would go unseen: each is named, and nothing is changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.methods.controls import LastTaskProjection
from dmr.methods.gpm import GPM
from dmr.methods.rivals import RegMean
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
    with pytest.warns(UserWarning, match="all 4 parameters.*frozen") as said:
        router = dmr.MomentRouter(model, optimizer, consolidation=merge())
    assert len(said) == 1 and said[0].filename == __file__
    router.anchor()
    start = weights(model)
    model.requires_grad_(True)  # what is unfrozen later is merged
    train(model, optimizer)
    ends = weights(model)
    if merge is not dmr.FisherMerge:
        router.consolidate()
        for name, p in model.named_parameters():
            torch.testing.assert_close(
                p.detach(), (start[name] + ends[name]) / 2
            )
    router.close()
    model.requires_grad_(False)[2].bias.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dmr.MomentRouter(model, optimizer, consolidation=merge())


def masked(seed=0):
    "A network with a frozen constant that holds infinities."
    model = network(seed)
    mask = torch.tensor([0.0, -torch.inf, 1.0])
    model.mask = nn.Parameter(mask, requires_grad=False)
    return model


@pytest.mark.parametrize(
    "merge",
    [
        dmr.FisherMerge,
        lambda: dmr.FisherMerge(storage=torch.bfloat16),
        lambda: dmr.FisherMerge(storage=torch.float8_e4m3fn),
        lambda: Interpolate(0.5),
        lambda: RegMean(loss_fn=lambda x: x.square().mean()),
    ],
)
def test_a_frozen_constant_with_infinities_stops_no_merge(merge):
    model = masked()
    optimizer = adamw(model)
    own = merge()
    if isinstance(own, RegMean):
        own.loss_fn = loss_on(model)
    router = dmr.MomentRouter(model, optimizer, consolidation=own)
    router.anchor()
    kept = model.mask.detach().clone()
    for seed in range(3):
        ends = weights(model)
        for x in batches(seed):
            router.observe(x)
        train(model, optimizer, seed)
        ends = weights(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            router.consolidate()
        assert torch.equal(model.mask, kept)
    assert not same(weights(model), ends)
    assert all(
        p.isfinite().all() for n, p in weights(model).items() if n != "mask"
    )
    model.mask.data[1] = torch.nan  # it is a constant no more
    with pytest.raises(ValueError, match="'mask' has NaN"):
        router.consolidate()


@pytest.mark.parametrize(
    "storage", [None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_a_router_with_a_frozen_constant_is_saved_and_loaded(storage, tmp_path):
    model = masked()
    optimizer = adamw(model)
    merge = dmr.FisherMerge(storage=storage)
    router = dmr.MomentRouter(model, optimizer, consolidation=merge)
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1)
    router.save(tmp_path / "router.pt")
    state = router.state_dict()
    router.close()
    again = dmr.MomentRouter.load(tmp_path / "router.pt", model, optimizer)
    again.load_state_dict(state)
    again.consolidate()
    assert torch.equal(model.mask, masked().mask)
    state["consolidation"]["before"]["0.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*\['before'\]\['0.bias'\]"):
        again.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_one_byte_are_merged(dtype):
    model = network()
    scale = torch.ones(3).to(dtype)
    model.scale = nn.Parameter(scale, requires_grad=False)
    optimizer = adamw(model)
    router = dmr.MomentRouter(model, optimizer, consolidation=Interpolate(0.5))
    router.anchor()
    train(model, optimizer)
    router.consolidate()
    assert torch.equal(model.scale.float(), torch.ones(3))
    old = {"w": torch.tensor([1.0, 2.0]).to(dtype)}
    new = {"w": torch.tensor([3.0, 2.0]).to(dtype)}
    for fisher in ({}, {"w": torch.ones(2)}):
        out = dmr.merge(old, new, fisher, fisher)["w"]
        assert out.dtype == dtype and out.tolist() == [2.0, 2.0]
    new["w"] = torch.tensor([float("nan"), 2.0]).to(dtype)
    with pytest.raises(ValueError, match="'w' has NaN.*the new check"):
        dmr.merge(old, new, fisher, fisher)


@pytest.mark.parametrize("which", ["old", "new"])
def test_checkpoints_with_a_nan_are_not_merged(which):
    ones = {"w": torch.ones(3), "mask": torch.tensor([0.0, -torch.inf])}
    sides = {"old": ones, "new": copy.deepcopy(ones)}
    sides[which]["w"][1] = float("nan")
    fisher = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match=f"'w' has NaN.*the {which} check"):
        dmr.merge(*sides.values(), fisher, fisher)


@pytest.mark.parametrize("weight", [0.3, 0.7])
def test_equal_infinities_stay_and_others_are_not_merged(weight):
    old = {"w": torch.zeros(1), "mask": torch.tensor([0.0, -torch.inf])}
    new = {"w": torch.ones(1), "mask": torch.tensor([1.0, -torch.inf])}
    fisher = {"w": torch.ones(1)}
    out = dmr.merge(old, new, fisher, fisher, weight)
    expected = torch.tensor([weight, -torch.inf])
    torch.testing.assert_close(out["mask"], expected)
    torch.testing.assert_close(out["w"], torch.tensor([weight]))
    new["mask"][1] = 0.0
    with pytest.raises(ValueError, match="'mask' has NaN.*the old check"):
        dmr.merge(old, new, fisher, fisher, weight)


@pytest.mark.parametrize("curvature", ["gradients", "factored", "moment"])
def test_a_curvature_too_large_for_its_storage_changes_nothing(curvature):
    model = network()
    optimizer = adamw(model)
    with pytest.warns(UserWarning, match="holds none above 65504"):
        merge = dmr.FisherMerge(0.5, curvature=curvature, storage=torch.float16)
    method = dmr.Projection(rank=1, every=1)
    router = dmr.MomentRouter(model, optimizer, method, consolidation=merge)
    train(model, optimizer)
    router.consolidate()
    assert all(x.dtype == torch.float16 for x in merge.past.values())
    for x in batches(1):
        optimizer.zero_grad()
        (1e4 * loss_on(model)(x)).backward()
        optimizer.step()
    now, past = weights(model), copy.deepcopy(merge.past)
    with pytest.raises(ValueError, match="too large for the storage.*bfloat16"):
        router.consolidate()
    assert same(now, weights(model)) and same(past, merge.past)
    assert router.domains == 1 and method.fed
    merge.past["0.weight"][0, 0] = torch.inf
    merge.recorder.clear()
    with pytest.raises(ValueError, match="'0.weight' has NaN or infinite"):
        router.consolidate()


def test_a_past_too_large_for_its_storage_is_forgotten_whole():
    model = network()
    with pytest.warns(UserWarning, match="holds none above 65504"):
        merge = dmr.FisherMerge(0.5, storage=torch.float16)
    router = dmr.MomentRouter(model, adamw(model), consolidation=merge)
    with pytest.raises(ValueError, match="too large for the storage.*bfloat16"):
        router.protect(batches(), lambda x: 1e4 * loss_on(model)(x))
    assert router.domains == 0 and not merge.past and not merge.before


def test_an_optimizer_of_another_model_is_refused():
    model, twin = network(), network()
    optimizer = adamw(twin)
    words = r"AdamW steps no parameter of this Sequential.*AdamW\(model\.par"
    with pytest.raises(ValueError, match=words):
        dmr.MomentRouter(model, optimizer, dmr.Projection(rank=1))
    assert not optimizer._optimizer_step_pre_hooks
    dmr.MomentRouter(twin, optimizer)


def test_one_of_several_optimizers_may_step_something_else():
    model, critic = network(), nn.Linear(2, 1)
    pair = [adamw(model), adamw(critic)]
    with pytest.warns(UserWarning, match="2 parameters.*not the model's"):
        router = dmr.MomentRouter(model, pair, dmr.Projection(rank=1, every=1))
    for seed in range(2):
        for x in batches(seed):
            critic(model(x)).square().mean().backward()
            for each in pair:
                each.step()
                each.zero_grad()
        router.consolidate()
    assert router.domains == 2 and router.modification.bases["0.weight"].numel()


def test_an_optimizer_may_be_filled_after_its_router():
    model = network()
    optimizer = torch.optim.AdamW([{"params": []}], lr=1e-2)
    router = dmr.MomentRouter(model, optimizer, consolidation=Interpolate(0.5))
    optimizer.add_param_group({"params": [*model.parameters()]})
    router.anchor()
    before = weights(model)
    train(model, optimizer)
    after = weights(model)
    router.consolidate()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), (before[name] + after[name]) / 2)


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
    words = "1 parameters.*'2.weight', are no longer in the model"
    with pytest.warns(UserWarning, match=words):
        router.consolidate()
    train(model, optimizer, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate()  # once is enough


def test_a_warning_that_is_an_error_leaves_the_domain_open():
    model = network()
    heads = [nn.Linear(8, 2) for _ in range(2)]
    model[2] = heads[0]
    every = [
        *model[0].parameters(),
        *(p for x in heads for p in x.parameters()),
    ]
    optimizer = torch.optim.AdamW(every, lr=1e-2)
    model.other = heads[1]
    method = dmr.Projection(rank=1, every=1)
    router = dmr.MomentRouter(model, optimizer, method)
    del model.other
    train(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no longer in the model"):
            router.consolidate()
        assert router.domains == 0 and method.fed
        assert not any(U.shape[1] for U in method.bases.values())
        router.consolidate()
    assert router.domains == 1
    given = dmr.Projection(bases={"0.weight": torch.eye(6)[:, :2]})
    model = network()
    optimizer = adamw(model)
    router = dmr.MomentRouter(model, optimizer, given)
    train(model, optimizer)
    router.consolidate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Projection edited none"):
            router.consolidate()
    assert router.domains == 1


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
    with pytest.raises(ValueError, match="knows the weights of another model"):
        dmr.MomentRouter(other, adamw(other), consolidation=merge)


def test_a_merge_may_go_from_one_part_of_a_model_to_the_next():
    model, merge = network(), Interpolate(0.5)
    for part in (model[0], model[2]):  # the first router is left open
        optimizer = torch.optim.AdamW(part.parameters(), lr=1e-2)
        router = dmr.MomentRouter(model, optimizer, consolidation=merge)
        router.anchor()
        start = weights(part)
        train(model, optimizer)
        ends = weights(part)
        router.consolidate()
        for name, p in part.named_parameters():
            middle = (start[name] + ends[name]) / 2
            torch.testing.assert_close(p.detach(), middle)


def test_a_copy_of_a_merge_serves_another_model():
    model, optimizer, router = merging()
    train(model, optimizer)
    router.consolidate()
    twin = copy.deepcopy(router.consolidation)
    other = network(1)
    new = adamw(other)
    second = dmr.MomentRouter(other, new, consolidation=twin)
    assert twin.trained is second and twin.recorder.trained is second
    third = network(2)
    with pytest.raises(ValueError, match="this FisherMerge serves a router of"):
        dmr.MomentRouter(third, adamw(third), consolidation=twin)
    model, optimizer, router = copy.deepcopy((model, optimizer, router))
    train(model, optimizer, seed=1)  # a copied router goes on as it was
    assert router.consolidate()["consolidation"]["share"] < 1


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


def test_protect_with_everything_frozen_says_what_to_do():
    model = network().requires_grad_(False)
    router = dmr.MomentRouter(model, adamw(model))
    with pytest.raises(ValueError, match="unfreeze what is to be protected"):
        router.protect(batches(), loss_on(model))
    assert router.domains == 0


def test_a_past_that_is_shown_ends_a_domain_for_the_strength_too():
    model = network()
    optimizer = adamw(model)
    strength = dmr.OverlapAware(0.5, initial=0.0, restart=True)
    method = dmr.Projection(rank=1, every=1)
    router = dmr.MomentRouter(model, optimizer, method, strength=strength)
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1)
    assert float(strength.average) > 0
    kept = float(strength.average)
    with pytest.raises(ValueError, match="got no batch"):
        router.protect([], loss_on(model))
    assert float(strength.average) == kept
    router.protect(batches(2), loss_on(model))
    assert float(strength.average) == 0.0


def test_the_last_task_is_replaced_by_weights_too():
    model = network()
    optimizer = adamw(model)
    method = LastTaskProjection(rank=2, every=1)
    router = dmr.MomentRouter(model, optimizer, method)
    router.protect_weights()
    first = {name: U.clone() for name, U in method.bases.items()}
    train(model, optimizer)
    router.consolidate()
    for name, p in model.named_parameters():
        if name in first:
            p.data.normal_()
    router.protect_weights()
    for name, U in method.bases.items():
        assert U.shape == first[name].shape
        W = dict(model.named_parameters())[name]
        V = torch.linalg.svd(W.detach())[2][:2]  # (2, fan_in)
        own = U.T @ V.T  # (2, 2), orthogonal if the spaces are one
        torch.testing.assert_close(own @ own.T, torch.eye(2), atol=1e-4, rtol=0)
    kept = {name: U.clone() for name, U in method.bases.items()}
    with pytest.raises(ValueError):
        router.protect_weights(rank=0)
    assert same(kept, method.bases)


def test_a_past_of_examples_alone_is_no_domain_without_an_edit():
    model = network()
    method = GPM(loss_on(model), samples=8)
    router = dmr.MomentRouter(model, adamw(model), method)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the router saw no step")
        for seed in range(2):
            for x in batches(seed):
                router.observe(x)
            router.consolidate()
    assert router.domains == 2


def test_a_merge_by_examples_leaves_the_warning_to_the_router():
    model = network()
    optimizer = adamw(model)
    merge = RegMean(loss_fn=loss_on(model))
    method = dmr.Projection(bases={"0.weight": torch.eye(6)[:, :2]})
    router = dmr.MomentRouter(model, optimizer, method, consolidation=merge)

    def observed(seed):
        for x in batches(seed):
            router.observe(x)

    observed(0)
    train(model, optimizer)
    router.consolidate()
    observed(1)
    with pytest.warns(UserWarning, match="Projection edited none") as said:
        router.consolidate()
    assert len(said) == 1
