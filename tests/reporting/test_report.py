"""The report from made-up runs with known answers: table, figures, page, and
what happens when runs fail.
"""

import csv
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from dmr.reporting import report as R
from dmr.reporting.arms import draw_arm, mean_point, plane_finding
from dmr.reporting.figures import png_size
from dmr.reporting.statistics import Point, mean_interval
from dmr.studies.table import tidy_run

NAMES = [
    "shakespeare",
    "speeches",
    "bible",
    "factbook",
    "jargon",
    "fortunes",
    "python",
    "cpp",
]
PROJECTION = {"modification": "projection", "rank": 16}
PLAN = {  # arm -> (learning accuracy, rise, parameters)
    "vanilla ½×": (2.30, 0.58, {"lr": 1e-3}),
    "vanilla": (2.19, 0.72, {}),
    "vanilla 1.5×": (2.16, 0.80, {"lr": 3e-3}),
    "shared projection": (2.19, 0.66, {"routing": "shared", **PROJECTION}),
    "fixed decoupled": (2.24, 0.60, {"routing": "decoupled", **PROJECTION}),
    "adaptive decoupled": (
        2.20,
        0.70,
        {"routing": "decoupled", "strength": "overlap", **PROJECTION},
    ),
    "displacement": (2.23, 0.61, {"routing": "displacement", **PROJECTION}),
    "replay 0.5 % shared": (
        2.25,
        0.40,
        {"modification": "replay", "routing": "shared"},
    ),
    "replay 0.5 % decoupled": (
        2.26,
        0.38,
        {"modification": "replay", "routing": "decoupled"},
    ),
    "interpolation": (2.40, 0.20, {"interpolate": 0.5}),
    "interpolation + projection": (
        2.28,
        0.15,
        {"interpolate": 0.5, "routing": "shared", **PROJECTION},
    ),
}


def lost(rise, domains=8):
    "Forgetting of a made-up run, from the formula that makes it."
    return rise * np.mean(1 - np.exp(-np.arange(1, domains) / 2))


def run(
    arm,
    seed,
    a=2.2,
    rise=0.6,
    names=NAMES,
    H=7.5,
    stream="text8",
    records=True,
    **parameters,
):
    """Domain j is learned to a + 0.01·seed (+ an offset that averages out) and
    then rises by rise·(1 − e^(−(i−j)/2)).
    """
    n = len(names)
    learned = a + np.linspace(-0.4, 0.4, n) + 0.01 * seed
    L = [
        [
            learned[j] + rise * (1 - math.exp(-(i - j) / 2)) if i >= j else 3.6
            for j in range(n)
        ]
        for i in range(n)
    ]
    result = {
        "schema": 1,
        "run_id": f"{arm}-{seed}".replace(" ", "-"),
        "parameters": {
            "arm": arm,
            "seed": seed,
            "stream": stream,
            "lr": 2e-3,
            "beta2": 0.95,
            "steps": 150,
            "state": "kept",
            "modification": "none",
            "routing": "decoupled",
            "strength": "fixed",
            "alpha": 0.5,
            "fraction": 0.005,
            "interpolate": None,
            **parameters,
        },
        "records": (
            [
                {
                    "stage": i,
                    "domain": j,
                    "trained_domain": names[i],
                    "eval_domain": names[j],
                    "loss": L[i][j],
                }
                for i in range(n)
                for j in range(n)
            ]
            + [
                {
                    "stage": -1,
                    "domain": j,
                    "trained_domain": None,
                    "eval_domain": names[j],
                    "loss": 5.5,
                }
                for j in range(n)
            ]
        ),
        "stages": [
            {
                "stage": i,
                "domain": names[i],
                "steps": 150,
                "horizon": H,
                "step_norm": 7.0,
                "tokens_per_s": 2e5,
            }
            for i in range(n)
        ],
        "identity": {"stream_hash": "ab" * 6},
        "environment": {"python": "3.11", "torch": "2.13.0"},
        "wall_s": 20.0,
    }
    if not records:
        result["metrics"] = {
            k: tidy_run(result)[k]
            for k in ("forgetting", "learning_accuracy", "final_average")
        }
        result["records"] = []
    return result


def demo(seeds=2, arms=PLAN, **options):
    return [
        run(arm, s, *PLAN[arm][:2], **options, **PLAN[arm][2])
        for arm in arms
        for s in range(seeds)
    ]


# quick to draw
FEW = {
    "arms": ["vanilla ½×", "vanilla", "shared projection"],
    "names": NAMES[:3],
}


def failed(arm, seed, error="ValueError: rank=64 exceeds fan_in=48"):
    return {
        "run_id": f"x-{seed}",
        "status": "failed",
        "error": error,
        "parameters": {
            "arm": arm,
            "seed": seed,
            "lr": 2e-3,
            **PLAN.get(arm, (0, 0, {}))[2],
        },
    }


class Page(HTMLParser):
    """Collects what a reader's browser would have to fetch, the pictures, the
    text; checks that tags close.
    """

    void = {"meta", "img", "br", "link", "input", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.fetched, self.words, self.policy = (
            [],
            [],
            [],
            [],
            "",
        )
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == "img":
            self.images.append(a)
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy":
            self.policy = a["content"]
        self.fetched += [
            v
            for k, v in a.items()
            if k in ("src", "href", "srcset", "data", "action")
        ]
        assert not any(k.startswith("on") for k in a) and tag not in (
            "script",
            "iframe",
            "object",
            "link",
        )
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    results = demo()
    results[7] = failed("shared projection", 1)
    return (
        R.write_report(
            results, tmp_path_factory.mktemp("report"), command="dmr run"
        ),
        results,
    )


def test_known_answers():
    study = R.group_arms(demo())
    lines = {s.name: s for s in study.lines}
    assert list(lines) == list(PLAN)
    for arm, (a, rise, _) in PLAN.items():
        got = lines[arm]
        assert got.mean["forgetting"] == pytest.approx(lost(rise))
        assert got.mean["learning_accuracy"] == pytest.approx(a + 0.005)
        assert study.arms[arm].values("forward_transfer")[1] == pytest.approx(
            5.5 - 3.6
        )
        assert got.mean["final_average"] == pytest.approx(
            a + 0.005 + lost(rise) * 7 / 8
        )
        if arm != "vanilla":
            assert got.delta["forgetting"].estimate == pytest.approx(
                lost(rise) - lost(0.72)
            )
            assert got.delta["learning_accuracy"].estimate == pytest.approx(
                a - 2.19
            )
    assert lines["vanilla"].delta["forgetting"] is None
    # arms between two control points lie between their values
    curve = [(2.16, 0.80), (2.19, 0.72), (2.30, 0.58)]
    for arm, (a, rise, p) in PLAN.items():
        if (
            p.get("modification", "none") == "none"
            and p.get("interpolate") is None
        ):
            assert lines[arm].note == "control"
        elif arm == "interpolation":
            assert (
                lines[arm].matched is None
                and "learned less than the control's smallest rate"
                in lines[arm].note
            )
        else:
            i = next(k for k in range(2) if curve[k][0] <= a <= curve[k + 1][0])
            at_control = lost(rise) - lines[arm].matched.estimate
            assert (
                lost(curve[i + 1][1]) - 1e-9
                <= at_control
                <= lost(curve[i][1]) + 1e-9
            )
            assert lines[arm].note == ""


def test_table(written):
    table = written[0].table
    assert table.startswith(
        "H = 7.5, n = 2 seeds: a demonstration, no verdict."
    )
    assert (
        "1 of 22 runs did not finish" in table
        and "shared projection, seed 1: failed, ValueError: rank=64" in table
    )
    rows = {line[:26].strip(): line[26:].split() for line in table.splitlines()}
    assert rows["shared projection"][-1] == "1/2"
    nats = table.split("as perplexity")[0]
    line = next(
        x for x in nats.splitlines() if x.startswith("replay 0.5 % shared")
    )
    assert (
        line.split()[4:6]
        == [f"{lost(0.40):.3f}", f"{lost(0.40) - lost(0.72):+.3f}"]
        and line.split()[-1] == "2/2"
    )
    assert (
        next(
            x for x in nats.splitlines() if x.startswith("interpolation ")
        ).split()[3]
        == "n/c"
    )
    assert "±" not in table and max(len(x) for x in table.splitlines()) <= 100


def test_files(written):
    report, results = written
    for path in (report.plane, report.stream):
        data = path.read_bytes()
        # 5 inches at 2 × 100 dots
        assert data.startswith(b"\x89PNG") and png_size(data)[0] >= 900
    rows = list(csv.DictReader(report.csv.open()))
    assert len(rows) == 22 and [r["status"] for r in rows].count("failed") == 1
    assert {
        "arm",
        "seed",
        "lr",
        "modification",
        "forgetting",
        "identity_stream_hash",
        "wall_s",
        "error",
    } <= set(rows[0])
    assert rows[7]["forgetting"] == "" and rows[7]["error"].startswith(
        "ValueError: rank=64"
    )
    assert len(list(csv.DictReader(report.records_csv.open()))) == 21 * 72
    assert [r["arm"] for r in report.failed] == ["shared projection"]
    for name in ("report.html", "plane.png", "stream.png", "runs.csv"):
        assert str(report.html.with_name(name)) in str(report)
    assert not list(report.html.parent.glob(".*"))


def test_page(written):
    page = Page(written[0].html.read_text())
    assert len(page.images) == 2 and all(
        i["src"].startswith("data:image/png;base64,") for i in page.images
    )
    assert all(len(i["alt"]) > 80 for i in page.images) and all(
        x.startswith("data:") for x in page.fetched
    )
    assert "default-src 'none'" in page.policy
    raw = written[0].html.read_text()
    assert (
        "http://" not in raw
        and "https://" not in raw
        and "@import" not in raw
        and "url(" not in raw
    )
    assert 'name="viewport"' in raw and "prefers-color-scheme: dark" in raw
    for words in (
        "a demonstration, no verdict",
        "1 of 22 runs did not finish",
        "rank=64 exceeds fan_in=48",
        "H = steps per domain · (1 − β₂) = 7.5",
        "dmr run",
        "ab" * 6,
        "2.13.0",
        "With three seeds or fewer",
        "not comparable",
        f"{lost(0.15):.3f}",
        "beta2",
        "text8, 8 domains",
    ):
        assert words in page.text, words
    # each seed's own value is on the page
    for arm, (a, rise, _) in PLAN.items():
        for seed in (0, 1):
            if (arm, seed) != ("shared projection", 1):
                assert (
                    f"{seed} {lost(rise):.3f} {a + 0.01 * seed:.3f}"
                    in page.text
                )


def test_from_four_seeds_on_there_are_intervals(tmp_path):
    results = demo(4, **FEW)
    for r in results:  # some noise, or the intervals are points
        shift = np.random.default_rng(
            [r["parameters"]["seed"], len(r["run_id"])]
        ).normal(0, 0.01)
        for record in r["records"]:
            record["loss"] += shift * (record["stage"] > record["domain"])
    report = R.write_report(results, tmp_path)
    text = Page(report.html.read_text()).text
    assert "demonstration" not in report.table + text and "±" in report.table
    assert "n = 4 seeds, 95 % intervals" in report.table
    assert (
        "BCa bootstrap" in text
        and "matched vanilla" in text
        and "interquartile mean" in text
    )


def test_nothing_finished_still_gives_a_page_with_the_errors(tmp_path):
    report = R.write_report(
        [failed("shared projection", s) for s in (0, 1)], tmp_path
    )
    assert report.plane is None and report.stream is None
    page = Page(report.html.read_text())
    assert (
        not page.images
        and "2 of 2 runs did not finish" in page.text
        and "nothing to draw" in page.text
    )


@pytest.mark.parametrize(
    "results",
    [
        # no vanilla at all
        [
            run(
                "shared projection",
                0,
                names=NAMES[:3],
                **PLAN["shared projection"][2],
            )
        ],
        # no curve
        [
            run("vanilla", 0, names=NAMES[:3]),
            run(
                "fixed decoupled",
                0,
                names=NAMES[:3],
                a=2.3,
                **PLAN["fixed decoupled"][2],
            ),
        ],
        [
            failed("vanilla", 0),
            run(
                "fixed decoupled",
                0,
                names=NAMES[:3],
                **PLAN["fixed decoupled"][2],
            ),
        ],
        # no common seed
        [
            run("vanilla", 0, names=NAMES[:3]),
            run(
                "fixed decoupled",
                1,
                names=NAMES[:3],
                **PLAN["fixed decoupled"][2],
            ),
        ],
    ],
)
def test_small_studies(results, tmp_path):
    report = R.write_report(results, tmp_path)
    assert report.plane and report.stream and "nan" not in report.table
    assert "nan" not in Page(report.html.read_text()).text


@pytest.mark.parametrize("given", [None, math.nan, "no number", {"a": 1}])
def test_an_arm_without_its_numbers_stops_no_report(given, tmp_path):
    "As a template of one's own leaves it, or a run that diverged."
    results = demo(records=False)
    for r in results[:3]:
        r["metrics"] = dict(loss=1.0, forgetting=given)
    report = R.write_report(results, tmp_path)
    assert report.plane and "nan" not in report.table
    for r in results:
        r["metrics"] = dict(loss=1.0)
    report = R.write_report(results, tmp_path / "none")
    assert report.plane is None and report.html.exists()


def test_metrics_without_records(tmp_path):
    report = R.write_report(demo(records=False), tmp_path)
    assert (
        report.plane
        and report.stream is None
        and f"{lost(0.40):.3f}" in report.table
    )


def test_sixteen_domains_in_an_order_that_changes_with_the_seed(tmp_path):
    names = [f"d{k:02}" for k in range(16)]
    results = [
        run(arm, s, a, rise, names=[*names[s:], *names[:s]], **p)
        for arm, (a, rise, p) in PLAN.items()
        for s in range(2)
    ]
    study = R.group_arms(results)
    assert study.lines[1].mean["forgetting"] == pytest.approx(lost(0.72, 16))
    fig, alt = R.plot_stream(study)
    titles = [ax.get_title("left") for ax in fig.axes]
    assert (
        titles == [f"domain {k + 1}" for k in range(16)]
        and "domain 1, from its own stage" in alt
    )


def test_figures_show_every_seed_and_no_extrapolation():
    study = R.group_arms(demo())
    fig, _ = R.plot_plane(study)
    ax = fig.axes[0]
    drawn = {
        (round(x, 6), round(y, 6))
        for line in ax.lines
        for x, y in zip(*line.get_data())
    }
    for arm in study.arms.values():
        for p in arm.points().values():
            assert (
                round(p.learning_accuracy, 6),
                round(p.forgetting, 6),
            ) in drawn
    curves = [
        line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 101
    ]
    assert len(curves) == 3  # two seeds and the mean
    assert (
        min(min(x) for x in curves) >= 2.16 - 1e-9
        and max(max(x) for x in curves) <= 2.31 + 1e-9
    )
    assert (
        ax.get_title("left").replace("\n", " ")
        == "6 of 8 arms lie more than 0.01 nats below the control, 1 not"
        " comparable"
    )


def test_a_run_without_a_number_leaves_the_others_in_the_plane(tmp_path):
    results = demo(5, records=False, **FEW)
    for r in results:
        if r["parameters"]["seed"] == 4:  # of every arm, plain training too
            r["metrics"]["forgetting"] = math.nan
    report = R.write_report(results, tmp_path)
    assert report.plane
    (ax,) = R.plot_plane(R.group_arms(results))[0].axes
    assert "(4/5)" in R.text_table(R.group_arms(results))
    left = R.group_arms([r for r in results if r["parameters"]["seed"] < 4])
    named = {t.get_text(): t.xy for t in ax.texts}
    for arm in left.arms.values():
        name = f"{arm.name} (4 of 5 seeds)"
        assert named[name] == pytest.approx(mean_point(arm.points()))


def test_intervals_in_the_plane_reach_as_far_as_they_are():
    "From 20 seeds on they are not symmetric."
    rng = np.random.default_rng(0)
    curve = {1.0: {s: Point(2.2, rng.exponential()) for s in range(24)}}
    i = mean_interval([p.forgetting for p in curve[1.0].values()])
    assert i.method == "BCa" and i.high - i.estimate > i.estimate - i.low
    ax = Figure().subplots()
    draw_arm(ax, curve, {"color": "k", "marker": "o", "linestyle": "-"})
    (bars,) = ax.containers[0].lines[2][1].get_segments()
    assert bars[:, 1].tolist() == pytest.approx([i.low, i.high])


def test_an_arm_of_which_half_the_runs_failed_is_not_comparable():
    "A failed run is a seed without numbers, and not a seed less."
    results = demo(4, **FEW)
    gone = lambda r: (
        r["parameters"]["arm"] == "shared projection"
        and r["parameters"]["seed"] > 1
    )
    some = [r for r in results if not gone(r)]
    some += [failed("shared projection", s) for s in (2, 3)]
    assert "1 not comparable" not in plane_finding(R.group_arms(results))
    study = R.group_arms(some)
    assert plane_finding(study) == "No arm is comparable with the control"
    assert "(2/4)" in R.text_table(study)


def test_a_seed_that_was_made_again_counts_once():
    results = demo(4, **FEW)
    results += [failed("shared projection", s) for s in (2, 3)]
    assert R.group_arms(results).arms["shared projection"].planned == 4
    assert "not comparable" not in plane_finding(R.group_arms(results))


def test_an_arm_of_which_every_run_failed_stays_in_the_count():
    named = lambda r: r["parameters"]["arm"]
    some = [r for r in demo(4) if named(r) != "shared projection"]
    whole = plane_finding(R.group_arms(some))
    more = [*some, *(failed("shared projection", s) for s in range(4))]
    arms = lambda said: int(said.split(" of ")[1].split()[0])
    assert arms(plane_finding(R.group_arms(more))) == arms(whole) + 1


def test_arms_are_named_beside_the_plane_and_not_in_a_legend():
    from matplotlib.text import Text

    study = R.group_arms(demo())
    fig, _ = R.plot_plane(study)
    (ax,) = fig.axes
    assert not fig.legends and ax.get_legend() is None
    assert sorted(t.get_text() for t in ax.texts) == sorted(study.arms)
    fig.draw_without_rendering()
    # the words alone, without the line to the point
    extents = map(Text.get_window_extent, ax.texts)
    boxes = sorted(extents, key=lambda b: b.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in zip(boxes, boxes[1:]))
    page = fig.bbox
    assert all(b.x1 <= page.x1 and 0 <= b.y0 < b.y1 <= page.y1 for b in boxes)
    points = {a.name: a.points() for a in study.arms.values()}
    for t in ax.texts:  # each line ends at the mean of its seeds
        assert t.xy == pytest.approx(mean_point(points[t.get_text()]))


def test_the_callers_settings_come_back(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    R.write_report(demo(1, **FEW), tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_the_same_runs_give_the_same_bytes(tmp_path):
    first, second = (R.write_report(demo(**FEW), tmp_path / k) for k in "ab")
    for name in ("plane.png", "stream.png", "report.html", "runs.csv"):
        assert (
            first.html.with_name(name).read_bytes()
            == second.html.with_name(name).read_bytes()
        )


def test_names_are_escaped(tmp_path):
    nasty = "<script>alert('x')</script> & shared"
    report = R.write_report(
        [run("vanilla", 0), run(nasty, 0, routing="shared", **PROJECTION)],
        tmp_path,
    )
    assert nasty in Page(report.html.read_text()).text


def test_refusals(tmp_path):
    results = demo()
    with pytest.raises(ValueError, match="two runs of seed 0"):
        R.write_report([*results, run("vanilla", 0)], tmp_path)
    other = run("fixed decoupled", 0, **PROJECTION)
    other["identity"]["stream_hash"] = "other"
    with pytest.raises(ValueError, match="one stream only"):
        R.group_arms([run("vanilla", 0), other])
    with pytest.raises(ValueError, match="no results"):
        R.group_arms([])
    assert not list(tmp_path.iterdir())  # refused before anything is written


def test_tidy_has_one_row_for_each_run_and_keeps_names():
    frame = R.tidy([*demo(), failed("shared projection", 9)])
    assert len(frame) == 23 and frame["forgetting"].notna().sum() == 22
    assert frame.set_index("run_id").loc[
        "vanilla-1", "forgetting"
    ] == pytest.approx(lost(0.72))
    assert frame["status"].value_counts().to_dict() == {"ok": 22, "failed": 1}
    unnamed = R.tidy(
        [run("", 0, lr=x) for x in (1e-3, 2e-3)]
        + [run("", 1, routing="shared", **PROJECTION)]
    )
    assert unnamed["arm"].tolist() == [
        "vanilla ×0.5",
        "vanilla",
        "shared projection",
    ]
    assert R.tidy_records(demo(1)).groupby("arm").size().eq(72).all()
