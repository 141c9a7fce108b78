"""What is wrong must not look right: changed texts, results of other runs,
files of another shape, foreign modules, and terminals that know only ASCII.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import warnings
import zlib

import pytest
from tiny import (
    BODY,
    EMIT,
    PARAMETERS,
    dmr,
    finish,
    processes,
    project,
    wait_for,
)

import dmr.studies.run as engine
from dmr.files import read_object, write_object
from dmr.studies.batch import (
    Refused,
    _need_disk,
    _need_own_package,
    bring_back,
    describe,
    run_batch,
)
from dmr.studies.plan import (
    make_plan,
    prepare_planned,
    status,
    table_rows,
)
from dmr.studies.run import (
    FAILED,
    KILLED,
    OK,
    Limits,
    Run,
    launch,
    prepare_run,
)
from dmr.studies.study import Project, StudyError, read_study
from dmr.studies.table import read_rows
from dmr.studies.template import write_template

STREAM = """\
stream = ""                         # a folder with a text per domain
cap = 1000                          # bytes a domain, [10, inf)
seed = 0                            # [0, inf)
"""
READ = """\
import os, time
from dmr.text.load import load_stream
text = load_stream(stream, cap=cap)
with open(os.environ["DMR_TEST_JOURNAL"], "a") as f:
    f.write(f"{seed}\\n")
from IPython.display import display
result = dict(
    metrics=dict(loss=float(sum(d.train.sum() for d in text)) + seed),
    parameters=dict(stream=stream, cap=cap),
    identity=dict(stream_hash=text.hash),
)
"""
SHOW = 'display({"application/vnd.dmr.result+json": result}, raw=True)\n'


@pytest.fixture
def made(tmp_path):
    "A study of three cells, all done; the plan that is made of its folders."
    folders = project(tmp_path, "seeds: 0..2\nrecord: false\n")
    study = read_study(folders.studies / "tiny.yaml")
    first = make_plan(study, folders)
    finish(first)
    return lambda: make_plan(study, folders)


# -- a result is of the run that was planned -----------------------------------


def texts(root, words=("letters", "tables")):
    folder = root / "texts"
    folder.mkdir(exist_ok=True)
    for word in words:
        (folder / f"{word}.txt").write_text(f"{word} of many kinds. " * 300)
    return folder


@pytest.mark.slow
def test_a_text_that_changes_during_a_batch_stops_it(tmp_path):
    """No row says of a result that it was measured on another text, and the
    domain that changed is named.
    """
    folder = texts(tmp_path)
    folders = project(
        tmp_path,
        f"seeds: 0..2\ndefaults: {{stream: {folder}}}\n",
        cells=(STREAM, READ, SHOW),
    )
    env = dict(DMR_TEST_JOURNAL=str(tmp_path / "journal.txt"))
    env["DMR_CACHE"] = str(tmp_path / "cache")
    batch = dmr(tmp_path, "batch", "tiny", "--workers", "1", **env)
    wait_for(lambda: read_rows(folders.results / "tiny.csv"), 300)
    (folder / "tables.txt").write_text("another table altogether. " * 300)
    out, _ = batch.communicate(timeout=300)
    assert batch.returncode == 3, out
    assert "domain" in out and "'tables' changed" in out, out
    assert "plan with the present code and text" in out.replace("\n", " ")
    again = dmr(tmp_path, "batch", "tiny", "--workers", "1", **env)
    out, _ = again.communicate(timeout=500)
    assert again.returncode == 0, out
    rows = read_rows(folders.results / "tiny.csv")
    assert all(r["stream_hash"] == r["identity_stream_hash"] for r in rows)
    assert {r["seed"] for r in rows} == {"0", "1", "2"}
    losses = {r["stream_hash"]: float(r["loss"]) - int(r["seed"]) for r in rows}
    assert len(losses) == len(set(losses.values()))


def test_a_changed_text_names_its_domain(tmp_path, monkeypatch):
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    folder = texts(tmp_path)
    folders = project(
        tmp_path,
        f"seeds: [0]\ndefaults: {{stream: {folder}}}\n",
        cells=(STREAM, READ, SHOW),
    )
    plan = make_plan(read_study(folders.studies / "tiny.yaml"), folders)
    spec = prepare_planned(plan.runs[0], plan).spec
    assert engine._text_changed(spec) is None
    old = (folder / "tables.txt").read_text()
    (folder / "tables.txt").write_text(old.replace("kinds", "minds"))
    said = engine._text_changed(spec)
    assert "'tables' changed; put the old text back" in said
    assert "letters" not in said
    (folder / "tables.txt").write_text(old)  # put back, at another time
    assert engine._text_changed(spec) is None
    (folder / "letters.txt").unlink()
    assert "is not the one planned" in engine._text_changed(spec)


def test_an_old_result_on_another_text_is_made_again(tmp_path, monkeypatch):
    "As earlier versions booked it: `ok`, with the hash of another text."
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    folders = project(
        tmp_path,
        f"seeds: [0, 1]\ndefaults: {{stream: {texts(tmp_path)}}}\n",
        cells=(STREAM, READ, SHOW),
    )
    study = read_study(folders.studies / "tiny.yaml")
    plan = make_plan(study, folders)
    good, bad = (
        dict(metrics=dict(loss=1.0), identity=dict(stream_hash=h))
        for h in (plan.runs[0].identity.stream, "0123456789abcdef")
    )
    finish(plan, plan.runs[0], result=good)
    run = finish(plan, plan.runs[1], result=bad)
    assert make_plan(study, folders).counts() == {OK: 1, KILLED: 1}
    assert "measured on another text" in run.state()["error"]
    assert run.result is None


def test_the_files_of_another_run_are_not_taken_for_this_ones(made):
    "Copied from one folder into another, with everything that fits together."
    first, other = (p.run.folder for p in made().runs[:2])
    for name in ("done.json", "result.json", "output.ipynb"):
        shutil.copy(first / name, other / name)
    with pytest.warns(UserWarning, match="done.json is of another run"):
        assert made().counts() == {OK: 2, KILLED: 1}


def test_a_result_on_another_text_does_not_keep_the_right_one_away(made):
    "As a cluster brings it back into a folder that seems to be done."
    plan = made()
    right = plan.runs[0].run
    names = ("output.ipynb", "result.json", "state.json", "done.json")
    files = {n: zlib.compress((right.folder / n).read_bytes()) for n in names}
    wrong = dict(metrics=dict(loss=2.0), parameters=dict(seed=7))
    assert finish(plan, plan.runs[0], result=wrong).state()["state"] == KILLED
    bring_back(right.folder, files)
    assert right.result == dict(metrics=dict(loss=1.0))


@pytest.mark.parametrize("wall", ["x", float("inf"), [1], -1])
def test_a_time_that_is_none_stops_no_plan(made, wall):
    plan = made()
    path = plan.runs[0].run.folder / "done.json"
    write_object(path, {**read_object(path), "wall_s": wall})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = made()
    assert describe(plan, list(plan.runs), 1)[-1].endswith("3 s in all")


# -- data of another shape -----------------------------------------------------


@pytest.mark.parametrize(
    "result, said",
    [
        ([1, 2], "the result is a list, not an object"),
        ("done", "the result is text, not an object"),
        (3, "the result is a number, not an object"),
        ({"metrics": [1]}, "the result.metrics is a list, not an object"),
        ({"records": {"loss": 1}}, "the result.records is an object"),
        ({"records": [{"stage": 0}]}, "has no entry 'eval_domain'"),
        ({"metrics": {"a": float("nan")}}, "is a finite number"),
    ],
)
def test_a_bad_result_fails_its_run_and_no_other(made, result, said):
    plan = made()
    run = finish(plan, plan.runs[1], result=result)
    state = run.state()
    assert state["state"] == FAILED and said in state["error"]
    plan = made()
    assert plan.counts() == {OK: 2, FAILED: 1}
    rows = table_rows(plan)
    assert [r["status"] for r in rows] == [OK, FAILED, OK]
    assert said in rows[1]["error"]


@pytest.mark.parametrize("stage, n", [(0, 2), (float("inf"), 1)])
def test_records_that_make_no_row_fail_their_run_alone(made, stage, n):
    record = dict(stage=stage, eval_domain="a", loss=1.0, trained_domain="a")
    plan, records = made(), [dict(record, domain=0)] * n
    finish(
        plan, plan.runs[0], result=dict(metrics=dict(loss=1.0), records=records)
    )
    rows = table_rows(made())
    assert [r["status"] for r in rows] == [FAILED, OK, OK]
    assert "makes no row" in rows[0]["error"]


BAD = ["", "{", "[]", '"text"', "null", "{}", '{"state": 3}', '{"runs": [7]}']


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize(
    "name", ["state.json", "run.json", "done.json", "plan.json"]
)
def test_a_damaged_file_stops_nothing(made, name, text):
    "The file is named where it is missed, and every other run still counts."
    from dmr.studies.plan import write_plan

    plan = made()
    write_plan(plan)
    study, first = plan.project.runs / plan.study.name, plan.runs[0].run.folder
    (study if name == "plan.json" else first).joinpath(name).write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = made()
        states = [p.state["state"] for p in plan.runs]
        try:
            status("tiny", plan.project)
        except FileNotFoundError as e:
            assert name == "plan.json" and "writes the plan anew" in str(e)
    assert states[1:] == [OK, OK]
    told = " ".join(str(w.message) for w in said)
    told += str(plan.runs[0].state.get("error"))
    if name != "state.json":  # a finished run does not need it
        assert name in told
    if name == "run.json":  # what it said is known from the study
        assert prepare_planned(plan.runs[0], plan).state()["state"] == OK
    elif name == "done.json":
        assert states[0] == KILLED
    else:
        assert states[0] == OK


def test_brackets_without_end_and_names_that_are_none_stop_nothing(made):
    plan, deep = made(), "[" * 100_000
    folder = plan.runs[0].run.folder
    (folder / "result.json").write_text(deep)
    marker = read_object(folder / "done.json")
    marker["sha256"] = engine._file_hash(folder / "result.json")
    write_object(folder / "done.json", marker)
    assert "the result is null" in made().runs[0].state["error"]
    marker["files"] = {"a\0b": "0"}
    write_object(folder / "done.json", marker)
    assert made().counts() == {OK: 2, KILLED: 1}
    (folder / "state.json").write_text(deep)
    with pytest.warns(UserWarning, match="state.json is damaged"):
        assert made().counts() == {OK: 2, "waiting": 1}


def test_a_state_from_elsewhere_removes_no_folder_and_ends_no_process(
    run, tmp_path, monkeypatch
):
    "Scratch folders are ours; a folder that is only called so is not."
    scratch = engine._scratch_folder()
    (tmp_path / "dmr-abcdefgh").mkdir()
    mine = [scratch, tmp_path / "dmr-abcdefgh", scratch / "..", "dmr-abcdefgh"]
    monkeypatch.chdir(tmp_path)
    for named in mine[1:]:
        kernel = dict(pid=-1, began=1.0)
        state = dict(state="running", host=platform.node(), kernel=kernel)
        state["scratch"] = str(named)
        (run.folder / "state.json").write_text(json.dumps(state))
        engine.clear_leftovers(run)
        assert scratch.exists() and (tmp_path / "dmr-abcdefgh").exists()
    state["scratch"] = str(scratch)
    (run.folder / "state.json").write_text(json.dumps(state))
    engine.clear_leftovers(run)
    assert not scratch.exists()


TEMPLATES = [
    *("{}", "3", '{"cells": 3}', '{"cells": [3]}', '{"cells": ["x"]}'),
    '{"cells": {"a": 1}}',
    '{"cells": [{"cell_type": "code"}]}',
    '{"cells": [{"source": "x"}]}',
    '{"cells": [{"cell_type": "code", "source": [3]}]}',
    '{"cells": [{"cell_type": "code", "source": "", "metadata": null}]}',
    '{"cells": [{"cell_type": "code", "source": "", "metadata": {"tags": 3}}]}',
    "[" * 100_000,
    b"\xff",
]


@pytest.mark.parametrize("content", TEMPLATES)
def test_a_template_of_another_shape_is_refused_by_name(tmp_path, content):
    folders = project(tmp_path, "seeds: [0]\n")
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "nbs/experiments/tiny.ipynb").write_bytes(data)
    with pytest.raises(StudyError, match="tiny.ipynb is not a notebook of"):
        read_study(folders.studies / "tiny.yaml")


def test_a_template_too_deep_to_be_read_is_refused_by_name(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    path = tmp_path / "nbs/experiments/tiny.ipynb"
    write_template(path, PARAMETERS, "x = " + "-" * 9000 + "1")
    with pytest.raises(StudyError, match="tiny.ipynb: "):
        read_study(folders.studies / "tiny.yaml")


def test_an_edited_identity_is_passed_over_by_name(made):
    plan = made()
    path = plan.runs[0].run.folder / "run.json"
    spec = read_object(path)
    spec["identity"]["parameters"]["seed"] = 1  # a run that is done already
    write_object(path, spec)
    with pytest.warns(UserWarning, match="not the hash of its parts"):
        assert make_plan(plan.study, plan.project).counts()[OK] == 2


@pytest.mark.parametrize("how", ["delete", "cut", "edit"])
def test_a_notebook_that_changed_since_is_noticed(made, how):
    run = made().runs[0].run
    path = run.folder / "output.ipynb"
    path.unlink() if how == "delete" else None
    if how != "delete":
        path.write_text("" if how == "cut" else "[]")
    state = run.state()
    assert state["state"] == KILLED
    assert state["error"] == (
        "it finished, but output.ipynb was lost or damaged since"
    )


# -- says what happened --------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    template = write_template(tmp_path / "tiny.ipynb", PARAMETERS, BODY, EMIT)
    return prepare_run(
        tmp_path / "runs/run", template, {}, dict(id="a.b"), cwd=tmp_path
    )


def test_a_supervisor_that_dies_at_once_is_named(run, monkeypatch):
    "Neither `waiting` without a reason nor the old failure told again."
    old = dict(
        state=FAILED, error="ValueError: of yesterday", attempts=1, pid=1
    )
    write_object(run.folder / "state.json", old)
    monkeypatch.setattr(engine, "_SUPERVISE", "import no_such_library")
    outcome = launch(run.folder)
    assert outcome["state"] == KILLED == run.state()["state"]
    assert "ended before it began (exit code 1)" in outcome["error"]
    assert "no_such_library" in outcome["error"]
    assert outcome["attempts"] == 2
    monkeypatch.setattr(
        engine, "_SUPERVISE", "import os; os.kill(os.getpid(), 9)"
    )
    assert "before it began (SIGKILL)" in launch(run.folder)["error"]


def test_what_a_run_prints_and_the_disk_are_watched(run, monkeypatch):
    (run.folder / "log.txt").write_bytes(b"of an earlier attempt " * 100)
    s = engine._Supervisor(run.folder, os.getppid())
    s.most_printed = 1000
    assert engine._check(s, 0) is None
    with open(run.folder / "log.txt", "ab") as log:
        log.write(b"x" * 1001)
    state, error = engine._check(s, 0)
    assert state == FAILED and "more than its limit of 0.001 MB" in error
    s.printed += 1001
    assert engine._check(s, 0) is None
    (run.folder / "running.ipynb").write_bytes(b"x" * 1001)  # displayed
    assert "more than its limit" in engine._check(s, 0)[1]
    engine._finish(s, FAILED, "printed")
    assert not list(run.folder.glob("*.ipynb"))  # too much for any reader
    s.finished.clear()
    (run.folder / "running.ipynb").write_text("{}")
    engine._finish(s, FAILED, "printed")
    assert (run.folder / "failed.ipynb").read_text() == "{}"
    s.most_printed = float("inf")
    monkeypatch.setattr(engine, "_DISK_LEFT", 1e18)
    state, error = engine._check(s, 0)
    assert state == KILLED and "are free on the disk of" in error
    assert str(run.folder) in error


def test_the_disk_of_the_runs_counts(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(str(path))
        return type("usage", (), {"free": 1})

    monkeypatch.setattr("shutil.disk_usage", usage)
    folders = project(tmp_path / "project", "seeds: [0]\n")
    there = tmp_path / "other" / "disk"
    there.parent.mkdir()
    with pytest.raises(Refused, match="make room"):
        _need_disk(Project(folders.root, there, folders.results, there), 1)
    assert asked == [str(tmp_path / "other")]


def test_a_foreign_package_is_refused(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    _need_own_package(folders)
    (tmp_path / "dmr").mkdir()
    _need_own_package(folders)  # no package: Python passes it over
    (tmp_path / "dmr/__init__.py").write_text("")
    with pytest.raises(Refused, match="kernels would import"):
        _need_own_package(folders)


def test_a_helper_beside_the_template_is_part_of_its_code(tmp_path):
    cells = (PARAMETERS, "from helper import factor\n" + BODY, EMIT)
    folders = project(tmp_path, "seeds: [0]\nrecord: false\n", cells=cells)
    study = read_study(folders.studies / "tiny.yaml")
    (tmp_path / "helper.py").write_text("factor = 1\n")
    (tmp_path / "random.py").write_text("x = 'of no matter'\n")
    plan = make_plan(study, folders)
    assert plan.code[1].keys() == {"helper.py"}
    finish(plan, plan.runs[0])
    assert make_plan(study, folders).counts() == {OK: 1}
    (tmp_path / "random.py").write_text("x = 'still'\n")
    assert make_plan(study, folders).counts() == {OK: 1}
    (tmp_path / "helper.py").write_text("factor = 2  # changed\n")
    assert make_plan(study, folders).counts() == {"waiting": 1}


def test_a_folder_of_helpers_is_part_of_the_code(tmp_path):
    """Without `__init__.py`, too, unless an installed package has its name; and
    a module beside one of ours is none of the project's.
    """
    body = "import os, \\\n  tools.one\nimport yaml\nfrom config import x\n"
    cells = (PARAMETERS, body + BODY, EMIT)
    folders = project(tmp_path, "seeds: [0]\nrecord: false\n", cells=cells)
    study = read_study(folders.studies / "tiny.yaml")
    code = lambda: make_plan(study, folders).code[1].keys()
    for name in ("tools", "yaml", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.py").write_text("x = 1\n")
    assert code() == {"tools/one.py"}
    plan = make_plan(study, folders)
    finish(plan, plan.runs[0])
    (tmp_path / "tools/one.py").write_text("x = 2\n")
    assert make_plan(study, folders).counts() == {"waiting": 1}
    (tmp_path / "config.py").write_text("from .training import one\n")
    (tmp_path / "yaml/__init__.py").touch()
    files = {"config.py", "tools/one.py", "yaml/__init__.py", "yaml/one.py"}
    assert code() == files


@pytest.mark.parametrize("name", ["größe", "試験", "a b"])
def test_a_study_may_have_any_name_that_a_file_has(tmp_path, name):
    folders = project(tmp_path, "seeds: [0, 1]\n", name=name)
    plan = make_plan(read_study(folders.studies / f"{name}.yaml"), folders)
    finish(plan, plan.runs[0])
    assert make_plan(plan.study, folders).counts() == {OK: 1, "waiting": 1}


@pytest.mark.parametrize("name", [".", ".code"])
def test_a_name_that_is_a_folder_of_its_own_is_refused(tmp_path, name):
    folders = project(tmp_path, "seeds: [0]\n", name=name)
    with pytest.raises(StudyError, match="begin it with a letter or a digit"):
        read_study(folders.studies / f"{name}.yaml")


def test_a_name_that_is_no_text_where_only_ascii_is_spoken_is_refused(
    tmp_path,
):
    "As `LC_ALL=C` without UTF-8 gives it; no file of the run could name it."
    folders = project(tmp_path, "seeds: [0]\n", name="größe")
    name = "größe.yaml".encode().decode("ascii", "surrogateescape")
    with pytest.raises(StudyError, match="set PYTHONUTF8=1"):
        read_study(folders.studies / name)


def test_a_half_is_shown_where_only_ascii_is_spoken(tmp_path):
    project(tmp_path, 'arms: {"vanilla ×½": {lr: 5e-4}}\n', name="größe")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "import sys; from dmr.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "batch", "größe", "--dry-run"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert rb"vanilla \xd7\xbd" in done.stdout


@pytest.mark.slow
def test_a_run_in_hostile_surroundings(tmp_path):
    """A `random.py` in the folder, an ASCII terminal, and a cell that starts a
    daemon: the run is made, and nothing stays behind.
    """
    (tmp_path / "random.py").write_text("raise SystemExit('foreign')\n")
    fork = """\
import os, random, time
done = []
print("½", random.random())
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        time.sleep(300)
    os._exit(0)
"""
    template = write_template(tmp_path / "t.ipynb", PARAMETERS, fork, EMIT)
    run = prepare_run(tmp_path / "runs/r", template, {}, cwd=tmp_path)
    code = "import sys; from dmr.studies.run import launch; launch(sys.argv[1])"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run([sys.executable, "-c", code, str(run.folder)], env=env)
    assert run.state()["state"] == OK, run.state()
    assert "½" in (run.folder / "log.txt").read_text(encoding="utf-8")
    assert not processes(run.folder)


@pytest.mark.slow
def test_a_daemon_of_a_killed_supervisor_ends_with_the_next_attempt(tmp_path):
    fork = """\
import os, time
done = []
if os.fork() == 0:
    os.setsid()
    time.sleep(300)
open("forked.txt", "w").close()
time.sleep(0 if os.path.exists("second.txt") else 300)
"""
    template = write_template(tmp_path / "t.ipynb", PARAMETERS, fork, EMIT)
    run = prepare_run(tmp_path / "runs/r", template, {}, cwd=tmp_path)
    process = engine.start(run.folder)
    wait_for(lambda: (tmp_path / "forked.txt").exists(), 300)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "second.txt").touch()
    assert launch(run.folder)["state"] == OK
    assert not processes(run.folder)


@pytest.mark.slow
def test_a_cell_that_prints_without_end_is_stopped(tmp_path):
    flood = "while True: print('x' * 10_000)"
    template = write_template(tmp_path / "t.ipynb", PARAMETERS, flood, EMIT)
    limits = Limits(output_bytes=5_000_000)
    run = prepare_run(tmp_path / "runs/r", template, {}, limits=limits)
    outcome = launch(run.folder)
    assert outcome["state"] == FAILED
    assert "printed more than its limit of 5 MB" in outcome["error"]


def test_a_batch_goes_on_past_a_bad_result(made):
    plan = made()
    finish(plan, plan.runs[1], result=[1, 2])
    batch = run_batch(plan.study, plan.project, how="quiet")
    assert batch.outcomes == {} and batch.exit_code == 1
    assert "the result is a list" in batch.summary()
    assert isinstance(Run(plan.runs[0].run.folder).result, dict)
