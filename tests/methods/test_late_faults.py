"""What would be noticed only after a domain was trained, or never."""

import copy
from itertools import product

import pytest
import torch
from conftest import basis, regression, train
from torch import nn

import dmr
from dmr.methods.agem import AGEM
from dmr.methods.controls import RandomBasis
from dmr.methods.gpm import GPM, SGP
from dmr.methods.ogd import OGD
from dmr.methods.penalty import EWC, SI
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))

    def forward(self, x, head):
        return self.heads[head](self.trunk(x).tanh())


def in_turn(edit, steps=40):
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, edit)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(5, 6), step % 2).square().sum().backward()
        optimizer.step()
    return router


@pytest.mark.parametrize("source", ["gradients", "inputs"])
def test_heads_trained_in_turn_are_both_protected(source):
    router = in_turn(dmr.Projection(rank=2, every=10, source=source))
    layers = router.consolidate()["layers"]
    assert [layers[f"heads.{i}.weight"]["rank"] for i in (0, 1)] == [2, 2]


def test_a_layer_that_was_never_fed_has_captured_nothing():
    model = TwoHeads()
    optimizer = torch.optim.AdamW(model.parameters())
    router = MomentRouter(model, optimizer, dmr.Projection(rank=2, every=1))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(5, 6), 0).square().sum().backward()
        optimizer.step()
    layers = router.consolidate()["layers"]
    assert layers["heads.1.weight"] == {"rank": 0, "fan_in": 8}
    assert layers["heads.0.weight"]["captured"] > 0.5


def test_the_counts_go_along_when_a_run_is_resumed():
    whole = in_turn(dmr.Projection(rank=2, every=4), steps=7)
    state = copy.deepcopy(whole.state_dict())
    again = in_turn(dmr.Projection(rank=2, every=4), steps=1)
    again.load_state_dict(state)
    assert again.modification.counts == whole.modification.counts
    assert again.modification.counts["heads.1.weight"] == 3
    old = copy.deepcopy(state)
    del old["edit"]["counts"]  # version 0.2
    again.load_state_dict(old)
    assert set(again.modification.counts.values()) == {7}


def test_frozen_layers_cost_no_sketch_until_they_are_trained():
    model, loss = regression()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    edit = dmr.Projection(rank=2, every=1)
    router = MomentRouter(model, optimizer, edit)
    assert set(edit.sketches) == {"2.weight"}
    train(model, loss, optimizer, 2)
    frozen = router.state_dict()
    model[0].requires_grad_(True)
    train(model, loss, optimizer, 2)
    assert set(edit.sketches) == {"0.weight", "2.weight"}
    thawed = router.state_dict()
    router.load_state_dict(frozen)
    assert float(edit.sketches["0.weight"].energy) == 0
    router.load_state_dict(thawed)
    assert router.consolidate()["layers"]["0.weight"]["rank"] == 2


def test_a_projection_with_nothing_to_protect_says_so_at_once():
    model, _ = regression()
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)  # BitFit: biases alone
    optimizer = torch.optim.AdamW(model.parameters())
    for edit in (dmr.Projection(rank=2), GPM(lambda b: model(b).sum())):
        with pytest.raises(ValueError, match="'0.weight', are frozen, so a pr"):
            MomentRouter(model, optimizer, edit)
    assert not optimizer._optimizer_step_pre_hooks
    MomentRouter(model, optimizer, consolidation=dmr.FisherMerge())


@pytest.mark.parametrize("kind", ["IA3Config", "OFTConfig", "BitFit", "LoRA"])
def test_adapters_without_a_matrix_are_told_at_the_start(kind):
    peft = pytest.importorskip("peft")
    from dmr.training.pretrained import small_llama

    model, _ = small_llama(width=16, layers=1, context=32)
    names = {"target_modules": ["q_proj", "v_proj"]}
    if kind == "BitFit":
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
    elif kind == "LoRA":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **names))
    else:
        if kind == "IA3Config":
            names["feedforward_modules"] = []
        else:
            names |= {"oft_block_size": 4}
        model = peft.get_peft_model(model, getattr(peft, kind)(**names))
    trained = [p for p in model.parameters() if p.requires_grad]
    make = lambda: MomentRouter(
        model, torch.optim.AdamW(trained), dmr.Projection(rank=2)
    )
    if kind == "LoRA":
        assert len(make().modification.sketches) == 4
    else:
        with pytest.raises(ValueError, match="IA3, BitFit, OFT"):
            make()


def knowing(edit):
    "A model, and a closed router whose method knows one domain."
    model, loss = regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, edit)
    x = torch.randn(20, 6)
    router.observe(x)
    train(model, loss, optimizer, 3)
    router.consolidate()
    router.close()
    return model, loss


@pytest.mark.parametrize(
    "make",
    [
        lambda: dmr.Projection(rank=2, every=1, importance=3.0),
        lambda: RandomBasis(2, every=1),
        lambda: SGP(lambda x: x.sum()),
    ],
)
def test_a_reused_projection_keeps_what_it_knows_or_refuses(make):
    edit = make()
    if isinstance(edit, SGP):
        model, _ = regression()
        edit = SGP(lambda x: model(x).sum())
        optimizer = torch.optim.AdamW(model.parameters())
        router = MomentRouter(model, optimizer, edit)
        router.observe(torch.randn(20, 6))
        router.consolidate()
        router.close()
    else:
        model, _ = knowing(edit)
    before = copy.deepcopy(edit.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    narrow = lambda: MomentRouter(model, optimizer, edit, exclude="2.*")
    with pytest.raises(ValueError, match="which this router leaves out"):
        narrow()
    again = MomentRouter(model, optimizer, edit)
    assert str(edit.state_dict()) == str(before)
    assert again.modification.edited()
    again.close()
    other, _ = regression(seed=1)
    with pytest.raises(ValueError, match="directions of another model"):
        MomentRouter(other, torch.optim.AdamW(other.parameters()), edit)
    assert str(edit.state_dict()) == str(before)


def test_given_bases_may_be_used_for_one_model_after_the_other():
    U = basis(6, 2, dtype=torch.float32)
    edit = dmr.Projection(bases={"0.weight": U})
    for seed in (0, 1):
        model, _ = regression(seed)
        optimizer = torch.optim.AdamW(model.parameters())
        MomentRouter(model, optimizer, edit).close()
    assert torch.equal(edit.bases["0.weight"], U)


def test_a_misspelt_basis_is_told_the_names_that_are_near():
    model, _ = regression()
    optimizer = torch.optim.AdamW(model.parameters())
    U = basis(6, 2, dtype=torch.float32)
    for more in ({}, {"rank": 1}):
        with pytest.raises(
            ValueError, match=r"'0.wieght'.*such weights are \['0.weight', '2.w"
        ):
            MomentRouter(
                model, optimizer, dmr.Projection(bases={"0.wieght": U}, **more)
            )


def protecting(kind, strength):
    "A router with something to protect, and its loss."
    model, loss = regression()
    on = lambda x: model(x).square().mean()
    edit = {
        "agem": lambda: AGEM(dmr.ReplayBuffer(capacity=8), on),
        "replay": lambda: dmr.ReplayMix(dmr.ReplayBuffer(capacity=8), on),
        "ogd": lambda: OGD(lambda x: model(x)[0, 0], vectors=4),
        "ewc": lambda: EWC(on, samples=4),
        "si": lambda: SI(),
        "projection": lambda: dmr.Projection(rank=2, every=1),
    }[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    router = MomentRouter(model, optimizer, edit, strength=strength)
    router.observe(torch.randn(20, 6), total=20)
    train(model, loss, optimizer, 3)
    router.consolidate()
    return router, loss


@pytest.mark.parametrize(
    "kind, follows",
    product(
        ["agem", "ogd", "ewc", "si", "projection", "replay"], [False, True]
    ),
)
def test_a_step_without_gradients_does_nothing(kind, follows):
    router, loss = protecting(kind, dmr.OverlapAware() if follows else None)
    train(router.model, loss, router.optimizer, 1)
    before = [p.detach().clone() for p in router.model.parameters()]
    average = copy.deepcopy(router.strength.state_dict())
    router.optimizer.zero_grad()
    router.optimizer.step()
    for p, q in zip(router.model.parameters(), before):
        assert torch.equal(p, q)
    assert str(router.strength.state_dict()) == str(average)
    train(router.model, loss, router.optimizer, 1)  # and goes on
    assert not torch.equal(before[0], next(router.model.parameters()))
