"""The byte model across dtypes, devices, compilers and sizes."""

import pytest
import torch

from dmr.training.model import (
    SIZES,
    Size,
    build_model,
    next_byte_loss,
    rotary_table,
)

torch.set_num_threads(1)
TINY = Size(layers=2, width=32, heads=2)


def windows(n: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (n, length), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize("size", list(SIZES))
def test_parameter_counts(size):
    "The formula of the chapter, and the sizes that the names promise."
    model = build_model(size, context=8)
    count = sum(p.numel() for p in model.parameters())
    assert count == SIZES[size].parameters
    assert 0.8 < count / {"nano": 0.3e6, "small": 3e6, "base": 85e6}[size] < 1.2
    assert not any(
        isinstance(m, torch.nn.Linear) and m.bias is not None
        for m in model.modules()
    )


def test_matches_an_independent_forward():
    """The same logits from explicit matrices: rotation as a complex product,
    attention with a mask.
    """
    model = build_model(TINY, context=12, dtype=torch.float64)
    text = windows(2, 12)
    d, heads = TINY.width, TINY.heads
    hd = d // heads
    angle = torch.outer(
        torch.arange(12, dtype=torch.float64),
        1e4 ** (-torch.arange(hd // 2, dtype=torch.float64) * 2 / hd),
    )
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(x):  # (time, hd) -> the same
        z = torch.complex(x[:, : hd // 2], x[:, hd // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    def normalised(x, gain):
        return (
            (x - x.mean(-1, keepdim=True))
            / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            * gain
        )

    mask = torch.full((12, 12), -torch.inf, dtype=torch.float64).triu(1)
    for b in range(2):
        x = model.embedding.weight[text[b].long()]
        for block in model.blocks:
            q, k, v = (
                normalised(x, block.attention_norm.weight)
                @ block.attention.qkv.weight.T
            ).split(d, -1)
            out = []
            for h in range(heads):
                part = slice(h * hd, (h + 1) * hd)
                scores = (
                    rotated(q[:, part]) @ rotated(k[:, part]).T / hd**0.5 + mask
                )
                out.append(scores.softmax(-1) @ v[:, part])
            x = x + torch.cat(out, -1) @ block.attention.out.weight.T
            up = normalised(x, block.mlp_norm.weight) @ block.up.weight.T
            x = (
                x
                + (up * 0.5 * (1 + torch.erf(up / 2**0.5)))
                @ block.down.weight.T
            )
        logits = normalised(x, model.norm.weight) @ model.head.weight.T
        # cosines and sines are kept in float32
        torch.testing.assert_close(model(text)[b], logits, rtol=1e-5, atol=1e-5)


def test_a_longer_context_changes_nothing_before_it():
    "Same seed, other context: the same weights and the same logits."
    short, long = (
        build_model(TINY, context=8, seed=3),
        build_model(TINY, context=40, seed=3),
    )
    text = windows(2, 8)
    torch.testing.assert_close(short(text), long(text))
    assert torch.equal(rotary_table(8, 16), rotary_table(40, 16)[:, :8])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    first = build_model(TINY, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    again = build_model(TINY, generator=torch.Generator().manual_seed(0))
    assert all(
        torch.equal(p, q)
        for p, q in zip(first.parameters(), again.parameters())
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    """Weights and activations in the dtype, the loss in float32, gradients
    finite and close to float32's.
    """
    model, reference = build_model(TINY, 16, dtype=dtype), build_model(TINY, 16)
    assert {p.dtype for p in model.parameters()} == {dtype} and model(
        windows(1, 16)
    ).dtype == dtype
    losses = [next_byte_loss(m, windows(4, 17)) for m in (model, reference)]
    for loss in losses:
        loss.backward()
    assert losses[0].dtype == torch.float32
    assert abs(losses[0].item() - losses[1].item()) < 0.05
    g, g_ref = (
        m.head.weight.grad.double().flatten() for m in (model, reference)
    )
    assert torch.cosine_similarity(g, g_ref, dim=0) > 0.99


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiles_into_one_graph(backend):
    """torch.compile(fullgraph=True): no graph break in forward and loss; same
    loss and gradients.
    """
    model = build_model(TINY, 16)
    batch = windows(4, 17)
    next_byte_loss(model, batch).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss_fn = torch.compile(
        lambda x: next_byte_loss(model, x), fullgraph=True, backend=backend
    )
    loss = loss_fn(batch)
    loss.backward()
    torch.testing.assert_close(loss, next_byte_loss(model, batch))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_text_may_be_of_any_integer_type():
    model, text = build_model(TINY, 16), windows(2, 16)
    torch.testing.assert_close(model(text), model(text.int()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "tiny"}, "size='tiny' is unknown"),
        ({"size": Size(1, 30, 4)}, "width=30 does not split into heads=4"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"dtype": torch.long}, "no floating-point type"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        build_model(**arguments)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction='sum' is unknown"):
        next_byte_loss(build_model(TINY, 16), windows(2, 9), reduction="sum")
