"""Adapters: what has none is refused, a quantized base is left alone, and
memory and tokenizers that are missing are named early.
"""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers

import dmr.training.pretrained as pretrained
from dmr.frameworks.lora import (
    lora_layers,
    lora_memory,
    restart_lora,
    route_lora,
)
from dmr.methods.boundary import BoundaryProjection
from dmr.methods.consolidation import FisherMerge, merge
from dmr.methods.penalty import EWC
from dmr.methods.projection import Projection
from dmr.routing.consolidation import Interpolate
from dmr.routing.router import MomentRouter
from dmr.training.pretrained import (
    check_memory,
    load_pretrained,
    load_tokenizer,
    small_llama,
)

torch.set_num_threads(1)
BATCH = torch.randint(
    0, 257, (4, 17), generator=torch.Generator().manual_seed(1)
)


def adapted(config=None):
    model, _ = small_llama(width=16, layers=1, context=32)
    torch.manual_seed(0)
    return peft.get_peft_model(
        model,
        config or peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )


def over(model):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=3e-3,
        betas=(0.9, 0.95),
    )


def train(model, optimizer, router, steps=4):
    for _ in range(steps):
        router.observe(BATCH)
        optimizer.zero_grad()
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj"],
            feedforward_modules=[],
        ),
        peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
    ],
)
def test_adapters_without_linear_layers_are_refused(config):
    model = adapted(config)
    with pytest.raises(
        ValueError,
        match=(
            r"has no LoRA adapter on a linear layer.*target_modules=\['q_proj'"
        ),
    ):
        route_lora(model, over(model), Projection(rank=2))


class Int8Linear(nn.Linear):
    "A linear layer whose weight is stored in eight bits, one scale a row."

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter(
            (layer.weight.detach() / scale).round().to(torch.int8),
            requires_grad=False,
        )

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("routing", ["shared", "decoupled", "displacement"])
def test_over_a_quantized_base_the_adapters_are_routed_and_the_base_stays(
    routing,
):
    model = adapted()
    for layer in lora_layers(model).values():
        layer.base_layer = Int8Linear(layer.base_layer)
    base = {
        n: p.clone()
        for n, p in model.named_parameters()
        if p.dtype == torch.int8
    }
    optimizer = over(model)
    router = route_lora(
        model,
        optimizer,
        Projection(rank=2, every=1),
        routing,
        0.9,
        protect="both",
    )
    train(model, optimizer, router)
    router.consolidate()
    train(model, optimizer, router)
    assert router.last["alpha"] == 0.9 and len(router.modification.bases) == 4
    assert len(base) == 2 and all(
        torch.equal(p, dict(model.named_parameters())[n])
        for n, p in base.items()
    )
    with pytest.raises(
        ValueError, match=r"is quantized \(torch.int8\).*keep the adapter"
    ):
        restart_lora(model, optimizer, router)


def test_adapters_with_magnitudes_of_their_own_are_not_merged():
    layers = ["q_proj", "down_proj"]
    model = adapted(peft.LoraConfig(use_dora=True, target_modules=layers))
    optimizer = over(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="magnitudes.*use_dora=False"):
        restart_lora(model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


class Convolutions(nn.Module):
    "Of one and of nine weights an input."

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("kind", ["transposed", "convolution"])
def test_adapters_of_other_layers_than_linear_ones_are_merged(kind):
    "Of a weight that is stored the other way round, as in GPT-2."
    torch.manual_seed(0)
    if kind == "transposed":
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(vocab_size=257, **sizes)
        targets = ["c_attn", "c_proj"]  # (16, 48), (16, 16) and (64, 16)
        model, shown = transformers.GPT2LMHeadModel(config), BATCH
        told = lambda x: model(input_ids=x).logits
    else:
        model, targets = Convolutions(), ["first", "second"]
        shown, told = torch.randn(4, 3, 5, 5), lambda x: model(x)
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(model, config).eval()
    optimizer = over(model)
    router = route_lora(model, optimizer, Projection(rank=2, every=1))
    first = told(shown).detach()
    for _ in range(4):
        optimizer.zero_grad()
        told(shown).square().mean().backward()
        optimizer.step()
    router.consolidate()
    before = told(shown).detach()
    assert (before - first).abs().max() > 1e-3
    renewed = restart_lora(model, optimizer, router)
    assert renewed == len(lora_layers(model)) >= 2
    torch.testing.assert_close(told(shown), before, rtol=1e-4, atol=1e-5)
    for name, layer in lora_layers(model).items():
        A = layer.lora_A["default"].weight
        U = router.modification.bases[f"{name}.lora_A.default.weight"]
        assert (A.flatten(1) @ U).abs().max() < 1e-6 < A.abs().max()
        assert not layer.lora_B["default"].weight.any()


def test_a_merge_moves_the_adapters_alone():
    "As the free function does, from the raw gradients of the adapters."
    model = adapted()
    optimizer, seen = over(model), []
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rest = {n: p.clone() for n, p in model.named_parameters() if n not in own}
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({n: p.grad.square() for n, p in own.items()})
    )
    rule, edit = FisherMerge(0.6), Projection(rank=2, every=1)
    router = route_lora(
        model, optimizer, edit, protect="both", consolidation=rule
    )
    ends, fishers = [], []
    for _ in range(2):
        train(model, optimizer, router)
        ends.append({n: p.detach().clone() for n, p in own.items()})
        mean = lambda n: torch.stack([s[n] for s in seen]).mean(0)
        fishers.append({n: mean(n) for n in own})
        router.consolidate()
        seen.clear()
    expected = merge(*ends, *fishers, 0.6)
    for name, p in own.items():
        torch.testing.assert_close(p.detach(), expected[name])
    assert set(rule.past) == set(own) and len(own) == 4
    assert any(not torch.equal(p, ends[1][n]) for n, p in own.items())
    named = dict(model.named_parameters())
    assert all(torch.equal(p, named[n]) for n, p in rest.items())


def test_a_model_without_tokenizer_is_named_before_its_weights_are_read(
    tmp_path, monkeypatch
):
    import transformers

    small_llama(width=16, layers=1)[0].save_pretrained(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: pytest.fail("weights were read"),
    )
    with pytest.raises(
        ValueError, match="has no tokenizer.*pass tokenizer='NAME'"
    ):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model 'mine' has no tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"), "mine")


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    tmp_path, monkeypatch
):
    import transformers

    small_llama(width=16, layers=1)[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(
            config
            | {
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
            }
        )
    )
    monkeypatch.setattr(pretrained, "available_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: pytest.fail("weights were read"),
    )
    with pytest.raises(
        MemoryError,
        match=(
            r"needs about \d+\.\d GB to load in float32; 8\.0 GB are free\."
            r" Pass dtype='bfloat16'"
        ),
    ):
        load_pretrained(tmp_path)
    assert check_memory("fits", 1_000_000_000, torch.bfloat16) < 8_000_000_000
    with pytest.raises(
        MemoryError, match="'large' has 3,000,000,000 parameters"
    ):
        check_memory("large", 3_000_000_000)


def test_directions_at_the_boundary_keep_the_router_small():
    """Between steps a router over adapters holds bases and a few windows: at
    most a twentieth of the optimizer's state beyond the bases.
    """
    model = adapted(
        peft.LoraConfig(
            r=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]
        )
    )
    optimizer = over(model)
    loss_fn = lambda batch: model(input_ids=batch, labels=batch).loss
    router = route_lora(
        model,
        optimizer,
        BoundaryProjection(loss_fn, rank=2, examples=2),
        protect="both",
    )
    for _ in range(2):
        train(model, optimizer, router)
        memory = lora_memory(model, optimizer, router)
        assert memory["router_beyond_bases_over_state"] <= 0.05, memory
        router.consolidate()
    assert router.modification.bases[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    ].shape == (16, 4)


@pytest.mark.parametrize(
    "routing", ["shared", "decoupled", "denominator", "displacement"]
)
def test_directions_at_the_boundary_continue_bit_identically(routing):
    def begin():
        model = adapted()
        optimizer = over(model)
        loss_fn = lambda batch: model(input_ids=batch, labels=batch).loss
        return (
            model,
            optimizer,
            route_lora(
                model,
                optimizer,
                BoundaryProjection(loss_fn, rank=2),
                routing,
                0.9,
            ),
        )

    model, optimizer, router = begin()
    train(model, optimizer, router)
    router.consolidate()
    train(model, optimizer, router, 2)
    saved = [
        {k: v.clone() for k, v in model.state_dict().items()},
        optimizer.state_dict(),
        router.state_dict(),
    ]
    import copy

    saved = copy.deepcopy(saved)
    train(model, optimizer, router, 2)
    router.consolidate()
    again, second, other = begin()
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    train(again, second, other, 2)
    other.consolidate()
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), again.parameters())
    )
    assert all(
        torch.equal(U, other.modification.bases[n])
        for n, U in router.modification.bases.items()
    )


def test_directions_at_the_boundary_are_those_of_the_gradients():
    """A layer whose inputs have few directions: the basis spans them, and
    within the call neither p.grad nor the weights move.
    """
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(20, 3)).Q
    model = nn.Linear(20, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn = lambda batch: model(batch["x"]).square().mean()
    router = MomentRouter(
        model,
        optimizer,
        BoundaryProjection(loss_fn, rank=3, examples=12, batch_size=4),
    )
    for _ in range(4):
        batch = {"x": torch.randn(8, 3) @ axes.T}
        router.observe(batch)
        optimizer.zero_grad()
        loss_fn(batch).backward()
        optimizer.step()
    grad, weight = model.weight.grad.clone(), model.weight.detach().clone()
    router.consolidate()
    U = router.modification.bases["weight"]
    assert torch.linalg.svdvals(U.T @ axes).min() > 0.999
    assert torch.equal(model.weight.grad, grad) and torch.equal(
        model.weight, weight
    )
    assert not router.modification.sketches
    with pytest.raises(ValueError, match=r"call router.observe\(batch\)"):
        router.consolidate()


@pytest.mark.parametrize(
    "make",
    [
        dict(consolidation=FisherMerge()),
        dict(consolidation=Interpolate(0.5)),
        dict(modification=EWC(None, 50.0), strength=1.0),
    ],
)
def test_what_was_known_of_an_adapter_is_not_put_back_on_top_of_it(make):
    "After a restart, steps at a rate of zero leave the model as it is."
    model, make = adapted(), dict(make)
    optimizer = over(model)
    edit = make.pop("modification", None)
    if edit is not None:
        edit.fisher_fn = lambda x: model(input_ids=x, labels=x).loss
    router = MomentRouter(model, optimizer, edit, **make)
    train(model, optimizer, router)
    router.consolidate()
    restart_lora(model, optimizer, router)
    before = model(input_ids=BATCH).logits.detach()
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if edit is None else 1e-12
    train(model, optimizer, router)
    router.consolidate()
    after = model(input_ids=BATCH).logits.detach()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_only_adapters_in_use_are_merged_and_each_once():
    model = adapted()
    optimizer = over(model)
    model.add_adapter("other", model.peft_config["default"])
    train(model, optimizer, MomentRouter(model, optimizer))
    other = {
        n: nn.init.ones_(p) for n, p in model.named_parameters() if "other" in n
    }
    before = model(input_ids=BATCH).logits.detach()
    assert restart_lora(model, optimizer) and len(other) == 4
    after = model(input_ids=BATCH).logits.detach()
    torch.testing.assert_close(after, before)
    assert all(bool((p == 1).all()) for p in other.values())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"twice; call model.unmerge_adapter"):
        restart_lora(model, optimizer)
