"""The command line: quick, one line for what a user gets wrong, and exit codes
that tell.
"""

import json
import subprocess
import sys

import pytest
from tiny import dmr, finish, project

from dmr.cli import last_lines, main, parse_value, parser
from dmr.studies.plan import make_plan
from dmr.studies.study import read_study
from dmr.studies.template import write_template


def call(capsys, root, *argv):
    code = main(
        [
            *argv,
            "--runs",
            str(root / "runs"),
            "--results",
            str(root / "results"),
        ]
    )
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["status"],
        ["batch", "--list"],
        ["batch", "--help"],
        ["report"],
        ["why"],
        ["tail"],
        ["finetune", "--help"],
    ],
)
def test_looking_needs_no_torch(argv, tmp_path):
    project(tmp_path, "seeds: [0]\n")
    code = (
        "import sys\nfrom dmr.cli import main\ntry: main(sys.argv[1:])\nexcept"
        " SystemExit: pass\nprint('loaded', [m for m in ('torch', 'numpy',"
        " 'pandas', 'papermill', 'matplotlib', 'dmr.book', 'dmr.verdict')"
        " if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.stdout.splitlines()[-1] == "loaded []", out


def test_every_command_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name in (
        "run",
        "batch",
        "status",
        "tail",
        "why",
        "accept",
        "report",
        "export",
        "tables",
        "streams",
        "models",
        "finetune",
        "compare",
    ):
        assert f"    {name}" in said
    assert main([]) == 2


def test_a_report_of_nothing_says_so_and_writes_nothing(
    capsys, tmp_path, monkeypatch
):
    project(tmp_path, "seeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, tmp_path, "report", "tiny")
    assert (
        code == 1
        and "no run of 'tiny' has ended" in out
        and "dmr batch tiny" in out
    )
    assert not (tmp_path / "runs").exists()


LOOK = """\
import sys
from ipykernel.kernelapp import IPKernelApp
print(study, IPKernelApp.instance().transport, sys.executable)
"""


def test_an_analysis_is_executed_by_this_python_behind_sockets(tmp_path):
    folders = project(tmp_path, "seeds: [0]\nanalysis: look.ipynb\n")
    write_template(folders.studies / "look.ipynb", 'study = ""\n', LOOK)
    finish(make_plan(read_study(folders.studies / "tiny.yaml"), folders))
    report = dmr(tmp_path, "report", "tiny")
    out, _ = report.communicate(timeout=120)
    written = tmp_path / "runs/tiny/look.ipynb"
    assert report.returncode == 0 and f"analysis: {written}" in out
    cells = json.loads(written.read_text())["cells"]
    said = "".join(cells[-1]["outputs"][0]["text"])
    assert said == f"tiny ipc {sys.executable}\n"


def test_a_grid_over_one_arm_can_be_reported(capsys, tmp_path, monkeypatch):
    grid = "{grid: {lr: [0.5, 1, 2]}}"
    study = f"seeds: [0, 1]\narms:\n  vanilla: {grid}\n  other: {{lr: 4}}\n"
    folders = project(tmp_path, study)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(read_study(folders.studies / "tiny.yaml"), folders)
    for p in plan.runs:
        loss = p.cell.parameters["lr"] + p.cell.seed / 10
        numbers = dict(forgetting=loss, learning_accuracy=3 - loss)
        numbers["final_average"] = 2 + loss
        finish(plan, p, result=dict(metrics=numbers))
    code, out, err = call(capsys, tmp_path, "report", "tiny")
    assert code == 0, err
    names = [line.split("  ")[0] for line in out.splitlines()]
    for name in ("vanilla lr=0.5", "vanilla lr=1", "vanilla lr=2", "other"):
        assert names.count(name) == 2, out  # in nats, and as perplexity


def test_an_analysis_that_fails_says_so_after_the_report(tmp_path):
    folders = project(tmp_path, "seeds: [0]\nanalysis: look.ipynb\n")
    write_template(folders.studies / "look.ipynb", "1 / 0")
    finish(make_plan(read_study(folders.studies / "tiny.yaml"), folders))
    report = dmr(tmp_path, "report", "tiny")
    out, _ = report.communicate(timeout=120)
    assert report.returncode == 2 and "report.html" in out
    assert "the analysis failed: ZeroDivisionError: division by zero" in out
    assert "Traceback" not in out


def test_a_study_file_elsewhere_is_found_by_every_command(
    capsys, tmp_path, monkeypatch
):
    project(tmp_path, "seeds: [0]\n")
    own = tmp_path / "my study.yaml"
    own.write_text("template: nbs/experiments/tiny.ipynb\nseeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, tmp_path, "why", "my study.yaml")
    assert code == 0 and "1 waiting" in out
    code, out, _ = call(capsys, tmp_path, "report", "my study.yaml")
    assert code == 1 and "`dmr batch 'my study.yaml'`" in out


@pytest.mark.parametrize("command", ["report", "why", "tail"])
def test_a_command_that_lacks_its_argument_says_what_there_is(
    capsys, tmp_path, monkeypatch, command
):
    project(tmp_path, "seeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, tmp_path, command)
    assert code == 0 and "no batch was started" in out and "dmr run" in out
    (tmp_path / "runs/tiny").mkdir(parents=True)
    run = {"run": "a", "label": "a", "recorded": True, "state": "ok"}
    plan = json.dumps({"runs": [run, {**run, "state": "failed"}]})
    (tmp_path / "runs/tiny/plan.json").write_text(plan)
    code, out, _ = call(capsys, tmp_path, command)
    assert code == 0 and "tiny: 1 of 2 done, 1 failed" in out
    assert f"dmr {command} {'RUN' if command == 'tail' else 'tiny'}" in out


@pytest.mark.parametrize("what", ["claims", "tuning"])
def test_verdicts_need_a_checkout(capsys, tmp_path, monkeypatch, what):
    project(tmp_path, "seeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    if what == "claims":  # here is the package, but not the notebooks
        code, _, err = call(capsys, tmp_path, "report", what)
        assert code == 2 and f"{tmp_path} is none" in err
    # as in an installed package
    monkeypatch.setattr("dmr.cli.find_spec", lambda name: None)
    code, _, err = call(capsys, tmp_path, "report", what)
    assert code == 2 and err.count("\n") == 1
    assert f"`dmr report {what}` needs a checkout of the project" in err


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-3", 0.001),
        ("16", 16),
        ("true", True),
        ("null", None),
        ("None", None),
        ("kept", "kept"),
        ("['python', 'cpp']", ["python", "cpp"]),
        ('["a"]', ["a"]),
        ("-0.5", -0.5),
        ("0.5 %", "0.5 %"),
        ("{[1]: 2}", "{[1]: 2}"),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    "argv, said",
    [
        (["batch", "nothing"], "no study 'nothing'"),
        (["batch", "tiny", "-p", "moed", "plain"], "did you mean 'mode'"),
        (["batch", "tiny", "-p", "lr", "-1"], "outside (0, inf)"),
        (["batch", "tiny", "-p", "seed", "7"], "the same run"),
        (["batch", "tiny", "--workers", "0"], "at least 1"),
        (["batch", "tiny", "--dry-run", "--workers", "0"], "at least 1"),
        (["run", "tiny", "--budget-hours", "-1"], "must be above 0"),
        (["batch", "tiny", "--budget-hours", "0"], "must be above 0"),
        (["tail", "nothing", "-n", "-5"], "at least 1 line"),
        (["run", "missing.ipynb"], "no template notebook"),
        (["tail", "nothing"], "no run begins with 'nothing'"),
        (["why", "nothing"], "no run begins with 'nothing'"),
        (["status", "tiny"], "was started here; `dmr batch tiny --dry-run`"),
        (["status", "tniy"], "no study has this name (did you mean 'tiny'?)"),
        (["report", "tniy"], "did you mean 'tiny'"),
        (["report", "claim"], "no report 'claim' (did you mean 'claims'?)"),
        (["report", "tunning"], "did you mean 'tuning'"),
        (["batch", "tiny", "--trials", "3"], "--trials 3 is for a sampler"),
        (["batch", "tiny", "--sampler-seed", "0"], "add --tuner optuna"),
        (
            ["batch", "tiny", "--tuner", "optuna", "--dry-run"],
            "depends on the results so far",
        ),
    ],
)
def test_what_a_user_gets_wrong(capsys, tmp_path, monkeypatch, argv, said):
    project(tmp_path, "seeds: [0, 1]\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, tmp_path, *argv)
    assert code == 2 and said in err and "Traceback" not in err
    assert (
        err.startswith(f"dmr {argv[0]}: ")
        and not (tmp_path / "runs/tiny").exists()
    )


def test_dry_run_starts_nothing(capsys, tmp_path, monkeypatch):
    project(tmp_path, "seeds: 0..3\nestimate: 10 s\n")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(
        capsys, tmp_path, "batch", "tiny", "--dry-run", "--workers", "2"
    )
    assert (
        code == 0
        and "4 runs, 4 waiting; 4 to make" in out
        and "about 10 s each, 20 s in all" in out
    )
    assert (
        not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()
    )


def test_dry_run_reads_no_text(capsys, monkeypatch):
    monkeypatch.setattr(
        "dmr.text.load.load_stream",
        lambda *a, **k: pytest.fail("a plan fetched a stream"),
    )
    assert (
        main(
            [
                "batch",
                "sixteen",
                "--dry-run",
                "--runs",
                "a folder that is not there",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "sixteen: " in out and "not read yet: text16" in out


def test_the_parser_reads_options_and_names():
    p = parser()
    args = p.parse_args(
        [
            "batch",
            "eight",
            "--workers",
            "3",
            "--scheduler",
            "tcp://h:1",
            "--retry-failed",
            "--quiet",
            "--json",
            "--budget-hours",
            "2",
        ]
    )
    assert (
        args.workers,
        args.scheduler,
        args.budget_hours,
        args.retry_failed,
    ) == (3, "tcp://h:1", 2.0, True)
    assert p.parse_args(["streams", "fetch", "text8", "--quiet"]).names == [
        "text8"
    ]


def test_the_last_lines_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"one\ntwo\r\nstep 1\rstep 2\rstep 3\n\nfour")
    assert last_lines(log, 3) == ["two", "step 3", "four"]
    assert last_lines(tmp_path / "none", 3) == []


@pytest.mark.slow
def test_one_run_from_the_shell(tmp_path):
    project(tmp_path, "seeds: [0]\n")
    first = dmr(
        tmp_path, "run", "nbs/experiments/tiny.ipynb", "-p", "lr", "0.25"
    )
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "loss 2.5" in out
    second = dmr(
        tmp_path,
        "run",
        "nbs/experiments/tiny.ipynb",
        "-p",
        "lr",
        "0.25",
        "--json",
    )
    out, _ = second.communicate(timeout=120)
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events] == ["plan", "summary"] and events[0][
        "todo"
    ] == 0
    assert list((tmp_path / "runs").rglob("output.ipynb")) and not list(
        (tmp_path / "nbs").rglob("output.ipynb")
    )


@pytest.mark.slow
def test_exit_codes(tmp_path):
    project(tmp_path, "arms: {good: {}, bad: {mode: raise}}\n")
    batch = dmr(tmp_path, "batch", "tiny", "--workers", "2")
    out, _ = batch.communicate(timeout=120)
    assert (
        batch.returncode == 1
        and "bad seed 0: failed: FloatingPointError: diverged at lr=0.001"
        in out
    )
    status = dmr(tmp_path, "status", "tiny")
    assert (
        "1 of 2 done, 1 failed" in status.communicate()[0]
        and status.returncode == 1
    )
    tail = dmr(tmp_path, "tail", "bad")
    assert "raise FloatingPointError" in tail.communicate()[0]
    budget = dmr(
        tmp_path,
        "batch",
        "tiny",
        "--retry-failed",
        "--budget-hours",
        "0.00000001",
    )
    out, _ = budget.communicate(timeout=120)
    # what was asked for has not been begun
    assert budget.returncode == 3 and "time budget" in out


def test_streams_are_listed_and_fetched_through_the_command(
    capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "dmr.text.load.fetch",
        lambda name, progress=True: asked.append((name, progress)) or "here",
    )
    assert main(["streams", "fetch", "text8", "--quiet"]) == 0 and asked == [
        ("text8", False)
    ]
    assert main(["streams"]) == 0 and "shakespeare" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["tail", "why"])
def test_a_table_of_another_kind_beside_the_studies_is_passed_over(
    capsys, tmp_path, monkeypatch, command
):
    project(tmp_path, "seeds: [0]\n")
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results/speed.csv").write_text("measure,value\nstep,2\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, tmp_path, command, "nothing")
    assert code == 2 and "no run begins with 'nothing'" in err


def test_a_reader_of_a_pipe_may_leave_early(tmp_path):
    """`dmr batch tiny --dry-run | head -1` ends without a traceback or a
    complaint; the plan is longer than a pipe holds.
    """
    project(tmp_path, "seeds: [" + ", ".join(map(str, range(4000))) + "]\n")
    code = "import sys; from dmr.cli import main; sys.exit(main())"
    with open(tmp_path / "said", "w+") as said:
        plan = [sys.executable, "-c", code, "batch", "tiny", "--dry-run"]
        shown = subprocess.Popen(
            plan, cwd=tmp_path, stdout=subprocess.PIPE, stderr=said, text=True
        )
        first = shown.stdout.readline()
        shown.stdout.close()
        assert shown.wait(60) == 141 and "4000 waiting" in first
        said.seek(0)
        assert said.read() == ""


@pytest.mark.parametrize(
    ("kind", "name"), [("stream", "text8"), ("model", "smollm2-135m")]
)
def test_lists_of_what_is_on_offer_take_no_name(kind, name, capsys):
    assert main([f"{kind}s", "list", name]) == 2
    assert (
        f"to bring a {kind} here: dmr {kind}s fetch {name}"
        in capsys.readouterr().err
    )
    assert main([f"{kind}s", "fetch"]) == 2
    assert (
        f"name a {kind} to fetch: dmr {kind}s fetch {name}"
        in capsys.readouterr().err
    )
