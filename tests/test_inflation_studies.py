"""The theory's studies under bare papermill with a reader's own parameters:
they write the tables that the chapters read.
"""

import csv
from pathlib import Path

import pytest

papermill = pytest.importorskip("papermill")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
STREAM = "synthetic:rho=0.5,domains=4"
SMALL = {
    "monte_carlo": {
        "alphas": [0.25, 0.75],
        "kappas": [0.4],
        "betas2": [0.9],
        "spectra": ["power"],
        "violations": ["eps"],
        "rows": 300,
    },
    "live": {
        "stream": STREAM,
        "alphas": [0.25, 0.75],
        "before": 4,
        "steps": 6,
        "batch": 2,
        "context": 16,
        "ranks": [8],
        "held_out": 2,
    },
    "causal": {
        "stream": STREAM,
        "alphas": [0.6],
        "before": 4,
        "steps": 6,
        "batch": 2,
        "context": 16,
        "ranks": [8],
        "eval_windows": 4,
    },
}


@pytest.fixture
def run(tmp_path):
    def execute(study, **parameters):
        out = tmp_path / f"{study}.ipynb"
        source = ROOT / "nbs" / "experiments" / f"inflation_{study}.ipynb"
        return papermill.execute_notebook(
            str(source),
            str(out),
            parameters,
            progress_bar=False,
            cwd=str(ROOT),
            kernel_name="python3",
        )

    return execute


@pytest.mark.parametrize("study", SMALL)
def test_a_study_runs_with_other_parameters_and_writes_the_columns_of_its_table(
    run, study, tmp_path
):
    path = tmp_path / "table.csv"
    notebook = run(study, **SMALL[study], table=str(path))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["alpha"]) for row in rows} == set(SMALL[study]["alphas"])
    kept = (
        ["inflation_live_synthetic", "inflation_live_text8"]
        if study == "live"
        else [f"inflation_{study}"]
    )
    for name in kept:  # the committed tables are of this template
        with (ROOT / "results" / f"{name}.csv").open(newline="") as file:
            assert next(csv.reader(file)) == list(rows[0])
    outputs = [
        o.get("data", {})
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
    ]
    (result,) = [
        data["application/vnd.dmr.result+json"]
        for data in outputs
        if "application/vnd.dmr.result+json" in data
    ]
    assert result["parameters"]["alphas"] == SMALL[study]["alphas"]
    if study == "monte_carlo":
        clean = [row for row in rows if row["violation"] == "none"]
        assert clean and all(
            abs(float(row["R"]) / float(row["R_law"]) - 1) < 0.1
            for row in clean
        )


@pytest.mark.parametrize(
    "study,wrong,said",
    [
        ("monte_carlo", {"violations": ["moonlight"]}, "moonlight"),
        ("live", {"stream": "synthetic:rho=0.5,domains=1"}, "domain"),
    ],
)
def test_a_study_refuses_what_it_cannot_run(run, study, wrong, said):
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        run(study, **wrong)
