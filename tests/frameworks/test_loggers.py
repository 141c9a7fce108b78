"""The router's numbers in real loggers, under `router/`.

TensorBoard is a part of the pinned environment. MLflow and trackio ask for
older versions of pinned packages (importlib_metadata < 10, pillow < 13), so
they are tested where somebody has installed them.
"""

import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import TrainingArguments

import dmr
from dmr.frameworks.trainer import RoutedTrainer, RouterCallback
from dmr.training.pretrained import small_llama

torch.set_num_threads(1)
warnings.simplefilter("ignore")
WANTED = {"alpha", "step_norm", "step_rms", "protected_step_norm", "domains"}


def trained(folder, report_to, cls=RoutedTrainer):
    "Eight steps with a boundary in the middle, logged at every second."
    model, _ = small_llama(width=16, layers=1, context=32)
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 257, (32, 12), generator=rng)
    rows = [{"input_ids": row, "labels": row} for row in rows]
    callback = RouterCallback(
        dmr.Projection(rank=2, every=1),
        "decoupled",
        0.5,
        boundaries=[4],
        track_step=1,
    )
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=8,
        per_device_train_batch_size=4,
        report_to=report_to,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=2,
        use_cpu=True,
        seed=0,
    )
    if cls is RoutedTrainer:
        given = {"router": callback}
    else:
        given = {"callbacks": [callback]}
    trainer = cls(model, args, train_dataset=rows, **given)
    trainer.train()
    return trainer


def alphas(rows):
    return [row["router/alpha"] for row in rows if "router/alpha" in row]


@pytest.mark.parametrize("kind", ["plain", "routed"])
def test_they_stand_in_the_trainers_history(kind, tmp_path):
    from transformers import Trainer

    cls = RoutedTrainer if kind == "routed" else Trainer
    history = trained(tmp_path, [], cls).state.log_history
    rows = [row for row in history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert alphas(rows) == [0.5, 0.5]  # nothing is protected before step 4
    assert WANTED <= {key.removeprefix("router/") for key in rows[-1]}
    assert [row["router/domains"] for row in rows] == [0, 1, 1, 1]
    assert not any(k.startswith("router") for k in history[-1])  # the summary


@pytest.mark.slow
def test_tensorboard_shows_them(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trained(tmp_path, ["tensorboard"])
    folder = next((tmp_path).rglob("events.out.tfevents.*")).parent
    read = EventAccumulator(str(folder)).Reload()
    seen = [(e.step, e.value) for e in read.Scalars("train/router/alpha")]
    assert seen == [(6, 0.5), (8, 0.5)]
    found = {
        tag.removeprefix("train/router/") for tag in read.Tags()["scalars"]
    }
    assert WANTED <= found


@pytest.mark.slow
def test_mlflow_shows_them(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    trained(tmp_path, ["mlflow"])
    client = mlflow.MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    found = client.get_metric_history(run.info.run_id, "router/alpha")
    assert [(m.step, m.value) for m in found] == [(6, 0.5), (8, 0.5)]
    names = {key.removeprefix("router/") for key in run.data.metrics}
    assert WANTED <= names
    mlflow.end_run()


@pytest.mark.slow
def test_trackio_shows_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("TRACKIO_PROJECT", "dmr")
    trained(tmp_path, ["trackio"])
    (project,) = SQLiteStorage.get_projects()
    (run,) = SQLiteStorage.get_runs(project)
    rows = SQLiteStorage.get_logs(project, run)
    assert [
        value
        for row in rows
        for key, value in row.items()
        if key.endswith("router/alpha")
    ] == [0.5, 0.5]
    assert trackio.__version__


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightnings_loggers_show_them(tmp_path, accumulate):
    lightning = pytest.importorskip("lightning.pytorch")
    import csv

    from lightning.pytorch.loggers import CSVLogger
    from test_lightning import Regression, data

    from dmr.frameworks.lightning import LightningRouter

    edit = dmr.Projection(rank=2, every=1)
    half = 4 // accumulate
    callback = LightningRouter(edit, "decoupled", 0.5, boundaries=[half])
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    ).fit(Regression(), data())
    with open(Path(tmp_path, "metrics.csv")) as file:
        rows = list(csv.DictReader(file))
    shown = [float(r["router/alpha"]) for r in rows if r["router/alpha"]]
    assert shown == [0.5] * (8 // accumulate // 2 - half // 2)
    assert {float(r["router/domains"]) for r in rows} <= {0.0, 1.0}


@pytest.mark.slow
def test_lightnings_tensorboard_shows_them(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )
    from test_lightning import Regression, data

    from dmr.frameworks.lightning import LightningRouter

    callback = LightningRouter(dmr.Projection(rank=2, every=1), strength=0.5)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    module = Regression()
    for _ in range(2):
        trainer.fit(module, data())
        trainer.fit_loop.max_epochs += 1
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    read = EventAccumulator(str(folder)).Reload()
    assert {e.value for e in read.Scalars("router/alpha")} == {0.5}
