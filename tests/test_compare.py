"""compare.py on made run folders: what it prints, what it refuses, and that no input ends in a traceback."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import UserError, report
from experiment.report import results, statistics, tables

ROOT = Path(__file__).parents[1]
ADDED = {"alpha": 20.0, "beta": 1.0, "gamma": 1.0, "ramp_epochs": 200}
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(
    folder: Path,
    adds: str | None = None,
    *,
    method: str = "AdaAD",
    seed: int = 0,
    robust: float | None = 0.38,
    clean: float = 0.8,
    examples: int = 100,
    config: dict | None = None,
    result: dict | None = None,
    attack: dict | None = None,
    **changed,
) -> Path:
    """Write the three files of a finished run; `changed` are settings, the dicts replace entries of their file."""
    folder.mkdir(parents=True)
    script = f"{method.lower()}_{f'{adds}_' if adds else ''}cifar100.py"
    command = f"python {script} --seed {seed} --run_name {folder.name}"
    shared = {"format": 1, "script": script, "method": method, "adds": adds, "command": command}
    chosen = {"teacher": "BDM", "student": "RES-18", "dataset": "digits", "lr": 0.1, "epochs": 3, "seed": seed}
    chosen |= {"run_name": folder.name, "aa_examples": examples if robust is not None else 0, "aa_batch": 250}
    chosen |= (ADDED if adds else {}) | changed
    written = {
        **shared,
        "added_settings": list(ADDED) if adds else [],
        "settings": chosen,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "device": "cpu",
        "commit": "0123abc",
        "dataset_sha256": "d" * 64,
        "num_classes": 10,
        "teacher_sha256": "e" * 64,
    }
    (folder / "config.json").write_text(json.dumps(written | (config or {})))
    rows = [{"epoch": 1, "lr": 0.1, "loss": 1.0}]
    rows += [{"epoch": epoch, "lr": 0.1, "loss": 1.0, "clean": clean, "pgd20": clean / 2} for epoch in (2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured = {"accuracy": robust, "epsilon": 8 / 255, "version": "standard", "seed": seed, "examples": examples}
    finished = {
        **shared,
        **{key: chosen[key] for key in ("teacher", "student", "dataset", "seed", "epochs")},
        "clean": clean,
        "pgd20": clean / 2,
        "test_examples": 450,
        "autoattack": None if robust is None else measured | (attack or {}),
        "hardware": "Some CPU",
    }
    (folder / "result.json").write_text(json.dumps(finished | (result or {})))
    return folder


@pytest.fixture
def pair(tmp_path):
    """A baseline and its twin, 3 points apart on 100 images."""
    return make_run(tmp_path / "base"), make_run(tmp_path / "twin", "IGDM", robust=0.41)


def compare(folders, out: Path) -> str:
    """What is printed."""
    lines: list[str] = []
    report.compare(folders, out, lines.append)
    return "\n".join(lines)


def cells(printed: str, name: str) -> list[str]:
    """The row of the printed table that begins with `name`, split at two spaces or more."""
    rows = [line.split("  ") for line in printed.splitlines()]
    return next([cell.strip() for cell in row if cell.strip()] for row in rows if row[0].strip() == name)


def test_pair_is_printed_written_and_drawn(pair, tmp_path):
    printed = compare(pair, tmp_path / "out")
    assert cells(printed, "method")[7:] == ["IGDM gain", "n seeds", "AutoAttack images"]
    assert cells(printed, "AdaAD") == ["AdaAD", "BDM", "RES-18", "digits", "80.00", "40.00", "38.00", "-", "1", "100"]
    assert cells(printed, "AdaAD+IGDM")[6:] == ["41.00", "+3.00", "1", "100"]
    header, ruler, *rows = printed.splitlines()[:4]
    assert len({len(line) for line in (header, ruler, *rows)}) == 1, "columns are aligned"

    picture, markdown = tmp_path / "out" / "comparison.png", tmp_path / "out" / "comparison.md"
    assert printed.splitlines()[-2:] == [f"plot      {picture}", f"markdown  {markdown}"]
    assert picture.read_bytes().startswith(PNG)
    text = markdown.read_text()
    assert "| AdaAD+IGDM | BDM | RES-18 | digits | 80.00 | 40.00 | 41.00 | +3.00 | 1 | 100 |" in text
    assert "python adaad_IGDM_cifar100.py --seed 0 --run_name twin" in text
    assert "Some CPU" in text
    assert "![" in text
    assert "(comparison.png)" in text
    assert str(tmp_path) not in text, "the Markdown can be moved together with its plot"


def test_loss_of_accuracy_is_a_negative_gain(tmp_path):
    folders = [make_run(tmp_path / "base"), make_run(tmp_path / "twin", "IGDM", robust=0.375)]
    assert cells(compare(folders, tmp_path), "AdaAD+IGDM")[7] == "-0.50"


def test_baseline_stands_first_whatever_the_order_given(pair, tmp_path):
    other = make_run(tmp_path / "other", method="RSLAD")
    names = [line.split()[0] for line in compare([pair[1], other, pair[0]], tmp_path).splitlines()[2:5]]
    assert names == ["AdaAD", "AdaAD+IGDM", "RSLAD"]


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    base, twin = {0: 0.25, 1: 0.28, 7: 0.26}, {0: 0.29, 1: 0.30, 7: 0.31}
    folders = [make_run(tmp_path / f"base{s}", seed=s, robust=a, examples=10000) for s, a in base.items()]
    folders += [make_run(tmp_path / f"twin{s}", "IGDM", seed=s, robust=a, examples=10000) for s, a in twin.items()]
    printed = compare(folders, tmp_path)
    assert "sample standard deviation (n - 1)" in printed
    row = cells(printed, "AdaAD+IGDM")
    gains = [100 * (twin[s] - base[s]) for s in base]
    assert row[6] == f"30.00 ± {stdev([29, 30, 31]):.2f}"
    assert row[7] == f"{sum(gains) / 3:+.2f} ± {stdev(gains):.2f}"
    assert row[8] == "3"
    assert "single seed" not in printed
    # Student's t for 2 degrees of freedom is 4.303: the seeds alone leave +-3.8 around the mean of 3.67.
    seeds = 4.303 * stdev(gains) / math.sqrt(3)
    images = [100 * statistics.half_width(p, 10000) for p in (0.2633, 0.30)]
    assert f"± {math.hypot(seeds, *images):.1f} points" in printed
    assert "within noise" in printed
    assert all(f"--run_name {folder.name}" in (tmp_path / "comparison.md").read_text() for folder in folders)


@pytest.mark.parametrize(
    ("accuracy", "examples", "low", "high"),
    # Wilson's 95 % intervals, as tabulated: 0 of 10 [0, 0.2775], 5 of 10 [0.2366, 0.7634], 81 of 263 [0.2553, 0.3662].
    [(0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (81 / 263, 263, 0.2553, 0.3662)],
)
def test_half_width_is_wilsons(accuracy, examples, low, high):
    # The bounds above are rounded to four decimals.
    assert statistics.half_width(accuracy, examples) == pytest.approx((high - low) / 2, abs=1e-4)


@pytest.mark.parametrize(("examples", "verdict"), [(100, "within noise"), (10000, "beyond this uncertainty")])
def test_a_gain_is_weighed_against_its_uncertainty(tmp_path, examples, verdict):
    folders = [
        make_run(tmp_path / "base", examples=examples),
        make_run(tmp_path / "twin", "IGDM", robust=0.41, examples=examples),
    ]
    printed = compare(folders, tmp_path)
    assert f"points on {examples} images" in printed
    assert verdict in printed
    assert "seed noise" in printed
    assert verdict in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("twin", "named"),
    [
        ({"lr": 0.05}, "lr 0.1 and 0.05"),
        ({"wd": 2e-4}, "wd absent and 0.0002"),
        ({"config": {"dataset_sha256": "f" * 64}}, "dataset_sha256 dddddddddddd... and ffffffffffff..."),
        ({"config": {"teacher_sha256": "f" * 64}}, "teacher_sha256 eeeeeeeeeeee... and ffffffffffff..."),
        ({"config": {"num_classes": 20}}, "num_classes 10 and 20"),
        ({"examples": 200}, "aa_examples 100 and 200"),
        ({"attack": {"examples": 99}}, "AutoAttack examples 100 and 99"),
        ({"attack": {"version": "rand"}}, "AutoAttack version standard and rand"),
        ({"attack": {"epsilon": 0.5}}, "AutoAttack epsilon 0.03137254901960784 and 0.5"),
        ({"attack": {"seed": 9}}, "AutoAttack seed 0 and 9"),
        ({"robust": None}, "aa_examples 100 and 0"),
        ({"config": {"added_settings": ["beta", "gamma", "ramp_epochs"]}}, "alpha absent and 20"),
        ({"seed": 3}, "their seeds differ: 0 and 3"),
    ],
)
def test_runs_made_under_other_conditions_are_not_subtracted(tmp_path, twin, named):
    folders = [make_run(tmp_path / "base"), make_run(tmp_path / "twin", "IGDM", **twin)]
    with pytest.raises(UserError, match="cannot subtract") as caught:
        compare(folders, tmp_path / "out")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    # The runs themselves are shown, without a gain, and the note says why.
    written = (tmp_path / "out" / "comparison.md").read_text()
    assert "No gain: cannot subtract" in written
    (row,) = [line for line in written.splitlines() if line.startswith("| AdaAD+IGDM")]
    assert row.split(" | ")[7] == "-"
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


def test_every_difference_is_named_at_once(tmp_path):
    folders = [make_run(tmp_path / "base"), make_run(tmp_path / "twin", "IGDM", lr=0.2, epochs=9)]
    with pytest.raises(UserError, match=r"lr 0\.1 and 0\.2; epochs 3 and 9"):
        compare(folders, tmp_path)


def test_settings_that_do_not_make_the_experiment_may_differ(tmp_path):
    here = {"run_dir": "a", "data_dir": "a", "device": "cpu", "nowand": 1, "wandb_name": None, "aa_batch": 1}
    there = {"run_dir": "b", "data_dir": "b", "device": "cuda", "nowand": 0, "wandb_name": "x", "aa_batch": 2}
    folders = [
        make_run(tmp_path / "base", **here, checkpoint_minutes=1.0),
        make_run(tmp_path / "twin", "IGDM", **there, checkpoint_minutes=2.0, robust=0.41),
    ]
    assert cells(compare(folders, tmp_path), "AdaAD+IGDM")[7] == "+3.00"


def test_different_methods_are_listed_and_not_subtracted(tmp_path):
    folders = [
        make_run(tmp_path / "a", method="AdaAD", lr=0.1),
        make_run(tmp_path / "b", "IGDM", method="RSLAD", lr=0.2, examples=50),
    ]
    printed = compare(folders, tmp_path)
    assert cells(printed, "RSLAD+IGDM")[7] == "-"
    assert "no gain, as no run of RSLAD alone" in printed


def test_each_variant_is_named_by_its_settings_and_finds_its_own_baseline(tmp_path):
    folders = [make_run(tmp_path / f"base{lr}", lr=lr, robust=lr) for lr in (0.1, 0.2)]
    folders += [make_run(tmp_path / f"twin{lr}", "IGDM", lr=lr, robust=2 * lr) for lr in (0.1, 0.2)]
    folders.append(make_run(tmp_path / "alpha", "IGDM", lr=0.2, robust=0.5, alpha=70.0))
    printed = compare(folders, tmp_path)
    assert cells(printed, "AdaAD (lr 0.2)")[6] == "20.00"
    assert cells(printed, "AdaAD+IGDM (lr 0.1, alpha 20)")[7] == "+10.00"
    assert cells(printed, "AdaAD+IGDM (lr 0.2, alpha 20)")[7] == "+20.00"
    assert cells(printed, "AdaAD+IGDM (lr 0.2, alpha 70)")[7] == "+30.00"


def test_any_method_and_addition_of_ones_own(tmp_path):
    """Names come from the files; those that mean something to Markdown or to the plot are shown as they are."""
    folders = [
        make_run(tmp_path / "a", method="$My_|x`"),
        make_run(tmp_path / "b", "Mine", method="$My_|x`", robust=0.4),
    ]
    printed = compare(folders, tmp_path)
    assert cells(printed, "method")[7] == "Mine gain"
    assert cells(printed, "$My_|x`+Mine")[7] == "+2.00"
    assert r"| $My\_\|x\`+Mine |" in (tmp_path / "comparison.md").read_text()


def test_without_autoattack_a_dash(tmp_path):
    folders = [make_run(tmp_path / "a", robust=None), make_run(tmp_path / "b", "IGDM", robust=None)]
    printed = compare(folders, tmp_path)
    assert cells(printed, "AdaAD+IGDM")[6:] == ["-", "-", "1", "-"]
    assert "AutoAttack accuracy:" not in printed
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


def test_a_run_without_a_teacher_is_listed(tmp_path):
    """A teacher's own training run."""
    folder = make_run(tmp_path / "a", method="TRADES", teacher=None, config={"teacher_sha256": None})
    assert cells(compare([folder], tmp_path), "TRADES")[1] == "-"


def test_other_hardware_and_versions_are_noted(tmp_path):
    folders = [
        make_run(tmp_path / "base"),
        make_run(
            tmp_path / "twin",
            "IGDM",
            result={"hardware": "Some GPU"},
            config={"versions": {"python": "3.11.9", "torch": "2.12.0"}},
            attack={"warnings": ["gradients may be masked"]},
        ),
    ]
    printed = compare(folders, tmp_path)
    assert "hardware Some CPU and Some GPU; torch version 2.13.0 and 2.12.0" in printed
    assert "python version" not in printed
    assert "AdaAD+IGDM, seed 0, AutoAttack warned: gradients may be masked" in printed


def test_many_rows_are_drawn(tmp_path):
    """More pairs than the palette has colours, several teachers, and one run with a single evaluated epoch."""
    folders = [
        make_run(tmp_path / f"{method}{adds}{teacher}", adds, method=method, teacher=teacher)
        for method in ("A", "B", "C")
        for adds in (None, "IGDM")
        for teacher in ("BDM", "LTD", "a/long path to/a $teacher")
    ]
    rows = (folders[0] / "metrics.jsonl").read_text().splitlines()
    (folders[0] / "metrics.jsonl").write_text(rows[-1] + "\n")
    compare(folders, tmp_path)
    assert (tmp_path / "comparison.png").read_bytes().startswith(PNG)


def test_the_same_folder_or_the_same_seed_twice_is_refused(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(UserError, match="given twice"):
        compare([pair[0], tmp_path / "link"], tmp_path)
    with pytest.raises(UserError, match="same experiment with the same seed 0"):
        compare([pair[0], make_run(tmp_path / "again")], tmp_path)


def test_what_is_not_a_finished_run_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="none is not a folder"):
        compare([tmp_path / "none"], tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        compare([tmp_path / ("long" * 100)], tmp_path)
    with pytest.raises(UserError, match="is not a run folder: it holds no config"):
        compare([tmp_path], tmp_path)
    (pair[1] / "result.json").unlink()
    with pytest.raises(UserError, match=r"unfinished run .* run this again: python adaad_IGDM_cifar100\.py --seed 0"):
        compare(pair, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[]", "an object is needed"),
        ("config.json", '{"format": 2}', "format 2"),
        ("result.json", "", "result.json is not valid JSON"),
        ("result.json", '{"format": 1}', "files of two runs"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo', "metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", "3\n", "a JSON object is needed"),
        ("metrics.jsonl", '{"clean": 0.5}\n', "epoch is absent"),
        ("metrics.jsonl", '{"epoch": 1, "clean": 50}\n', "clean is 50; a fraction from 0 to 1"),
        ("metrics.jsonl", '{"epoch": 1, "clean": NaN}\n', "clean is NaN"),
        ("metrics.jsonl", "\udcff", "is not text"),
    ],
)
def test_damaged_files_are_refused_by_name(pair, tmp_path, name, content, named):
    (pair[0] / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        compare(pair, tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


# The folders are rewritten by each example, so sharing the fixture between examples does no harm.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(tmp_path, data):
    """One entry of config.json or result.json is replaced by anything, or removed."""
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(folder, "IGDM")
        for name in ("config.json", "result.json"):
            (tmp_path / name).write_text((folder / name).read_text())
    originals = {name: json.loads((tmp_path / name).read_text()) for name in ("config.json", "result.json")}
    name = data.draw(st.sampled_from(sorted(originals)))
    inner = "settings" if name == "config.json" else "autoattack"
    target = data.draw(st.sampled_from([originals[name], originals[name][inner]]))
    key = data.draw(st.sampled_from(sorted(target)))
    if data.draw(st.booleans()):
        target[key] = data.draw(ANYTHING)
    else:
        del target[key]
    for file, value in originals.items():
        (folder / file).write_text(json.dumps(value))
    try:
        rows = statistics.rows_of([results.read_run(folder)])
        gains, _ = statistics.gains_of(rows)
        table, notes = tables.table_of(rows, gains), tables.notes_of(rows, gains)
        assert tables.as_text(table)
        assert tables.as_markdown(rows, table, notes, "comparison.png")
    except UserError:
        pass  # the only error that is not a traceback


def test_a_name_that_is_not_text_is_escaped(tmp_path):
    """A path that is not UTF-8 reaches Python, and JSON, as lone surrogates."""
    printed = compare([make_run(tmp_path / "a", teacher="runs/\udcff"), make_run(tmp_path / "b")], tmp_path / "\udcff")
    assert cells(printed, "AdaAD")[1] == r"runs/\udcff"
    assert r"runs/\udcff" in (tmp_path / "\udcff" / "comparison.md").read_text()


def test_out_that_cannot_be_made_is_refused(pair, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot be made a folder"):
        compare(pair, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_output_goes_beside_the_runs_or_here(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report.main(["base", "twin"])
    assert "plot      comparison.png\n" in capsys.readouterr().out
    elsewhere = make_run(tmp_path / "elsewhere" / "base")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    report.main([str(elsewhere)])
    assert (tmp_path / "elsewhere" / "comparison.md").exists()
    report.main([str(elsewhere), str(pair[1])])
    assert (tmp_path / "here" / "comparison.md").exists()


def test_script(pair, tmp_path):
    """The command line: status 0 with the paths last, status 2 with one line on stderr for a mistake."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "compare.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )

    good = run(*pair, "--out", "a folder/new")
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("markdown  a folder/new/comparison.md\n")
    bad = run(pair[0], "none")
    assert bad.returncode == 2
    assert bad.stderr == "error: none is not a folder; give the folders of finished runs\n"
