"""Study files from strangers: whatever one says, reading it ends soon, in a
study or in an error that names the line.
"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import project

from dmr.studies.study import StudyError, read_study


def laughs(levels=9, fan=10):
    "Lines that each name the one above them ten times."
    lines = ["l0: &l0 [" + "x, " * fan + "]"]
    for i in range(1, levels):
        lines.append(f"l{i}: &l{i} [" + f"*l{i - 1}, " * fan + "]")
    return "\n".join(lines) + "\n"


def merges(levels=9, fan=10):
    "The same by merge keys, which copy entries."
    lines = ["l0: &l0 {lr: 1}"]
    for i in range(1, levels):
        lines.append(f"l{i}: &l{i} {{<<: [" + f"*l{i - 1}, " * fan + "]}")
    return "\n".join(lines) + "\n"


def chain(n=200):
    "Each entry inside the next: deep, but nowhere in the text."
    lines = ["l0: &l0 [x]"]
    lines += [f"l{i}: &l{i} [*l{i - 1}]" for i in range(1, n)]
    return "\n".join(lines) + "\n"


#: What a file says below its first line -> the line named, and what is said.
HARMFUL = {
    "aliases": (laughs(), 6, "more than 20000 entries"),
    "merges": (merges(), 6, "more than 20000 entries"),
    "chain": (chain(), 13, "nested deeper than 12 levels"),
    "recursion in a list": ("seeds: &a [0, *a]\n", 2, "contains itself"),
    "recursion in a map": ("arms: &a\n  x: *a\n", 2, "contains itself"),
    "recursion by merge": ("arms: &a {<<: *a}\n", 2, "contains itself"),
    "seeds": ("seeds: 0..999999999\n", 2, "at most 10000 runs"),
    "seeds without end": (f"seeds: 0..{'9' * 5000}\n", 2, "seeds: "),
    "an arm's seeds": ("arms:\n  a: {seeds: 0..10000}\n", 3, "at most 10000"),
    "grid": (
        "grid:\n" + "".join(f"  p{i}: [{'1, ' * 50}]\n" for i in range(20)),
        1,
        "runs; a study has at most 10000",
    ),
    "arms": (
        "seeds: 0..999\narms:\n"
        + "".join(f"  a{i}: {{}}\n" for i in range(12)),
        14,
        "11000 runs",
    ),
    "parts": (
        "seeds: 0..2999\nparts:\n"
        + "".join(f"  p{i}: {{seeds: 0..{2999 - i}}}\n" for i in range(12)),
        7,
        "runs; a study",
    ),
    "brackets": ("grid: " + "[" * 60_000, 2, "nested deeper"),
    "braces": ("grid: " + "{a: " * 15_000, 2, "nested deeper"),
    "indents": (
        "grid:\n" + "".join(" " * i + "a:\n" for i in range(1, 300)),
        13,
        "nested deeper",
    ),
    "dashes": ("seeds: \n  " + "- " * 30_000, 3, "nested deeper"),
    "bytes": ("# " + "x" * 10**7, 1, "bytes; a study"),
    "a long number": ("defaults: {seed: " + "9" * 60_000 + "}", 2, "18 signs"),
    "base sixty": ("defaults: {seed: 1" + ":59" * 20_000 + "}", 2, "18 signs"),
    "a 13th month": ("title: 2024-13-45", 2, "month"),
    "a key of lists": ("? [a, b]\n: 1", 2, "a single word"),
    "no end of time": ("limits: {wall: .inf}", 2, "is no quantity"),
    "no end of memory": ("limits: {memory: .inf}", 2, "is no quantity"),
    "no number": ("limits: {wall: 1.1.1 s}", 2, "is no quantity"),
    "too many digits": ("estimate: " + "9" * 400 + " d", 2, "is no quantity"),
    "NUL": ("title: 'a\0b'", 2, "a sign that no text has"),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_a_harmful_file_is_refused_within_100_ms_by_line(tmp_path, what):
    text, line, said = HARMFUL[what]
    folders = project(tmp_path, text)
    read_study(project(tmp_path, "seeds: [0]\n", "warm").studies / "warm.yaml")
    took = []
    for _ in range(3):  # the garbage of earlier tests may be collected in one
        begin = time.process_time()
        with pytest.raises(StudyError, match=said) as e:
            read_study(folders.studies / "tiny.yaml")
        took.append(time.process_time() - begin)
    assert str(e.value).startswith(f"tiny.yaml:{line}: "), str(e.value)[:200]
    assert min(took) < 0.1, f"{min(took):.2f} s"


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    path = project(tmp_path, "seeds: [0]\n").studies / "tiny.yaml"
    path.write_bytes(path.read_bytes() + b"title: \xff\xfe\n")
    with pytest.raises(StudyError, match="tiny.yaml:3: is no UTF-8"):
        read_study(path)


def test_a_template_must_be_a_file(tmp_path):
    path = project(tmp_path, "").studies / "tiny.yaml"
    path.write_text("template: /dev/zero\n")
    with pytest.raises(StudyError, match="tiny.yaml:1: "):
        read_study(path)


def test_the_largest_study_is_still_read(tmp_path):
    folders = project(tmp_path, "seeds: 0..9999\n")
    assert len(read_study(folders.studies / "tiny.yaml").cells) == 10_000


WORDS = st.sampled_from(
    ["arms", "grid", "zip", "seeds", "defaults", "exclude", "parts", "limits"]
    + ["lr", "mode", "seed", "wall", "memory", "a", "0..3", "plain", "<<"]
)
LEAVES = WORDS | st.none() | st.booleans() | st.integers(-9, 9) | st.floats()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(WORDS, TREES, min_size=1, max_size=4))
def test_a_file_of_any_shape_is_a_study_or_a_study_error(
    tmp_path_factory, data
):
    import yaml

    root = tmp_path_factory.getbasetemp() / "shapes"
    if not root.exists():
        project(root, "")
    path = root / "nbs/experiments/studies/tiny.yaml"
    path.write_text(yaml.safe_dump({"template": "../tiny.ipynb", **data}))
    try:
        assert read_study(path).cells
    except StudyError as e:
        assert str(e).startswith("tiny.yaml:")
