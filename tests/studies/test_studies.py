"""Study files, plans and tables: what counts as done, what changed, and what a
table shows.
"""

import json
import shlex
import shutil
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BODY, EMIT, PARAMETERS, finish, project

from dmr.cli import parse_value
from dmr.reporting.results import load_results, results_of
from dmr.studies.identity import changed_parts, digest, package_folder
from dmr.studies.plan import (
    accept,
    find_run,
    keep_sources,
    make_plan,
    table_rows,
    why,
    write_plan,
)
from dmr.studies.run import OK
from dmr.studies.study import (
    StudyError,
    combinations,
    command_of,
    find_project,
    find_study,
    list_studies,
    read_study,
)
from dmr.studies.table import (
    Ledger,
    pack_losses,
    read_rows,
    row_key,
    unpack_losses,
)
from dmr.studies.template import read_template, write_template

STUDY = "seeds: [0, 1]\narms: {slow: {lr: 1e-3}, fast: {lr: 1e-2}}\n"


def plan_of(folders, name="tiny"):
    return make_plan(read_study(folders.studies / f"{name}.yaml"), folders)


@pytest.mark.parametrize(
    "text, line, said",
    [
        ("sedes: [1]", 2, "did you mean 'seeds'"),
        ("arms:\n  a: {lr: -1}", 3, "outside (0, inf)"),
        ("arms:\n  a: {}\n  b: {lr: quick}", 4, "lr takes a number"),
        ("defaults:\n  moed: plain", 3, "did you mean 'mode'"),
        ("defaults: {mode: plian}", 2, "did you mean 'plain'"),
        ("grid:\n  seed: [1]\n  lr: []", 4, "grid takes a list"),
        ("seeds: 5..1", 2, "such as 0..9"),
        ("limits:\n  wall: soon", 3, "no quantity"),
        ("defaults: {checkpoint: /tmp}", 2, "set by the engine"),
        ("arms: {a: {lr: 1, lr: 2}}", 2, "appears twice"),
        ("arms: {no: {}, off: {}}", 2, "'no' would be read as a number or"),
        ("arms:\n  1.0: {}\n  1: {}", 3, "write '1.0', quoted"),
        ("seeds: [00, 010]", 2, "00 is a number to base 8 or 60"),
        ("defaults: {lr: 20:30}", 2, "20:30 is a number to base 8 or 60"),
        ("arms: {a: {}\n", 3, ""),
    ],
)
def test_errors_name_the_line(tmp_path, text, line, said):
    folders = project(tmp_path, text)
    with pytest.raises(StudyError) as e:
        read_study(folders.studies / "tiny.yaml")
    assert str(e.value).startswith(f"tiny.yaml:{line}: ") and said in str(
        e.value
    ), str(e.value)


def test_a_study_file_is_never_executed(tmp_path):
    target = tmp_path / "made"
    folders = project(
        tmp_path, f"title: !!python/object/apply:pathlib.Path.touch [{target}]"
    )
    with pytest.raises(StudyError):
        read_study(folders.studies / "tiny.yaml")
    assert not target.exists()


def test_the_projects_own_studies_can_be_read():
    folders = find_project(package_folder().parent)
    paths = list_studies(folders)
    assert "demo" in [p.stem for p in paths]
    for path in paths:
        assert read_study(path).cells
    demo = read_study(folders.studies / "demo.yaml")
    assert (
        {c.seed for c in demo.cells} == {0, 1}
        and len(demo.cells) == 2 * len({c.arm for c in demo.cells})
        and not demo.record
    )
    assert all(
        c.parameters["steps"] * (1 - c.parameters["beta2"]) >= 5
        and c.parameters["state"] == "kept"
        for c in demo.cells
    )
    assert {
        (
            c.parameters["modification"],
            c.parameters["routing"],
            c.parameters["strength"],
        )
        for c in demo.cells
        if c.parameters["modification"] != "none"
    } >= {
        ("projection", "shared", "fixed"),
        ("projection", "decoupled", "fixed"),
        ("projection", "displacement", "fixed"),
        ("replay", "shared", "fixed"),
    }
    merged = [c for c in demo.cells if c.parameters.get("consolidation")]
    assert {c.parameters["modification"] for c in merged} == {
        "none",
        "projection",
    }


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.lists(st.integers(), min_size=1, max_size=3, unique=True),
        max_size=3,
    ),
    st.integers(0, 3),
)
def test_a_grid_is_the_whole_product_without_repeats(grid, n):
    zipped = dict(y=list(range(n)), z=list(range(n))) if n else {}
    found = [tuple(sorted(c.items())) for c in combinations(grid, zipped)]
    size = max(n, 1)
    for values in grid.values():
        size *= len(values)
    assert len(found) == len(set(found)) == size
    assert all(dict(c).get("y") == dict(c).get("z") for c in found)


def test_only_what_a_run_uses_invalidates_it(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    for name, text in dict(
        __init__="__version__ = '1'",
        used="from .deep import x",
        deep="x = 1",
        other="y = 1",
    ).items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(
        "dmr.studies.identity.package_folder",
        lambda package_name="dmr": package,
    )
    folders = project(
        tmp_path / "p",
        STUDY,
        cells=(PARAMETERS, "from dmr.used import x", EMIT),
    )
    finish(plan_of(folders))
    assert plan_of(folders).counts() == {"ok": 4}
    (package / "__init__.py").write_text("__version__ = '2'")
    (package / "other.py").write_text("y = 2")
    (package / "deep.py").write_text(
        "'''A docstring.'''\nx   =  1   # a comment"
    )
    assert plan_of(folders).counts() == {"ok": 4}
    (package / "deep.py").write_text("x = 2")
    plan = plan_of(folders)
    assert plan.counts() == {"waiting": 4} and all(
        len(p.stale) == 1 for p in plan.runs
    )
    said = why(plan.runs[0].stale[0].run_id, folders)
    assert any("dmr.deep" in line for line in said) and not any(
        "dmr.used" in line for line in said
    )


@pytest.mark.parametrize(
    "edit, done",
    [
        (lambda p, b, e: (p, "# a comment\n" + b, e), True),
        (
            lambda p, b, e: (p.replace("# a label", "# another label"), b, e),
            True,
        ),
        (lambda p, b, e: (p, b.replace("60_000_000", "50_000_000"), e), False),
        # every run gives its own lr
        (lambda p, b, e: (p.replace("lr = 1e-3 ", "lr = 5e-1 "), b, e), True),
        (lambda p, b, e: (p + "new = 1\n", b, e), False),
        (lambda p, b, e: (p, b, e, "1 + 1"), False),
    ],
)
def test_edits_of_the_template(tmp_path, edit, done):
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb", *edit(PARAMETERS, BODY, EMIT)
    )
    assert plan_of(folders).counts() == ({"ok": 4} if done else {"waiting": 4})


def test_a_new_cell_leaves_the_others_done(tmp_path):
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    (folders.studies / "tiny.yaml").write_text(
        "template: ../tiny.ipynb\n" + STUDY.replace("[0, 1]", "[0, 1, 2]")
    )
    assert plan_of(folders).counts() == {"ok": 4, "waiting": 2}


def test_acceptance_is_one_way_and_needs_a_reason(tmp_path):
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        PARAMETERS,
        BODY.replace("0.05", "0.06"),
        EMIT,
    )
    plan = plan_of(folders)
    with pytest.raises(ValueError, match="say why"):
        accept(plan, " ")
    accept(plan, "a pause does not count")
    assert plan_of(folders).counts() == {"ok": 4}
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        PARAMETERS,
        BODY.replace("0.05", "0.07"),
        EMIT,
    )
    assert plan_of(folders).counts() == {"waiting": 4}
    assert (
        "a pause does not count"
        in (folders.results / "tiny.code.json").read_text()
    )
    assert [
        c["reason"] for c in accept(plan_of(folders), "nor does a longer one")
    ] == ["nor does a longer one"]


def test_a_later_acceptance_leaves_the_reasons_of_earlier_ones():
    one = dict(part="dmr.a", old="1", new="2")
    assert changed_parts(
        {"dmr.a": "1", "dmr.b": "5"}, {"dmr.a": "2", "dmr.b": "6"}, [one]
    ) == [dict(part="dmr.b", old="5", new="6")]
    assert changed_parts({"dmr.a": "1"}, {"dmr.a": "3"}, [one]) == [
        dict(part="dmr.a", old="1", new="3")
    ]
    assert (
        changed_parts({"dmr.a": "1"}, {"dmr.a": "1"}) == []
        and changed_parts({}, {"dmr.a": "1"})[0]["old"] is None
    )


def test_results_of_two_versions_are_never_in_one_table(tmp_path):
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        PARAMETERS,
        BODY + "\nx = 1",
        EMIT,
    )
    plan = plan_of(folders)
    finish(plan, plan.runs[0], result=dict(metrics=dict(loss=2.0)))
    study = read_study(folders.studies / "tiny.yaml")
    with pytest.warns(
        UserWarning, match="3 results were made by other code and are left out"
    ):
        table = load_results(study, folders)
    assert list(table.status) == [
        "ok",
        "missing",
        "missing",
        "missing",
    ] and table.loss.dropna().tolist() == [2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = load_results(study, folders, code="any")
    assert both.groupby("code").loss.unique().map(list).tolist() in (
        [[1.0], [2.0]],
        [[2.0], [1.0]],
    )


def read_folders(tmp_path, monkeypatch):
    "A study on a text of two domains, one of them a link, all its runs made."
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    for name in ("texts/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        words = "\n".join(f"{name} {i} words of a text" for i in range(400))
        (tmp_path / name / "0.txt").write_text(words)
    (tmp_path / "texts/b").symlink_to(tmp_path / "elsewhere")
    head = 'stream = ""  # a folder\n' + PARAMETERS
    study = f"seeds: [0]\ndefaults: {{stream: {tmp_path}/texts}}\n"
    folders = project(tmp_path, study, cells=(head, BODY, EMIT))
    finish(plan_of(folders))
    return folders


def test_a_text_that_changed_is_said_whether_it_was_read_or_not(
    tmp_path, monkeypatch
):
    folders = read_folders(tmp_path, monkeypatch)
    study = read_study(folders.studies / "tiny.yaml")
    (run,) = plan_of(folders).runs
    assert why(run.name, folders)[1].endswith(": it stands")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_results(study, folders)
    with open(tmp_path / "elsewhere/0.txt", "a") as f:  # behind the link
        f.write("\nand one line more")
    assert "not read since it changed" in why(run.name, folders)[1]
    with pytest.warns(UserWarning, match="text of 1 results was not read"):
        load_results(study, folders)
    assert plan_of(folders).counts() == {"waiting": 1}  # this reads it
    assert "text changed" in why(run.name, folders)[1]
    with pytest.warns(UserWarning, match="1 results were made on another text"):
        table = load_results(study, folders)
    assert list(table.status) == ["missing"]
    assert list(load_results(study, folders, code="any").status) == ["ok"]


def test_runs_of_one_name_are_told_apart_by_their_study(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    project(tmp_path, "seeds: [0]\n", name="other")
    one, other = (finish(plan_of(folders, n)) for n in ("tiny", "other"))
    name = one.folder.name
    assert other.folder.name == name
    with pytest.raises(LookupError, match=f"2 runs .*other/{name}, tiny/"):
        find_run(name, folders)
    for study in ("tiny", "other"):
        for asked in (f"{study}/{name}", f"runs/{study}/{name[:-3]}"):
            found, run = find_run(asked, folders)
            assert found == study and run.run.folder.parent.name == study


def test_why_shows_how_the_code_differs_before_a_choice(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    plan = plan_of(folders)
    keep_sources(plan)  # as a batch does
    run = finish(plan)
    cells = PARAMETERS, BODY, EMIT.replace("* 10", "* 20")
    write_template(tmp_path / "nbs/experiments/tiny.ipynb", *cells)
    said = "\n".join(why(run.folder.name, folders))
    assert "-metrics = dict(loss=lr * 10" in said
    assert "+metrics = dict(loss=lr * 20" in said


def test_arms_may_be_called_as_pandas_calls_nothing(tmp_path):
    folders = project(tmp_path, "seeds: [0]\narms: {None: {}, NA: {lr: 1}}\n")
    table = load_results("tiny", folders)
    assert list(table.arm) == ["None", "NA"]


def test_values_that_no_run_could_be_named_after_are_refused(tmp_path):
    head = "options = {}  # more\n" + PARAMETERS
    text = "seeds: [0]\ndefaults: {options: {since: 2020-01-01}}\n"
    folders = project(tmp_path, text, cells=(head, BODY, EMIT))
    with pytest.raises(StudyError, match="write a date in quotes"):
        read_study(folders.studies / "tiny.yaml")
    own = dict(options={1: 2, "b": 3})
    (folders.studies / "tiny.yaml").write_text("template: ../tiny.ipynb\n")
    with pytest.raises(ValueError, match="with text as its keys"):
        read_study(folders.studies / "tiny.yaml", own)


def test_rows_count_as_done_on_a_new_machine(tmp_path):
    folders = project(tmp_path, STUDY)
    plan = plan_of(folders)
    finish(plan, *plan.runs[:3])
    plan = plan_of(folders)
    ledger = plan.ledger
    ledger.record([r for r in table_rows(plan) if r["status"] == OK])
    ledger.remember(plan.runs[0].identity)
    shutil.rmtree(folders.runs)
    again = plan_of(folders)
    assert again.counts() == {"ok": 3, "waiting": 1}
    assert [r.get("metrics") for r in results_of(again)] == [
        {"loss": 1.0}
    ] * 3 + [None]
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        PARAMETERS,
        BODY + "\nx = 1",
        EMIT,
    )
    assert plan_of(folders).counts() == {"waiting": 4}
    assert any("template" in line for line in why(again.runs[0].name, folders))
    accept(plan_of(folders), "x is not used")
    assert plan_of(folders).counts() == {"ok": 3, "waiting": 1}


def test_a_damaged_result_is_made_again(tmp_path):
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    (plan_of(folders).runs[0].run.folder / "result.json").write_text(
        '{"metrics": {"loss": 0'
    )
    assert plan_of(folders).counts() == {"ok": 3, "killed": 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.booleans(), st.data())
def test_the_loss_matrix_survives_its_row(n, untrained, data):
    order = data.draw(st.permutations([f"d{i}" for i in range(n)]))
    loss = st.floats(0.1, 9)
    records = [
        dict(
            stage=i,
            domain=j,
            trained_domain=order[i] if i >= 0 else None,
            eval_domain=f"d{j}",
            loss=data.draw(loss),
        )
        for i in range(-1 if untrained else 0, n)
        for j in range(n)
    ]
    again = unpack_losses(json.loads(json.dumps(pack_losses(records))))
    assert len(again) == len(records)
    for a, b in zip(again, records):
        assert {**a, "loss": 0} == {**b, "loss": 0} and a[
            "loss"
        ] == pytest.approx(b["loss"], rel=1e-6)


def test_a_table_keeps_one_row_for_each_run_and_every_column(tmp_path):
    ledger = Ledger(tmp_path / "t.csv", tmp_path / "t.json")
    ledger.record([dict(cell="1", stream_hash=None, code="c", loss=1)])
    ledger.record(
        [
            dict(cell="1", stream_hash=None, code="c", loss=2),
            dict(
                cell="2",
                stream_hash=None,
                code="c",
                note='a "quoted", line\nbreak',
            ),
        ]
    )
    rows = read_rows(tmp_path / "t.csv")
    assert [r["loss"] for r in rows] == ["2", ""] and rows[1][
        "note"
    ] == 'a "quoted", line\nbreak'
    assert len({row_key(r) for r in rows}) == 2


def test_a_plan_over_a_thousand_finished_runs_is_fast(tmp_path):
    folders = project(tmp_path, "seeds: 0..999\n")
    finish(plan_of(folders))
    plan_of(folders)
    times = []
    for _ in range(3):
        begin = time.process_time()
        plan = plan_of(folders)
        times.append(time.process_time() - begin)
    assert plan.counts() == {"ok": 1000}
    assert min(times) < 2


def test_a_comment_may_stand_above_its_parameter(tmp_path):
    cell = """\
# decay of the second moment; the horizon is
# steps * (1 - beta2), [0, 1)
beta2 = 0.95
sizes = [  # one a layer
    8,  # the first
]
rank = 8  # directions, [1, inf)
"""
    path = write_template(tmp_path / "t.ipynb", cell, "print(beta2)")
    found = read_template(path).parameters
    text = "decay of the second moment; the horizon is steps * (1 - beta2)"
    assert found["beta2"].help == text and 1.0 not in found["beta2"].interval
    assert found["sizes"].help == "" and found["rank"].help == "directions"


def test_a_varied_parameter_that_is_given_is_what_the_label_says(tmp_path):
    folders = project(tmp_path, "grid: {lr: [0.1]}\nseeds: [0]\n")
    path = folders.studies / "tiny.yaml"
    (cell,) = read_study(path, dict(lr=0.9)).cells
    assert cell.label == "lr=0.9 seed 0" and "0.9" in cell.slug
    (same,) = read_study(path).cells
    assert same.label == "lr=0.1 seed 0"
    assert cell.hash == digest({**same.parameters, "lr": 0.9})


def test_seeds_are_varied_in_one_place(tmp_path):
    path = project(tmp_path, "seeds: [0]\ngrid:\n  seed: [1, 2]\n").studies
    with pytest.raises(StudyError, match="tiny.yaml:4: 'seed' is varied here"):
        read_study(path / "tiny.yaml")


def test_an_analysis_that_is_not_there_is_named_before_any_run(tmp_path):
    folders = project(tmp_path, "seeds: [0]\nanalysis: none.ipynb\n")
    with pytest.raises(StudyError, match="tiny.yaml:3: no analysis notebook"):
        read_study(folders.studies / "tiny.yaml")
    write_template(folders.studies / "none.ipynb", "")
    assert read_study(folders.studies / "tiny.yaml").analysis.is_file()


def test_a_long_value_makes_a_name_that_a_folder_can_have(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    path = folders.studies / "tiny.yaml"
    names = {read_study(path, dict(arm=x * 900)).name for x in "ab"}
    assert len(names) == 2
    for name in names:
        (tmp_path / name).mkdir()


def test_a_command_names_a_study_as_it_was_given(tmp_path, monkeypatch):
    folders = project(tmp_path, "seeds: [0]\n")
    monkeypatch.chdir(tmp_path)
    own = folders.studies / "tiny.yaml"
    other = tmp_path / "tiny.yaml"
    other.write_text("template: nbs/experiments/tiny.ipynb\nseeds: [0]\n")
    given = dict(lr=0.5, arm="3", mode="plain")
    options = "-p lr 0.5 -p arm '\"3\"' -p mode plain"
    said = [
        command_of(find_study(name, folders, some), folders)
        for name, some in (
            ("tiny", None),
            (str(own), None),
            ("tiny.yaml", None),
            ("tiny.yaml", given),
            ("nbs/experiments/tiny.ipynb", given),
        )
    ]
    assert said == [
        "tiny",
        "tiny",
        "tiny.yaml",
        f"tiny.yaml {options}",
        f"nbs/experiments/tiny.ipynb {options}",
    ]
    (_, *words) = shlex.split(said[-1])
    assert {
        k: parse_value(v) for k, v in zip(words[1::3], words[2::3])
    } == given


@pytest.mark.parametrize(
    "asked, given",
    [
        ("tiny.yaml", {}),
        ("tiny.yaml", dict(lr=0.5)),
        ("tiny", dict(lr=0.5)),
        ("nbs/experiments/tiny.ipynb", dict(lr=0.5)),
    ],
)
def test_a_run_is_judged_by_the_study_that_it_was_made_for(
    tmp_path, monkeypatch, asked, given
):
    folders = project(tmp_path, "seeds: [7]\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        "template: nbs/experiments/tiny.ipynb\nseeds: [0]\n"
    )
    plan = make_plan(find_study(asked, folders, given), folders)
    run = finish(plan)
    write_plan(plan)
    if asked.endswith(".ipynb"):  # another run of it, later
        write_plan(make_plan(find_study(asked, folders), folders))
    monkeypatch.chdir("/")
    _, second = why(run.folder.name, folders)
    assert second == "its identity is the present one: it stands"
    old = tmp_path / "runs" / plan.study.name / "plan.json"
    old.write_text(json.dumps(dict(runs=[])))  # as it was written once
    if plan.study.name == "tiny":  # the project's own, by its name
        assert "no cell" in why(run.folder.name, folders)[1]
    else:
        with pytest.raises(FileNotFoundError, match="no study"):
            why(run.folder.name, folders)


def test_a_relative_text_is_read_where_its_runs_read_it(tmp_path, monkeypatch):
    head = 'stream = ""  # a folder\n' + PARAMETERS
    study = "seeds: [0]\ndefaults: {stream: texts}\n"
    folders = project(tmp_path, study, cells=(head, BODY, EMIT))
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    below = tmp_path / "work"
    below.mkdir()
    for name in "ab":
        text = "\n".join(f"{name} {i} words of a text" for i in range(400))
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{name}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    (first,) = plan_of(folders).runs
    monkeypatch.chdir(below)
    (again,) = plan_of(folders).runs
    assert first.identity == again.identity and first.name == again.name
    shutil.copytree(tmp_path / "texts", below / "texts")
    tiny = read_study(folders.studies / "tiny.yaml")
    with pytest.raises(ValueError, match="'texts' is .*work/texts here"):
        make_plan(tiny, folders)
    # who only reads, such as `dmr why`, is told of no text
    (known,) = make_plan(tiny, folders, load=False).runs
    assert known.identity.stream == "unknown"
    whole = read_study(
        folders.studies / "tiny.yaml", dict(stream=str(below / "texts"))
    )
    assert make_plan(whole, folders).runs
    with pytest.raises(ValueError, match="names no folder: File name too long"):
        long = read_study(folders.studies / "tiny.yaml", dict(stream="x" * 999))
        make_plan(long, folders)
