"""Mixtures of experts as transformers stacks them: each expert's weights have
directions of their own.
"""

import pytest
import torch
from torch import nn

import dmr
from dmr.routing.modification import find_targets

transformers = pytest.importorskip("transformers")

COMMON = dict(
    vocab_size=32,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=32,
)
SIZES = dict(intermediate_size=16, **COMMON)


def mixtral():
    config = transformers.MixtralConfig(num_local_experts=4, **SIZES)
    return transformers.MixtralForCausalLM(config)


def qwen3():
    config = transformers.Qwen3MoeConfig(
        num_experts=4, moe_intermediate_size=16, head_dim=6, **SIZES
    )
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe():
    config = transformers.OlmoeConfig(num_experts=4, **SIZES)
    return transformers.OlmoeForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        num_local_experts=4, head_dim=6, pad_token_id=0, eos_token_id=1, **SIZES
    )
    return transformers.GptOssForCausalLM(config)


def jetmoe():
    "Experts of attention as well; each stack is a module of its own."
    sizes = SIZES | {"num_key_value_heads": 2, "kv_channels": 8}
    config = transformers.JetMoeConfig(num_local_experts=4, **sizes)
    return transformers.JetMoeForCausalLM(config)


MODELS = {
    "mixtral": (mixtral, False),
    "qwen3": (qwen3, False),
    "olmoe": (olmoe, False),
    "gpt_oss": (gpt_oss, True),  # (experts, in, out)
    "jetmoe": (jetmoe, False),
}


def made(kind):
    torch.manual_seed(0)
    make, transposed = MODELS[kind]
    model = make().double().train()
    model.set_experts_implementation("eager")
    return model, transposed


def loss_on(model):
    return lambda x: model(input_ids=x, labels=x, use_cache=False).loss


def texts(seed, n=4):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (3, 9), generator=draw) for _ in range(n)]


def train(model, optimizer, seed):
    for x in texts(seed):
        optimizer.zero_grad()
        loss_on(model)(x).backward()
        optimizer.step()


def stacks(model):
    return {n: p for n, p in model.named_parameters() if p.ndim == 3}


@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_but_the_embeddings_is_found(kind):
    model, transposed = made(kind)
    covered = {target.parameter for target in find_targets(model).values()}
    for name, p in model.named_parameters():
        bias = "bias" in name  # gpt-oss has one for each expert
        matrix = p.ndim > 1 and not bias and "embed_tokens" not in name
        assert (name in covered) is matrix, name
    assert len(stacks(model)) == (4 if kind == "jetmoe" else 2)
    for target in find_targets(model).values():
        if target.part is not None:
            x = target.of(target.param)
            assert target.transposed is transposed
            up = "gate_up" in target.name or "input_linear" in target.name
            inputs = 12 if up else 16
            assert target.fan_in == inputs == x.shape[0 if transposed else 1]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("overlap", [False, True])
def test_each_expert_stands_still_on_its_own_directions(kind, overlap):
    model, transposed = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    strength = dmr.OverlapAware(1.0) if overlap else 1.0
    projection = dmr.Projection(rank=3, every=1)
    router = dmr.MomentRouter(
        model, optimizer, projection, "displacement", strength, track_step=1
    )
    rows = {}
    for x in texts(1):
        loss_on(model)(x).backward()
        for name, p in stacks(model).items():
            for e in range(4):
                g = p.grad[e].T if transposed else p.grad[e]
                rows.setdefault(f"{name}[{e}]", []).append(g.clone())
        model.zero_grad()
    router.protect(texts(1), loss_on(model))
    for name, steps in rows.items():
        V = torch.linalg.svd(torch.cat(steps)).Vh[:3].T
        U = projection.bases[name]
        torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-8, rtol=0)
    if overlap:
        return  # it is α = 1 only in the limit; that it runs is what counts
    before = {n: p.detach().clone() for n, p in stacks(model).items()}
    train(model, optimizer, 2)
    for name, p in stacks(model).items():
        for e in range(4):
            moved = (p.detach() - before[name])[e]
            moved = moved.T if transposed else moved
            inside = (moved @ projection.bases[f"{name}[{e}]"]).norm()
            assert moved.norm() > 1e-3 and inside < 1e-13
    assert router.last["protected_step_norm"] < 1e-9


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("routing", ["shared", "decoupled", "denominator"])
def test_the_edit_of_a_stack_is_that_of_its_experts(kind, routing):
    "Against the same projection on g, written out in loops."
    model, transposed = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    projection = dmr.Projection(rank=3, every=1)
    dmr.MomentRouter(model, optimizer, projection, routing, 0.7).protect(
        texts(1), loss_on(model)
    )
    loss_on(model)(texts(2)[0]).backward()
    grads = {n: p.grad.clone() for n, p in stacks(model).items()}
    wanted = {}
    for name, g in grads.items():
        edited = g.clone()
        for e in range(4):
            U = projection.bases[f"{name}[{e}]"]
            matrix = g[e].T if transposed else g[e]
            matrix = matrix - 0.7 * matrix @ U @ U.T
            edited[e] = matrix.T if transposed else matrix
        wanted[name] = edited
    optimizer.step()
    for name, p in stacks(model).items():
        state = optimizer.state[p]
        m = grads[name] if routing == "denominator" else wanted[name]
        v = grads[name] if routing == "decoupled" else wanted[name]
        torch.testing.assert_close(state["exp_avg"], 0.1 * m)
        torch.testing.assert_close(state["exp_avg_sq"], 0.001 * v.square())
        torch.testing.assert_close(p.grad, grads[name])  # given back


def test_an_expert_without_tokens_has_no_direction_and_trains_on():
    model, _ = made("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    projection = dmr.Projection(rank=3, every=1)
    router = dmr.MomentRouter(model, optimizer, projection, "displacement", 1.0)
    one = [torch.full((1, 5), 7)]
    with torch.no_grad():  # a router that sends this token to two experts
        model.get_parameter("model.layers.0.mlp.gate.weight").zero_()
    router.protect(one, loss_on(model))
    ranks = [
        projection.bases[f"model.layers.0.mlp.experts.down_proj[{e}]"].shape[1]
        for e in range(4)
    ]
    assert sorted(ranks)[:2] == [0, 0] and min(sorted(ranks)[2:]) > 0
    idle = ranks.index(0)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    before = weight.detach().clone()
    train(model, optimizer, 3)
    assert (weight.detach() - before)[idle].norm() > 0


def test_state_and_summary_of_experts():
    model, _ = made("mixtral")
    optimizer = torch.optim.AdamW(model.parameters())
    projection = dmr.Projection(rank=3, every=1)
    router = dmr.MomentRouter(
        model, optimizer, projection, track_inflation=True
    )
    router.protect(texts(1), loss_on(model))
    train(model, optimizer, 1)
    name = "model.layers.0.mlp.experts.down_proj"
    assert set(router.inflation()) == set(projection.bases)
    (line,) = [x for x in router.summary().splitlines() if name in x]
    assert "[0..3]" in line and "protected    3" in line
    other, _ = made("mixtral")
    twin = dmr.MomentRouter(
        other,
        torch.optim.AdamW(other.parameters()),
        dmr.Projection(rank=3, every=1),
        track_inflation=True,
    )
    twin.load_state_dict(router.state_dict())
    for key, U in projection.bases.items():
        assert torch.equal(U, twin.modification.bases[key])


def test_a_basis_for_one_expert_may_be_given_and_not_for_a_stack():
    model, _ = made("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    U = torch.eye(16)[:, :2].double()
    given = dmr.Projection(bases={f"{name}[2]": U})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    dmr.MomentRouter(model, optimizer, given, "displacement", 1.0)
    before = model.get_parameter(name).detach().clone()
    train(model, optimizer, 1)
    moved = (model.get_parameter(name).detach() - before) @ U
    assert moved[2].norm() < 1e-13 and moved[[0, 1, 3]].norm() > 1e-3
    model, _ = made("mixtral")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"such weights are .*down_proj\[3\]"):
        dmr.MomentRouter(model, optimizer, dmr.Projection(bases={name: U}))


def test_frozen_experts_are_left_out():
    model, _ = made("mixtral")
    for p in stacks(model).values():
        p.requires_grad_(False)
    assert all(t.part is None for t in find_targets(model).values())


def test_a_stack_of_another_kind_is_no_mixture():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Parameter(torch.zeros(3, 5, 7))
            self.down_proj = nn.Parameter(torch.zeros(3, 11, 4))

    assert not find_targets(Odd())
