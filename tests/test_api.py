"""What code that was written for the first edition finds: every module that
its README, guides and conformance chapter showed, with the names that they
used, and one line that says where the thing lives now.
"""

import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import dmr

#: Module of the first edition -> names that users were shown of it.
SHOWN = {
    "agem": "AGEM",
    "boundary": "BoundaryProjection",
    "callbacks": "DomainCallback",
    "conformance": "CHECKS check",
    "controls": "RandomBasis CurrentBasis LastTaskProjection",
    "families": "FAMILIES next_byte_logit for_language_model",
    "figures": "use_theme",
    "finetuning": "FinetuneConfig finetune_stream",
    "gpm": "GPM SGP NSCL",
    "inputs": "DomainSample scalar_of capture_inputs InputMoment",
    "lightning": "LightningRouter",
    "lora": "restart_lora route_lora lora_layers",
    "metrics": "loss_matrix LossMatrix forgetting",
    "model": "build_model ByteLM",
    "modification": "Dense LowRank Modification Target squared_cosine",
    "moments": "moments_of unwrap",
    "ogd": "OGD",
    "penalty": "EWC SI",
    "pretrained": "small_llama load_pretrained need",
    "probes": "Probe",
    "projection": "Projection",
    "replay": "ReplayBuffer ReplayMix",
    "report": "write_report",
    "routing": "MomentRouter ROUTINGS routed_moments Inflation",
    "sharding": "Packed",
    "statistics": "mean_interval match_control",
    "streams": "from_folder from_texts load_stream list_streams",
    "strength": "Fixed OverlapAware Strength",
    "studies": "StudyError Cell",
    "subspace": "Sketch Growth grow",
    "synthetic": "MarkovSource synthetic_stream",
    "trainer": "RouterCallback RoutedTrainer",
    "training": "Config train_stream read_checkpoint write_checkpoint horizon",
}
#: Ask for every name twice, and say how often Python warned.
ASK = """
import sys, warnings
for line in sys.argv[1:]:
    old, name = line.split(".")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FutureWarning)
        for _ in range(2):
            exec(f"from dmr.{old} import {name}")
    said = [str(w.message) for w in said if "dmr." in str(w.message)]
    print(old, name, len(said), *said[:1], sep="|")
"""


def test_old_paths_give_their_names_and_say_so_once():
    asked = [
        f"{old}.{n}" for old, names in SHOWN.items() for n in names.split()
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *asked], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert [f"{old}.{name}" for old, name, *_ in lines] == asked
    for old, name, times, *said in lines:
        if name == "MomentRouter":  # at home in `dmr.routing`, as before
            assert times == "0"
        else:
            assert times == "1", (old, name, said)
            assert said[0].startswith(f"dmr.{old}.{name} is dmr.")
            where = said[0].split()[2]
            home, _, last = where.rpartition(".")
            assert last == name and hasattr(import_module(home), name)


def test_every_old_module_that_is_kept_was_shown():
    assert set(SHOWN) == set(dmr._MOVED)


def test_a_name_that_is_gone_says_where_its_module_is():
    with pytest.raises(AttributeError, match="dmr.routing.router and dmr.rout"):
        _ = import_module("dmr.routing").MomentRooter
    with pytest.raises(ImportError):
        exec("from dmr.boundary import no_such_name")
    with pytest.raises(ModuleNotFoundError):
        import_module("dmr.no_such_module")


def test_rooms_import_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for room in ("routing", "training", "studies"):
            import_module(f"dmr.{room}")
        assert dmr.MomentRouter is import_module("dmr.routing").MomentRouter


def test_the_readmes_lines_run_as_they_stand(capsys):
    "On the home page's own model and domains, and print what stands there."
    torch = import_module("torch")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.S)
    (shown,) = re.findall(r"```\n(MomentRouter\(.*?)```", readme, re.S)
    torch.manual_seed(0)
    layers = (torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 5))
    batch = lambda: (torch.randn(32, 20), torch.randint(0, 5, (32,)))
    domains = [[batch() for _ in range(30)] for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    before = [p.detach().clone() for p in model.parameters()]
    exec("".join(code), {"model": model, "domains": domains})
    assert capsys.readouterr().out == shown
    pairs = zip(model.parameters(), before)
    assert not any(torch.equal(p, q) for p, q in pairs)
