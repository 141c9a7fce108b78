"""Train here, save, load in another process, go on: one script, run in one
process for both domains, or in a process for each.

python stories.py KIND DOMAINS FOLDER, such as `bare 12 /tmp/x`, `trainer 1 …`
"""

import logging
import sys
import warnings
from pathlib import Path

import torch

import dmr

torch.set_num_threads(1)
warnings.simplefilter("ignore")
LR = {"lr": 3e-3, "betas": (0.9, 0.95)}


def rows(domain, n=24):
    rng = torch.Generator().manual_seed(domain)
    return torch.randint(0, 257, (n, 12), generator=rng)


def fresh():
    from dmr.training.pretrained import small_llama

    return small_llama(width=16, layers=1, context=32)[0]


def parts():
    return dmr.Projection(rank=2, every=1), "displacement", 0.9


def bare(domain, folder, kept):
    "A loop of one's own; the optimizer lives on."
    if kept is None:
        model = fresh()
        if domain > 1:
            both = torch.load(folder / "both.pt", weights_only=True)
            model.load_state_dict(both["model"])
        optimizer = torch.optim.AdamW(model.parameters(), **LR)
        if domain > 1:
            optimizer.load_state_dict(both["optimizer"])
            path = folder / "router.pt"
            router = dmr.MomentRouter.load(path, model, optimizer)
        else:
            merge = dmr.FisherMerge(0.7)
            router = dmr.MomentRouter(
                model, optimizer, *parts(), consolidation=merge
            )
        kept = model, optimizer, router
    model, optimizer, router = kept
    for batch in rows(domain).split(4):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    router.consolidate()
    router.save(folder / "router.pt")
    both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(both, folder / "both.pt")
    return kept


def with_trainer(domain, folder, kept, last=False):
    "The Trainer's callback, and the model's own folder."
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from dmr.frameworks.trainer import RoutedTrainer, RouterCallback

    callback, model = kept or (None, None)
    home = folder / ("out/checkpoint-6" if last else "kept")
    if callback is None:
        model = (
            LlamaForCausalLM.from_pretrained(home) if domain > 1 else fresh()
        )
        merge = dmr.FisherMerge(0.7)
        callback = RouterCallback(*parts(), consolidation=merge)
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps" if last else "no",
        save_steps=3,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    data = [{"input_ids": row, "labels": row} for row in rows(domain)]
    if last:  # a plain Trainer, and its last checkpoint
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train()
    else:
        trainer = RoutedTrainer(
            model, args, train_dataset=data, router=callback
        )
        trainer.train()
        trainer.save_model(str(folder / "kept"))
    return callback, model


def with_lightning(domain, folder, kept):
    "Lightning's last checkpoint."
    import lightning.pytorch as lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from dmr.frameworks.lightning import LightningRouter

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)

    class Language(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fresh()

        def training_step(self, batch, index):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), **LR)

    callback, module = kept or (None, None)
    path = folder / str(domain - 1) / "last.ckpt"
    if callback is None:
        module = Language()
        if domain > 1:
            state = torch.load(path, weights_only=True)["state_dict"]
            module.load_state_dict(state)
        callback = LightningRouter(
            *parts(),
            consolidation=dmr.FisherMerge(0.7),
            saved=path if domain > 1 else None,
        )
    keep = ModelCheckpoint(folder / str(domain), save_top_k=0, save_last=True)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback, keep],
    ).fit(module, torch.utils.data.DataLoader(rows(domain), batch_size=4))
    return callback, module


STORIES = {
    "bare": bare,
    "trainer": with_trainer,
    "checkpoint": lambda *a: with_trainer(*a, last=True),
    "lightning": with_lightning,
}


if __name__ == "__main__":
    kind, domains, folder = sys.argv[1:]
    kept = None
    for domain in map(int, domains):
        kept = STORIES[kind](domain, Path(folder), kept)
    router = kept[2] if kind == "bare" else kept[0].router
    model = kept[0] if kind == "bare" else kept[1]
    state = {n: p.detach() for n, p in model.named_parameters()}
    counts = {"steps": router.steps, "domains": router.domains}
    torch.save({"weights": state, **counts}, Path(folder, "end.pt"))
