"""Text that a model writes itself: its own distribution, its own random
stream, and nothing left behind; and replay of it.
"""

import numpy as np
import pytest
import torch
from torch import nn

import dmr
from dmr.methods.replay import ReplayBuffer, ReplayMix
from dmr.methods.sampling import sample_text
from dmr.training.model import build_model, next_byte_loss


def llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        **{"bos_token_id": 3, "eos_token_id": 5} | options,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


def written_out(model, rows, length, seed, start=3, end=5):
    "The obvious way: the whole text is read again for each token."
    draw = torch.Generator().manual_seed(seed)
    text = torch.full((rows, 1), start)
    model.eval()
    for _ in range(length - 1):
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=draw)
        ended = text[:, -1:] == end
        text = torch.cat([text, torch.where(ended, start, token)], 1)
    return text


def test_a_cache_changes_nothing():
    model = llama().train()
    (x,) = sample_text(model, tokens=5 * 20, length=20, batch=5, seed=4)
    assert model.training
    assert torch.equal(x, written_out(model, 5, 20, 4))
    assert (x[:, 0] == 3).all()
    after = x[:, 1:][x[:, :-1] == 5]
    assert len(after) and (after == 3).all()  # the next text begins


def test_the_model_and_all_random_numbers_are_as_before():
    model = build_model("nano", 16)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    batches = sample_text(model, tokens=200, length=17, batch=4)
    first = next(batches)
    assert [m.training for m in model.modules()] == modes  # between batches
    assert sum(len(x) for x in batches) + len(first) == 12  # ⌈200 / 17⌉
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert first.dtype == torch.uint8 and first.shape == (4, 17)
    next_byte_loss(model, first).backward()


def test_a_text_that_was_learned_is_written_again():
    model = build_model("nano", 8, seed=1)
    text = torch.tensor(list(b"to be or not ") * 40, dtype=torch.uint8)
    starts = torch.arange(13)[:, None] + torch.arange(9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        next_byte_loss(model, text[starts]).backward()
        optimizer.step()
    (x,) = dmr.sample_text(model, tokens=8 * 20, length=20)
    known = b"to be or not " * 4
    assert sum(bytes(row.tolist()) in known for row in x) >= 6


def test_positions_are_those_of_the_part_that_reads_text():
    transformers = pytest.importorskip("transformers")
    model = llama()
    text = model.config
    model.config = transformers.PretrainedConfig(
        bos_token_id=3, eos_token_id=5, vocab_size=17
    )
    model.config.text_config = text  # as of a model that sees pictures too
    with pytest.raises(ValueError, match="exceeds the 24 positions"):
        sample_text(model, length=25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 0}, "tokens=0"),
        ({"length": 25}, "exceeds the 24 positions"),
        ({"temperature": 0.0}, "not above 0"),
        ({"start": -1}, "is no token"),
    ],
)
def test_what_cannot_be_written_is_refused_at_the_call(options, message):
    with pytest.raises(ValueError, match=message):
        sample_text(llama(), **{"length": 8} | options)


def test_numbers_of_numpy_are_numbers():
    "As they come out of a table or an array."
    model, how = llama(), {"length": 8, "tokens": 32, "skip": 2}
    given = {"temperature": np.float32(0.5), "start": np.int64(3)}
    plain = {"temperature": 0.5, "start": 3}
    (x,), (y,) = (sample_text(model, **how, **d) for d in (given, plain))
    assert x.dtype == y.dtype and torch.equal(x, y)
    for wrong in ({"temperature": np.float32(0)}, {"start": np.int64(-1)}):
        with pytest.raises(ValueError, match="not above 0|is no token"):
            sample_text(model, **how, **wrong)


def test_no_start_token():
    model = llama(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="names no start or end token"):
        sample_text(model, length=8)

    class Silent:
        bos_token_id = eos_token_id = pad_token_id = None

    with pytest.raises(ValueError, match="Silent has no start"):
        sample_text(model, Silent(), length=8)
    (x,) = sample_text(model, length=8, tokens=16, start=2)
    assert (x[:, 0] == 2).all()


def test_broken_weights_are_named():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        next(sample_text(model, length=8))


def test_its_own_text_protects_it():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    router = dmr.MomentRouter(
        model,
        optimizer,
        dmr.Projection(rank=2),
        "displacement",
        consolidation=dmr.FisherMerge(),
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    written = sample_text(model, tokens=64, length=8, batch=4)
    loss = lambda x: model(input_ids=x, labels=x).loss
    router.protect(written, loss)
    assert all(U.shape[1] == 2 for U in router.modification.bases.values())
    assert set(router.consolidation.past) == set(before)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def replaying(write, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    buffer = ReplayBuffer(seed=1)
    loss = lambda x: model(x).square().mean()
    method = ReplayMix(buffer, loss, fraction=0.1, write=write, **options)
    return (
        model,
        optimizer,
        dmr.MomentRouter(model, optimizer, method, "shared"),
    )


def steps(model, optimizer, router, n=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(5, 4, generator=draw)
        router.observe(x, 60)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_replay_keeps_what_is_written_and_nothing_else():
    asked = []

    def write(count, boundary):
        asked.append((count, boundary))
        yield torch.full((count - 2, 4), float(boundary))
        yield torch.full((2, 4), -1.0)

    parts = replaying(write)
    buffer = parts[2].modification.buffer
    for domain in range(2):
        steps(*parts, seed=domain)
        assert not buffer.current  # no text of the domain
        report = parts[2].consolidate()
    assert asked == [(6, 0), (6, 1)] and report["windows"] == 12
    x = buffer.memory[""]
    assert x[:, 0].tolist() == [0.0] * 4 + [-1.0] * 2 + [1.0] * 4 + [-1.0] * 2
    assert buffer.batch_size == 5  # as many are drawn as before


def test_a_resumed_domain_is_written_alike():
    def write(count, boundary):
        yield torch.full((count, 4), float(boundary))

    parts, twin = replaying(write), replaying(write)
    steps(*parts)
    twin[2].load_state_dict(parts[2].state_dict())
    for router in (parts[2], twin[2]):
        router.consolidate()
    mine, other = (r[2].modification.buffer.memory[""] for r in (parts, twin))
    assert torch.equal(mine, other) and len(mine) == 6


def test_a_writer_without_text_is_an_error():
    parts = replaying(lambda count, boundary: [])
    steps(*parts)
    with pytest.raises(ValueError, match="gave no batch"):
        parts[2].consolidate()


def test_what_protect_shows_is_kept_whole():
    parts = replaying(None)
    shown = [torch.randn(7, 4) for _ in range(3)]
    parts[2].protect(shown, lambda x: parts[0](x).square().mean())
    assert torch.equal(
        parts[2].modification.buffer.memory[""], torch.cat(shown)
    )


class Plain(nn.Module):
    "Tokens -> logits of a vocabulary, as a loop's own model gives them."

    def __init__(self, vocabulary, give=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.give = give

    def forward(self, x):
        return self.give(self.table(x.long()))


def test_tokens_beyond_a_byte_stay_what_they_are():
    model = Plain(1000)
    (x,) = sample_text(model, tokens=64, length=8, skip=0, start=999)
    assert x.dtype == torch.int64 and (x[:, 0] == 999).all()
    (small,) = sample_text(Plain(200), tokens=64, length=8)
    assert small.dtype == torch.uint8


def encoder_decoder(transformers):
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=17, d_model=8, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=1, decoder_attention_heads=1,
            encoder_ffn_dim=8, decoder_ffn_dim=8,
        )
    )  # fmt: skip


def masked(transformers):
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=17, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [encoder_decoder, masked])
def test_what_does_not_write_is_refused_at_the_call(make):
    model = make(pytest.importorskip("transformers"))
    with pytest.raises(ValueError, match="does not write text token by token"):
        sample_text(model, tokens=8, length=4, start=1)


@pytest.mark.parametrize(
    "model, start, said",
    [
        (llama, 17, "start=17 is none of the 17 tokens"),
        (lambda: Plain(8), None, "does not know the tokens .*pass start="),
        (lambda: Plain(300, lambda x: (x, 0)), None, "returned tuple, not log"),
    ],
)
def test_a_start_or_logits_that_do_not_fit_are_named(model, start, said):
    with pytest.raises(ValueError, match=said):
        list(sample_text(model(), tokens=8, length=4, start=start))
