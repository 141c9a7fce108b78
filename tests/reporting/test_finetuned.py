"""The commands for one pretrained model, in an empty folder, as a user starts
them; and the page they end with.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from dmr.cli import main
from dmr.reporting.finetuned import (
    draw_plane,
    equal_learning_table,
    paths,
    reference_run,
    template,
)
from dmr.training.finetune import Training, compare, save_small_llama

SMALL = "--steps 6 --rates 1e-3 3e-3 -p length 48 -p batch 2 -p windows 2"
SMALL = f"{SMALL} -p keep_tokens 384 -p looks 2 -p device cpu".split()


@pytest.fixture
def empty(tmp_path):
    "A folder with texts and a model beside it, and nothing else."
    save_small_llama(tmp_path / "tiny", width=32)
    (tmp_path / "new.txt").write_text("Rain falls, the sea stays. " * 200)
    (tmp_path / "old.txt").write_text("def f(x): return x * x\n" * 200)
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def call(folder, *argv, python=(), **env):
    root = Path(__file__).parents[2]
    code = "import sys; from dmr.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, *python, "-c", code, *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), **env},
    )


@pytest.mark.parametrize(
    "command, method",
    [
        ("finetune", []),
        ("compare", []),
        pytest.param(
            *("compare", ["--method", "merge+projection"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_command_ends_with_a_page(command, method, empty):
    texts = ["../tiny", "../new.txt", "--keep", "../old.txt", *method]
    # the folder by its option, or as a parameter
    texts += ["-o", "out"] if command == "finetune" else "-p output out".split()
    done = call(empty, command, *texts, *SMALL)
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    out = empty / "out"
    assert last == f"open {(out / command).resolve().as_uri()}.html"
    page = (out / f"{command}.html").read_text()
    # nothing is asked of the network, and no code is shown
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "import dmr" not in page and "skip_exec" not in page
    assert (
        page.count("data:image/png") == {"finetune": 2, "compare": 3}[command]
    )
    cells = json.loads((out / f"{command}.ipynb").read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", ())]
    assert not any(o["output_type"] == "error" for o in outputs)
    result = json.loads((out / "result.json").read_text())
    change = result["runs"][result["best"]]["change"]["new"]["bits_per_byte"]
    assert f"{change:+.3f}".lstrip("-+") in page
    assert (method or ["merge"])[-1] in done.stdout
    if command == "finetune":
        shows_everything(page, result)
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(out / "model")
        AutoTokenizer.from_pretrained(out / "model")
    else:
        assert not (out / "model").exists()
    written = [p for p in empty.rglob("*") if p.is_file()]
    assert all(out in p.parents for p in written)
    # again: nothing is trained, and the page is there
    began = time.time()
    assert call(empty, command, *texts, *SMALL).returncode == 0
    for state in out.glob("runs/*/run.json"):
        assert state.stat().st_mtime < began


def shows_everything(page, result):
    "Gains and losses of each text, nine averages, samples before and after."
    run = result["runs"][result["best"]]
    assert {*run["change"]} == {"new", "old", "factbook", "speeches"}
    bits = lambda x: x["bits_per_byte"]
    cell = lambda x: f"<td>{x}</td>"
    for name, x in run["change"].items():
        before = result["texts"][name]
        assert f"<th>{name}</th>" in page
        assert cell(f"{bits(before) + bits(x):.3f}") in page
        said = f"{bits(x):+.3f} ± {x['bits_per_byte_se']:.3f}"
        assert cell(said) in page, name
    assert len(run["way_back"]) == 9
    for point in run["way_back"]:
        assert f"<th>{point['share']:g}</th>" in page
        for name in ("old", "factbook", "speeches"):
            assert cell(f"{bits(point['change'][name]):+.3f}") in page
    assert {*result["prompts"]} == {"new", "old"}
    for name in result["prompts"]:
        assert f"--- {name}: " in page
    assert page.count("\nbefore: ") == page.count("\nafter:  ") == 2
    assert "loss over the steps" in page or "On the way" in page


def test_what_is_wrong_is_one_line(empty, capsys, monkeypatch):
    monkeypatch.chdir(empty)
    for argv, said in [
        (["../tiny", "nothing.txt"], "no file or folder"),
        (["../nobody", "../new.txt"], "no language model"),
        (["../tiny", "../new.txt", "--method", "merge"], "keep='self'"),
        (["../tiny", "../new.txt", "--rates", "-1"], "rates=-1.0 lies outside"),
        (["../tiny", "../new.txt", "-p", "epochs", "3"], "unknown parameter"),
        (["../tiny", "../new.txt", "--keep", "../new.txt"], "stand in new="),
        (["../tiny", "../new.txt", "-p", "keep", "2024"], "keep=2024 must be"),
        (["../tiny", "../new.txt", "-p", "output", "7"], "output=7 must be"),
    ]:
        assert main(["finetune", *argv, "-p", "device", "cpu"]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("dmr finetune: ") and said in err, err
    assert not [*empty.iterdir()]


def test_a_page_may_lie_among_the_text(empty, capsys, monkeypatch):
    monkeypatch.chdir(empty)
    (empty / "new.txt").write_text("Rain falls, the sea stays. " * 200)
    for _ in range(2):
        assert main(["finetune", "../tiny", ".", *SMALL]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.endswith("/finetuned/finetune.html")


def test_a_model_too_large_for_the_memory_is_one_line(
    empty, capsys, monkeypatch
):
    monkeypatch.chdir(empty)
    monkeypatch.setattr("dmr.training.pretrained.available_memory", lambda: 1)
    argv = ["finetune", "../tiny", "../new.txt", "-p", "device", "cpu"]
    assert main(argv) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("dmr finetune: ") and "take a smaller model" in err
    assert not [*empty.iterdir()]


def test_another_method_stands_beside_plain_steps(empty):
    """Its own training is no control: those are trained plainly beside it."""
    given = {"steps": 6, "batch": 2, "length": 48, "windows": 2, "looks": 2}
    given |= {"keep_tokens": 384, "device": "cpu", "progress": False}
    where = (empty / "../tiny", empty / "../new.txt", empty / "../old.txt")
    call = lambda method: compare(
        *where, method=method, rates=[1e-3, 3e-3], lora=None,
        output=empty / method, **given,
    )  # fmt: skip
    both, merge = call("merge+projection"), call("merge")
    made = [(run["method"], run["rate"]) for run in both.runs]
    assert made == [
        (m, r) for m in ("merge+projection", "none") for r in (1e-3, 3e-3)
    ]
    assert reference_run(both)["method"] == "merge+projection"
    # plain steps are those of the merge alone
    assert paths(both, "factbook").keys() == paths(merge, "factbook").keys()
    one, other = (dict(paths(x, "factbook")) for x in (both, merge))
    name = "plain, at other rates"
    flat = lambda way: [x for spot in way for x in spot]
    assert flat(one[name]) == pytest.approx(flat(other[name]))
    heads = [equal_learning_table(x).index[0] for x in (both, merge)]
    assert heads == ["merge+projection", "merge (default)"]
    # what the command says last is of the method, whatever learned more
    assert both.run["method"] == "merge+projection"
    # a control that diverged keeps its place
    gone = [r for r in both.runs if r["method"] == "none"]
    for run in gone:
        del run["change"]
    table = equal_learning_table(both)
    assert [*table["lost: factbook"][1:]] == ["diverged"] * 3
    draw_plane(both, "factbook")
    for run in both.runs:
        run.pop("change", None)
    with pytest.raises(ValueError, match="by 'merge.projection' diverged"):
        reference_run(both)


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--method", "none", "--keep", "self"],
            "method='none' is what the others",
        ),
        ([], "--keep on the command line), a file or a folder, or self"),
    ],
)
def test_a_comparison_refuses_in_one_line(
    argv, said, empty, capsys, monkeypatch
):
    monkeypatch.chdir(empty)
    assert main(["compare", "../tiny", "../new.txt", *argv]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("dmr compare: ") and said in err
    assert err.count("\n") == 0 and not [*empty.iterdir()]


def test_an_interrupted_command_says_how_to_go_on(empty, capsys, monkeypatch):
    monkeypatch.chdir(empty)
    step = Training.train_step

    def interrupted(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Training, "train_step", interrupted)
    argv = ["finetune", "../tiny", "../new.txt", "-o", "out", *SMALL]
    assert main(argv) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert [*Path("out/runs").glob("*/state.pt")]


@pytest.mark.parametrize(
    "module, extra",
    [("papermill", "experiments"), ("nbconvert", "experiments")],
)
def test_a_missing_extra_is_named_before_training(module, extra, empty):
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from dmr.cli import main; sys.exit(main())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, "finetune", "../tiny", "../new.txt"],
        cwd=empty,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 2
    assert f"pip install 'moment-routing[{extra}]'" in done.stderr
    assert not [*empty.iterdir()]


def test_the_pages_are_templates_that_the_wheel_carries():
    for name in ("finetune", "compare"):
        path = template(name)
        assert path.parent.name == "experiments"
        assert not path.name[0].isdigit()  # what setup.py copies


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2_from_end_to_end(empty):
    """A few steps on a processor, the past written by the model itself: less
    of everything than the defaults, which take some minutes.
    """
    for path in (Path(__file__).parents[2] / "dmr/routing").glob("*.py"):
        (empty.parent / "code").mkdir(exist_ok=True)
        (empty.parent / "code" / path.name).write_text(path.read_text())
    done = call(
        empty, "finetune", "smollm2-135m", "../code", "--keep", "self",
        "--steps", "8", "-p", "device", "cpu", "-p", "windows", "4",
        "-p", "keep_tokens", "2048",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    # the weights came out of a .gguf, and go into an ordinary folder
    AutoModelForCausalLM.from_pretrained(empty / "finetuned/model")
    result = json.loads((empty / "finetuned/result.json").read_text())
    assert result["runs"][0]["change"]["new"]["bits_per_byte"] < 0
