"""compare.py on made run folders: what it prints, what is an error, and that no input ends in a traceback."""

import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from fault_server import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiment import UserError, cli, evaluation
from experiment import compare as comparing
from experiment.compare import figures, statistics
from experiment.compare.command import fill_marks
from experiment.compare.comparison import comparison_of
from experiment.compare.notes import notes_of
from experiment.compare.read import read_runs
from experiment.compare.tables import as_document, as_latex, tables_of
from experiment.text import AUTOATTACK_STEPS, as_text

ADDED = {"alpha": 20.0, "beta": 1.0, "gamma": 1.0, "ramp_epochs": 200}
GRADIENTS = {"gd": 0.0911, "gc": 0.75, "definition": "g = something"}
PNG = b"\x89PNG\r\n\x1a\n"


def make_run(
    folder: Path,
    adds: str | None = None,
    *,
    method: str = "AdaAD",
    seed: int = 0,
    robust: float | None = 0.38,
    examples: int = 100,
    config: dict | None = None,
    result: dict | None = None,
    attack: dict | None = None,
    flags: str | None = None,
    **changed,
) -> Path:
    """Write the three files of a finished run; `changed` are settings, the dicts replace entries of their file.

    `flags`: as in ``records.Attack``; without it the first images are robust.
    """
    if flags is None:
        flags = ("-" * round((robust or 0) * examples)).ljust(examples, "2")
    folder.mkdir(parents=True)
    script = f"{method.lower()}_{f'{adds}_' if adds else ''}cifar100.py"
    command = f"python {script} --seed {seed} --run_name {folder.name}"
    shared = {"format": 1, "script": script, "method": method, "adds": adds, "command": command}
    networks = {"teacher": "BDM", "student": "RES-18", "dataset": "digits", "epochs": 3, "seed": seed}
    attacked = {"aa_examples": 0 if robust is None else len(flags), "aa_batch": 250}
    settings = {**networks, **attacked, "lr": 0.1, "epsilon": 8 / 255, "run_name": folder.name}
    settings |= (ADDED if adds else {}) | changed
    made = {
        **shared,
        "added_settings": list(ADDED) if adds else [],
        "settings": settings,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "device": "cpu",
        "commit": "0123abc",
        "dataset_sha256": "d" * 64,
        "num_classes": 10,
        "teacher_sha256": "e" * 64,
    }
    (folder / "config.json").write_text(json.dumps(made | (config or {})))
    measured = {"clean": 0.8, "pgd20": 0.4}
    rows = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 1.0, **measured}, {"epoch": 3, "loss": 1.0, **measured}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"version": "standard", "epsilon": 8 / 255, "seed": seed, "examples": len(flags), "flags": flags}
    found |= {"accuracy": flags.count("-") / len(flags), **(attack or {})}
    ended = {**shared, **{key: settings[key] for key in networks}, **measured, "test_examples": 450}
    ended |= {"autoattack": None if robust is None else found, "hardware": "Some CPU"}
    (folder / "result.json").write_text(json.dumps(ended | (result or {})))
    return folder


@pytest.fixture
def pair(tmp_path):
    """A baseline and its version with IGDM, 3 points apart on 100 images."""
    return make_pair(tmp_path, with_igdm={"robust": 0.41})


def make_pair(folder: Path, base: dict | None = None, with_igdm: dict | None = None) -> list[Path]:
    return [make_run(folder / "base", **base or {}), make_run(folder / "with_igdm", "IGDM", **with_igdm or {})]


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """What compare.py prints when it writes files into the folder out, without drawing."""
    monkeypatch.setattr(figures, "all_figures", lambda comparison, **options: {})

    def run(*arguments: str | Path) -> str:
        comparing.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        return capsys.readouterr().out

    return run


def compare(*folders: Path) -> str:
    """All columns and the notes, without writing or drawing; raises as compare.py does."""
    found = comparison_of(read_runs(folders))
    text = "\n".join([*map(as_text, tables_of(found)), "", *notes_of(found)])
    if found.not_subtracted:
        raise UserError("; ".join(found.not_subtracted))
    return text


def cells(printed: str, name: str) -> list[str]:
    """The row of the printed table that begins with `name`, split at two spaces or more."""
    rows = [line.split("  ") for line in printed.splitlines()]
    return next([cell.strip() for cell in row if cell.strip()] for row in rows if row[0].strip() == name)


def test_pair_is_printed_written_and_drawn(pair, tmp_path, capsys):
    out = tmp_path / "out"
    comparing.main([*map(str, pair), "--out", str(out)])
    printed = capsys.readouterr().out
    assert cells(printed, "method") == ["method", "clean", "AutoAttack", "IGDM gain (95 % interval)"]
    assert cells(printed, "AdaAD") == ["AdaAD", "80.00", "38.00", "-"]
    assert cells(printed, "AdaAD+IGDM") == ["AdaAD+IGDM", "80.00", "41.00", "+3.00 (+0.00 to +7.00)"]
    header, ruler, *rows = printed.splitlines()[:4]
    assert len({len(line) for line in (header, ruler, *rows)}) == 1, "columns are aligned"
    assert printed.endswith(f"\nmarkdown  {out / 'comparison.md'}, with all columns and notes\n")
    assert (out / "comparison.png").read_bytes().startswith(PNG)
    assert (out / "comparison.pdf").read_bytes().startswith(b"%PDF")
    assert "AdaAD+IGDM" in (out / "comparison.svg").read_text(), "text stays text"
    assert (out / "gains.png").exists()
    assert not (out / "alignment.png").exists(), "nothing was measured to be drawn in it"
    text = (out / "comparison.md").read_text()
    assert "| AdaAD+IGDM | BDM | RES-18 | digits | 80.00 | 40.00 | 41.00 | +3.00 (+0.00 to +7.00) | 1 | 100 |" in text
    assert "python adaad_IGDM_cifar100.py --seed 0 --run_name with_igdm" in text
    assert "Some CPU" in text
    assert "(comparison.png)" in text
    assert str(tmp_path) not in text, "the Markdown can be moved together with its plots"


def seeds_of(tmp_path, base: dict[int, float], with_igdm: dict[int, float], **changed) -> list[Path]:
    """Runs of several seeds with these AutoAttack accuracies."""
    return [
        make_run(tmp_path / f"{adds}{seed}", adds, seed=seed, robust=value, **changed)
        for adds, values in ((None, base), ("IGDM", with_igdm))
        for seed, value in values.items()
    ]


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    base, with_igdm = {0: 0.25, 1: 0.28, 7: 0.26}, {0: 0.29, 1: 0.30, 7: 0.31}
    printed = compare(*seeds_of(tmp_path, base, with_igdm, examples=10000))
    row = cells(printed, "AdaAD+IGDM")
    gains = [100 * (with_igdm[s] - base[s]) for s in base]
    assert row[6] == f"30.00 ± {stdev([29, 30, 31]):.2f}"
    # Student's t for 2 degrees of freedom, 4.303; the images alone leave less.
    half = 4.303 * stdev(gains) / math.sqrt(3)
    assert row[7] == f"{fmean(gains):+.2f} ({fmean(gains) - half:+.2f} to {fmean(gains) + half:+.2f})"
    assert row[8] == "3"
    assert "One seed" not in printed
    assert "bootstrap over seeds and images). The interval includes 0" in printed


def test_only_seeds_that_both_have_are_subtracted(tmp_path):
    printed = compare(*seeds_of(tmp_path, {0: 0.2, 1: 0.3, 2: 0.9}, {1: 0.4, 0: 0.3}))
    assert cells(printed, "AdaAD+IGDM")[7].startswith("+10.00 (")
    assert "Seeds of one alone: 2." in printed


def test_bootstrap_of_one_seed_is_the_normal_interval():
    """Of many images: +-1.96 standard errors; the ends scatter by some 3 % of its width with 4,000 resamples."""
    generator = random.Random(0)
    row = [generator.choice((-1, 0, 0, 0, 1, 1)) for _ in range(2000)]
    low, high = statistics.bootstrap_interval(np.array([row]))
    half = 1.96 * stdev(row) / math.sqrt(len(row))
    assert (low + high) / 2 == pytest.approx(fmean(row), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


def test_bootstrap_sees_the_noise_of_seeds_and_of_images():
    rows = np.repeat([[1], [0], [1], [0]], 50, axis=1)  # seeds differ, images do not
    # One of 16 draws of four seeds has none, and one has only, of those that gained.
    assert statistics.bootstrap_interval(rows) == pytest.approx((0.0, 1.0), abs=1e-12)
    assert statistics.bootstrap_interval(np.tile([1, 0], (4, 25)))[0] > 0.3, "50 images, equal in every seed"
    assert statistics.bootstrap_interval(np.ones((4, 50))) == pytest.approx((1.0, 1.0), abs=1e-12)


def flags_of(igdm_wins: int, baseline_wins: int, images: int = 400) -> tuple[str, str]:
    """Flags of a baseline and of the version with IGDM, which differ on these numbers of images."""
    rest = ("-140-" * images)[: images - igdm_wins - baseline_wins]
    return "2" * igdm_wins + "-" * baseline_wins + rest, "-" * igdm_wins + "3" * baseline_wins + rest


@pytest.mark.parametrize(("wins", "verdict"), [((30, 2), "interval excludes 0"), ((17, 15), "interval includes 0")])
def test_runs_on_the_same_images_are_paired(tmp_path, wins, verdict):
    base, with_igdm = flags_of(*wins)
    printed = compare(*make_pair(tmp_path, {"flags": base}, {"flags": with_igdm}))
    assert f"{100 * (wins[0] - wins[1]) / 400:+.2f} points" in printed
    assert "(bootstrap over images)" in printed
    assert verdict in printed
    assert "McNemar's exact p" in printed


def test_another_version_of_autoattack_has_a_column_of_its_own(tmp_path):
    """Data of 4 and of 3 classes; the last is attacked without APGD-T."""
    four, three = "AutoAttack, 3 targets (not standard)", "APGD-CE, FAB, Square (not standard)"
    by_step = {"clean": "1" * 90 + "0" * 10, **dict.fromkeys(("apgd-ce", "fab-t", "square"), "1" * 41 + "0" * 59)}
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", dataset="four.npz", attack={"version": four}),
        make_run(tmp_path / "c", dataset="three.npz", robust=0.41, attack={"version": three, "flags": by_step}),
    ]
    (table,) = tables_of(comparison_of(read_runs(runs)))
    assert read_runs(runs[2:]).finished[0].attack.flags == "-" * 41 + "1" * 49 + "0" * 10
    columns = dict(zip(table[0], zip(*table[1:], strict=True), strict=True))
    assert columns["AutoAttack"] == ("38.00", "-", "-")
    assert columns["fewer than 10 classes"] == ("-", f"38.00, {four}", f"41.00, {three}")
    assert f"{four}, epsilon 8/255" in compare(*runs)
    for shown, title, count in ((runs, "AutoAttack", 1), (runs[1:2], four, 1)):
        bars = figures.all_figures(comparison_of(read_runs(shown)))["comparison"].axes[2]
        assert " ".join(bars.get_title(loc="left").split()) == title
        assert len(bars.patches) == count


@pytest.mark.parametrize(
    ("with_igdm", "named"),
    [
        ({"lr": 0.05, "epochs": 9}, "epochs 3 and 9; lr 0.1 and 0.05"),
        ({"wd": 2e-4}, "wd absent and 0.0002"),
        ({"train_examples": 9}, "train_examples 0 and 9"),
        ({"config": {"dataset_sha256": "f" * 64}}, "dataset_sha256 dddddddddddd... and ffffffffffff..."),
        ({"config": {"teacher_sha256": "f" * 64}}, "teacher_sha256 eeeeeeeeeeee... and ffffffffffff..."),
        ({"config": {"num_classes": 20}}, "num_classes 10 and 20"),
        ({"examples": 200}, "aa_examples 100 and 200"),
        ({"robust": None}, "aa_examples 100 and 0"),
        ({"config": {"added_settings": ["beta", "gamma", "ramp_epochs"]}}, "alpha absent and 20"),
        ({"seed": 3}, "their seeds differ: 0 and 3"),
    ],
)
def test_runs_made_under_other_conditions_are_not_subtracted(tmp_path, with_igdm, named):
    folders = make_pair(tmp_path, with_igdm=with_igdm)
    with pytest.raises(UserError, match="cannot subtract") as caught:
        compare(*folders)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    # The runs themselves are shown, without a gain, and the note says why.
    found = comparison_of(read_runs(folders))
    written = as_document(tables_of(found), notes_of(found))
    assert "No gain: cannot subtract" in written
    head, row = (line.split(" | ") for line in written.splitlines() if line.startswith(("| method", "| AdaAD+IGDM")))
    assert row[head.index("IGDM gain (95 % interval)")] == "-"


def test_settings_that_do_not_make_the_experiment_may_differ(tmp_path):
    """Also the defaults of flags that an earlier version did not have."""
    of_base = {"run_dir": "a", "data_dir": "a", "device": "cpu", "nowand": 1, "wandb_name": None, "aa_batch": 1}
    of_igdm = {"run_dir": "b", "data_dir": "b", "device": "cuda", "nowand": 0, "wandb_name": "x", "aa_batch": 2}
    folders = make_pair(tmp_path, of_base, {**of_igdm, "robust": 0.41, **cli.LATER_SETTINGS})
    assert cells(compare(*folders), "AdaAD+IGDM")[7].startswith("+3.00 (")


def test_what_there_is_not_is_a_dash(tmp_path):
    """A baseline, an attack, a teacher."""
    folders = make_pair(tmp_path, {"robust": None}, {"robust": None})
    folders.append(make_run(tmp_path / "b", "IGDM", method="RSLAD", lr=0.2, examples=50))
    folders.append(make_run(tmp_path / "c", method="TRADES", teacher=None, config={"teacher_sha256": None}))
    printed = compare(*folders)
    assert cells(printed, "AdaAD+IGDM")[6:] == ["-", "-", "1", "-"]
    assert cells(printed, "RSLAD+IGDM")[7] == "-"
    assert "no gain, because its baseline RSLAD is not among the runs" in printed
    assert cells(printed, "TRADES")[1] == "-", "a teacher has no teacher"


def test_each_variant_is_named_by_its_settings_and_finds_its_own_baseline(tmp_path):
    folders = [make_run(tmp_path / f"base{lr}", lr=lr, robust=lr) for lr in (0.1, 0.2)]
    folders += [make_run(tmp_path / f"with_igdm{lr}", "IGDM", lr=lr, robust=2 * lr) for lr in (0.1, 0.2)]
    folders.append(make_run(tmp_path / "alpha", "IGDM", lr=0.2, robust=0.5, alpha=100.0))
    printed = compare(*folders)
    assert printed.index("alpha 20") < printed.index("alpha 100"), "by number, not by letter"
    assert printed == compare(*reversed(folders)), "whatever the order given"
    assert printed.index("AdaAD (") < printed.index("AdaAD+IGDM (")
    assert cells(printed, "AdaAD (lr 0.2)")[6] == "20.00"
    for variant, gain in (("0.1, alpha 20", 10), ("0.2, alpha 20", 20), ("0.2, alpha 100", 30)):
        assert cells(printed, f"AdaAD+IGDM (lr {variant})")[7].startswith(f"+{gain}.00 (")


def test_runs_below_the_first_level_that_has_some_are_counted(tmp_path):
    export = make_run(tmp_path / "runs" / "alone") / "hub"
    export.mkdir()
    for name in ("config.json", "model.safetensors"):
        (export / name).touch()
    assert "left out" not in compare(tmp_path / "runs")
    for seed in (1, 2):
        make_run(tmp_path / "runs" / "study" / f"seed{seed}", seed=seed)
    printed = compare(tmp_path / "runs")
    assert f"Runs in deeper folders are left out (2), such as {tmp_path}/runs/study/seed1." in printed
    assert sum(line.startswith("AdaAD ") for line in printed.splitlines()) == 1


def test_variants_that_differ_in_one_setting_are_subtracted_from_the_first(tmp_path):
    """An ablation; a version with an addition is subtracted from the baseline of its own variant."""
    base, other = flags_of(30, 2)
    make_run(tmp_path / "runs" / "a", target="adversarial", flags=base)
    make_run(tmp_path / "runs" / "b", target="clean", flags=other)
    make_run(tmp_path / "runs" / "c", target="third", flags=base)
    make_run(tmp_path / "runs" / "added", "IGDM", target="clean", flags=base)
    printed = compare(tmp_path / "runs")
    assert "AdaAD (target clean) minus AdaAD (target adversarial) (BDM, RES-18, digits): +7.00 points" in printed
    assert "AdaAD (target third) minus AdaAD (target adversarial) (BDM, RES-18, digits): +0.00 points" in printed
    assert "AdaAD+IGDM minus AdaAD (target clean) (BDM, RES-18, digits): -7.00 points" in printed
    two = [make_run(tmp_path / name, lr=lr, epochs=epochs) for name, lr, epochs in (("d", 0.1, 3), ("e", 0.2, 4))]
    assert " minus " not in compare(*two), "two settings differ"


def aligned(folder: Path, values) -> str:
    """Six pairs with the AutoAttack accuracy and the gradients that `values` gives for (with IGDM or not, seed)."""
    for seed in range(6):
        for adds in (None, "IGDM"):
            robust, gradients = values(bool(adds), seed)
            result = {"gradients": {"definition": "g = something", **gradients}}
            make_run(folder / f"{adds}{seed}", adds, seed=seed, robust=robust, examples=1000, result=result)
    return compare(folder)


def test_alignment_and_robustness_are_counted_and_correlated(tmp_path):
    """GC moves with AutoAttack, GD against it, and the logit's only in order."""

    def values(with_igdm, seed):
        better = seed - 1 if with_igdm else 0  # the first pair loses, the second stays
        scalar = {"gd": 1.0, "gc": 0.3 + 0.1 * with_igdm + 0.01 * seed}
        scalar |= {"remainder_student": 0.1 * (1 + with_igdm), "remainder_teacher": 0.3}
        gradients = {"gd": 0.2 - 0.01 * better - 0.001 * seed, "gc": 0.5001 + 0.01 * better + 0.001 * seed}
        gradients |= {"scalars": dict.fromkeys(("probability", "logit"), scalar), "scalars_examples": 400}
        return 0.3 + 0.02 * better + 0.001 * seed, gradients

    printed = aligned(tmp_path / "runs", values)
    assert cells(printed, "AdaAD")[8:12] == ["0.1975 ± 0.0019", "0.503 ± 0.002", "1.000 ± 0.000", "0.325 ± 0.019"]
    for note in (
        "over 12 students, in brackets within methods (each method's mean subtracted): GC +1.00 (+1.00), GD -1.00",
        "of 6 pairs of one seed: AutoAttack rose in 4, GC rose in 4, GD fell in 4, logit GC rose in 6, logit GD fell "
        "in 0.",
        "Logit GD and logit GC: the same with g = gradient of logits[true class] (evaluate.py, the first 400",
    ):
        assert note in printed
    figure = figures.all_figures(comparison_of(read_runs([tmp_path / "runs"])))["alignment"]
    assert b"logit GC" in figures.rendered(figure, "svg")


def test_differences_between_methods_are_subtracted(tmp_path):
    """Within each method the more robust students have the smaller GC; only the methods' means say otherwise."""

    def values(with_igdm, seed):
        slope = 0.013 if with_igdm else 0.01
        return 0.3 + 0.2 * with_igdm + slope * seed, {"gd": 0.1, "gc": 0.5 + 0.2 * with_igdm - slope * seed}

    assert "subtracted): GC +0.51 (-1.00)." in aligned(tmp_path / "runs", values)


def test_a_column_that_some_seeds_lack_is_none_of_theirs(pair, tmp_path):
    more = make_run(tmp_path / "1", seed=1, result={"gradients": GRADIENTS})
    printed = compare(*pair, more, make_run(tmp_path / "o", method="RSLAD", result={"gradients": GRADIENTS}))
    assert cells(printed, "method")[8:10] == ["GD", "GC"]
    assert cells(printed, "RSLAD")[8:10] == ["0.0911", "0.750"]
    assert cells(printed, "AdaAD")[8:10] == ["-", "-"]


def test_published_figures_are_beside_ours(tmp_path):
    """Not beside runs on a part of the data, or on other data."""
    names = {"dataset": "cifar100", "epochs": 200}
    run = make_run(tmp_path / "a", robust=0.29, **names)
    part = make_run(tmp_path / "part", method="RSLAD", train_examples=4000, **names)
    waiting = make_run(tmp_path / "b", "IGDM", dataset="cifar100")
    (waiting / "result.json").unlink()
    found = comparison_of(read_runs([run, part, waiting]))
    rows = {row[0]: row for row in tables_of(found)[1]}
    assert rows["AdaAD"][-3:] == ["29.00", "28.06", "+0.94"]
    assert rows["AdaAD+IGDM"][-3:] == ["-", "30.32", "-"], "a run that is not finished: theirs alone"
    assert set(rows) == {"method", "AdaAD", "AdaAD+IGDM"}
    assert "Published figures are those of the IGDM paper" in "\n".join(notes_of(found))
    assert "published" not in compare(make_run(tmp_path / "c")).lower(), "other data"


def test_short_table_shows_pgd20_if_no_run_has_autoattack(tmp_path, written):
    printed = written(make_run(tmp_path / "a", robust=None))
    assert cells(printed, "method") == ["method", "clean", "PGD-20"]


def test_any_method_and_addition_of_ones_own(tmp_path, written):
    """Names come from the files; those that mean something to Markdown or the terminal are shown as they are.

    A path that is not UTF-8 reaches Python, and JSON, as lone surrogates.
    """
    mine = {"method": "$My_|x`", "teacher": "runs/\udcff"}
    folders = [make_run(tmp_path / "a", **mine), make_run(tmp_path / "b", "Mine", robust=0.4, **mine)]
    printed = written(*folders, "--columns", "method", "teacher", "gain")
    assert cells(printed, "method")[2] == "Mine gain (95 % interval)"
    assert cells(printed, "$My_|x`+Mine")[2].startswith("+2.00 (")
    assert cells(printed, "$My_|x`")[1] == r"\udcff"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert r"| $My\_\|x\`+Mine |" in text
    assert r"runs/\udcff" in text


def test_other_hardware_and_versions_are_noted(tmp_path):
    other = {"result": {"hardware": "Some GPU"}, "config": {"versions": {"python": "3.11.9", "torch": "2.12.0"}}}
    other["attack"] = {"warnings": ["gradients may be masked"]}
    printed = compare(*make_pair(tmp_path, with_igdm=other))
    assert "hardware Some CPU and Some GPU; torch version 2.13.0 and 2.12.0" in printed
    assert "python version" not in printed
    assert "AdaAD+IGDM, seed 0, AutoAttack warned: gradients may be masked" in printed


def test_a_method_keeps_its_colour_and_a_baseline_its_line(pair, tmp_path):
    other = make_run(tmp_path / "other", method="Of one's own")
    few, more = (figures.styles_of(comparison_of(read_runs(runs))).values() for runs in (pair, [other, *pair]))
    own, *rest = more
    assert rest == list(few), "whatever else is shown"
    base, with_igdm = rest
    assert base["color"] == with_igdm["color"] != own["color"]
    assert (base["linestyle"], with_igdm["linestyle"]) == ("--", "-")
    assert base["markerfacecolor"] == "white"


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
    for figure in figures.all_figures(comparison_of(read_runs(folders))).values():
        assert figures.rendered(figure, "png").startswith(PNG)


def test_a_run_counts_once_however_often_it_is_given(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair[0])
    assert cells(compare(pair[0], tmp_path / "link", tmp_path), "AdaAD")[8] == "1"
    with pytest.raises(UserError, match="same experiment with the same seed 0"):
        compare(pair[0], make_run(tmp_path / "again"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("student.pt", "is not a run folder, a folder that holds some, a study or a records file"),
        ("export/model.safetensors", "is not a run folder and holds none. It is an export: give the run"),
        ("notes/notes.txt", "is not a run folder and holds none. A run is made with: python adaad_cifar100.py"),
    ],
)
def test_a_source_of_the_wrong_kind_names_what_to_do(name, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (path.parent / "config.json").write_text("{}") if path.parent.name == "export" else None
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        compare(tmp_path / Path(name).parts[0])
    assert "\n" not in str(raised.value)


def test_gradients_are_those_on_the_most_images(tmp_path):
    run = make_run(tmp_path / "run", result={"student_sha256": "f" * 64})
    for logit_gc, examples in ((0.4, 450), (0.5, 450), (0.6, 10)):
        scalar = {"gd": 1.0, "gc": logit_gc, "remainder_student": 0.1, "remainder_teacher": 0.3}
        report = {"gd": 0.1, "gc": 0.5, "definition": "g", "epsilon": 8 / 255, "examples": examples}
        report["scalars"] = dict.fromkeys(("probability", "logit"), scalar)
        record = {"measured": ["gradients"], "student_sha256": "f" * 64, "dataset_sha256": "d" * 64}
        evaluation.write_record(run, {**record, "teacher_sha256": "e" * 64, "gradients": report})
    printed = compare(run)
    assert "0.500" in cells(printed, "AdaAD")
    assert "(evaluate.py, the first 450 test images)" in printed


def test_unfinished_runs_are_shown_and_never_compared(pair, tmp_path, written):
    (pair[1] / "result.json").unlink()
    printed = compare(*pair)
    assert cells(printed, "with_igdm") == ["with_igdm", "AdaAD+IGDM", "BDM", "RES-18", "0", "unfinished, 3 of 3 epochs"]
    assert "Not finished: 1 of the runs." in printed
    assert "points, 95 %" not in printed
    attacked_later = make_run(tmp_path / "later", "IGDM", robust=None, aa_examples=100)
    assert cells(compare(pair[0], attacked_later), "later")[-1] == "unfinished, 3 of 3 epochs"
    (pair[0] / "result.json").unlink()
    assert "no plots: no run is finished" in written(*pair)
    assert "unfinished" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_baseline_without_a_teacher_is_paired_with_what_brings_one(tmp_path):
    """It is a student, whose settings must be those of the others; a teacher is not."""
    none = {"config": {"teacher_sha256": None}, "teacher": None}
    base = make_run(tmp_path / "base", **none)
    brings = {"config": {"added_settings": ["teacher", *ADDED]}}
    others = [make_run(tmp_path / teacher, "IGDM", teacher=teacher, robust=0.41, **brings) for teacher in ("A", "B")]
    printed = compare(base, *others)
    for teacher in ("A", "B"):
        assert f"minus AdaAD ({teacher}, RES-18, digits): +3.00 points" in printed
    groups = comparison_of(read_runs([base, *others])).groups
    assert all(group.is_student for group in groups)
    alone = comparison_of(read_runs([base])).groups
    assert not alone[0].is_student
    unlike = make_run(tmp_path / "unlike", lr=0.2, seed=1, **none)
    with pytest.raises(UserError, match=r"they differ in lr .* Only teacher, alpha"):
        compare(unlike, others[0])


def test_the_gain_at_the_best_epochs_is_beside_that_at_the_last(tmp_path):
    """By hand: at the last epoch +2 of 4 images, at the best +1: the gain grows by 25 points."""

    def run(last, best):
        attacked = {"version": "standard", "epsilon": 8 / 255, "seed": 0, "examples": 4, "flags": best}
        attacked |= {"accuracy": best.count("-") / 4}
        return {"flags": last, "result": {"best": {"clean": 0.8, "pgd20": 0.4, "autoattack": attacked}}}

    printed = compare(*make_pair(tmp_path, run("-111", "--11"), run("---1", "---1")))
    assert "best AutoAttack" in printed
    assert "held-out images), AdaAD+IGDM minus AdaAD (BDM, RES-18, digits): +25.00 points, 95 % interval" in printed
    assert "The last epoch's gain minus this gain: +25.00 points, 95 % interval" in printed


def test_records_give_the_same_tables_as_the_folders(tmp_path, written):
    for seed in (0, 1):
        for adds, flags in zip((None, "IGDM"), flags_of(20, 3), strict=True):
            folder = tmp_path / "runs" / f"{adds}{seed}"
            command = {"command": f"torchrun --nproc_per_node 2 /a/b/ard.py --teacher runs/{seed}.py"}
            make_run(folder, adds, seed=seed, flags=flags, config=command, result={"gradients": GRADIENTS, **command})
    records = tmp_path / "mine.json"
    first = written(tmp_path / "runs", "--records", records)
    assert written(records) == first.replace(f"records   {records}\n", "")
    assert len(records.read_text().splitlines()) == 2 + 4, "a line per run"
    run = json.loads(records.read_text())["runs"][0]
    kept = "torchrun --nproc_per_node 2 ard.py --teacher runs/0.py"
    assert run["config"]["command"] == run["result"]["command"] == kept, "without a folder of the machine"

    document = tmp_path / "results.md"
    document.write_text("a\n<!-- begin mine -->\nold\n<!-- end mine -->\nb\n<!-- begin mine table --><!-- end")
    fill_marks(document, [records])
    once = document.read_text()
    assert once.startswith("a\n<!-- begin mine -->\n| method |")
    assert "old" not in once
    assert "4 runs, 0.0 hours in all on Some CPU" in once
    fill_marks(document, [records])
    assert document.read_text() == once
    with pytest.raises(UserError, match="has no lines '<!-- begin other -->'"):
        fill_marks(document, [records.rename(tmp_path / "other.json")])


def test_marks_without_sources_and_sources_without_marks(pair, tmp_path, written, monkeypatch):
    """Marks that are filled are in the committed documents."""
    sources, document = [tmp_path / "mine.json", tmp_path / "spare.json"], tmp_path / "results.md"
    written(*pair, "--records", sources[0])
    sources[1].write_text(sources[0].read_text())
    marks = "mine table", "other"
    document.write_text("".join(f"<!-- begin {mark} -->\nold\n<!-- end {mark} -->\n" for mark in marks))
    assert fill_marks(document, sources) == [f"{document}: mine table", f"{document}: no mark for spare"]
    assert "<!-- begin other -->\nold\n" in document.read_text(), "its records were not given"
    document.write_text("<!-- begin mine other figure -->\n<!-- end mine other figure -->")
    monkeypatch.undo()  # draws
    with pytest.raises(UserError, match="mine has no figure 'other'; it has comparison, gains"):
        fill_marks(document, sources[:1])


def test_inserting_is_all_that_insert_does(pair, tmp_path, written, capsys):
    """No other file, no two sources of one name, and no prose lost to a mark that does not end."""
    kept, page = tmp_path / "my-runs.2.json", tmp_path / "page.md"
    written(*pair, "--records", kept)
    page.write_text("<!-- begin my-runs.2 -->\n\nprose\n\n<!-- begin my-runs.2 -->\n<!-- end my-runs.2 -->\n")
    with pytest.raises(SystemExit):
        comparing.main([str(kept), "--insert", str(page), "--csv", str(tmp_path / "a.csv")])
    assert "not together with --csv" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"two sources are called my-runs\.2"):
        fill_marks(page, [tmp_path / "other" / kept.name, kept])
    fill_marks(page, [kept])
    assert "prose" in page.read_text()
    assert "| AdaAD+IGDM |" in page.read_text()


def test_csv_and_latex(pair, tmp_path, written):
    more = make_run(tmp_path / "m", method="M_1 & 50%", robust=0.4)
    written(*pair, more, "--csv", f"{tmp_path}/a.csv", "--latex", f"{tmp_path}/a.tex")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["AdaAD", "AdaAD+IGDM", "M_1 & 50%"]
    assert [float(row["autoattack"]) for row in rows] == [0.38, 0.41, 0.4]
    assert float(rows[1]["gain"]) == pytest.approx(0.03)
    latex = (tmp_path / "a.tex").read_text()
    assert r"AdaAD+IGDM & 80.00 & 41.00 & $+$3.00 {\tiny[$+0.00$, $+7.00$]}" in latex
    assert r"M\_1 \& 50\%" in latex
    assert latex.splitlines()[1:3] == [r"\begin{tabular}{@{}lrrr@{}}", r"\toprule"]


def test_columns_are_chosen_for_every_format(pair, tmp_path, written, capsys):
    files = [f"--{kind}={tmp_path}/a.{kind}" for kind in ("latex", "html")]
    printed = written(*pair, *files, "--columns", "method", "pgd20", "seeds")
    assert cells(printed, "AdaAD+IGDM") == ["AdaAD+IGDM", "40.00", "1"]
    assert "| AdaAD+IGDM | 40.00 | 1 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert r"method & PGD-20 & n seeds \\" in (tmp_path / "a.latex").read_text()
    assert '<th scope="col">n seeds</th></tr>' in (tmp_path / "a.html").read_text()
    with pytest.raises(SystemExit):
        comparing.main([str(pair[0]), "--columns", "speed"])
    assert "speed" in (error := capsys.readouterr().err)
    assert "autoattack" in error


def test_the_terminal_has_notes_on_the_columns_that_it_shows(tmp_path, written):
    run = make_run(tmp_path / "run", result={"gradients": GRADIENTS})
    assert "GD (lower is closer" not in written(run)
    assert "GD (lower is closer" in (tmp_path / "out" / "comparison.md").read_text()
    assert "GD (lower is closer" in written(run, "--columns", "method", "gc")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", '{"format": 2}', "format is 2"),
        ("result.json", '{"format": 1}', "script is absent"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epo', "metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", "3\n", "an object is needed"),
        ("metrics.jsonl", '{"clean": 0.5}\n', "epoch is absent"),
        ("metrics.jsonl", '{"epoch": 1, "clean": 50}\n', "clean is 50: Input should be less than or equal to 1"),
        ("metrics.jsonl", '{"epoch": 1, "clean": NaN}\n', "clean is NaN"),
        ("metrics.jsonl", "\udcff", "metrics.jsonl, line 1 is not valid JSON"),
        ("a.json", "{}", "a.json: format is absent"),
        ("a.json", '{"format": 1, "runs": [{}]}', "a.json: runs.0.folder is absent"),
    ],
)
def test_damaged_files_are_named(pair, name, content, named):
    (pair[0] / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        compare(pair[0] / name if name == "a.json" else pair[0])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


# The folders are rewritten by each example, so sharing the fixture between examples does no harm.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_an_error(tmp_path, data):
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
        found = comparison_of(read_runs([folder]))
        assert as_document(tables_of(found), notes_of(found))
        assert as_latex(found)
    except UserError:
        pass  # the only error that is not a traceback


def test_flags_that_do_not_fit_are_an_error(tmp_path):
    with pytest.raises(UserError, match="flags are of 2 images, expected 100"):
        compare(make_run(tmp_path / "a", attack={"flags": dict.fromkeys(AUTOATTACK_STEPS, "01")}))


def test_out_that_cannot_be_made_is_an_error(pair, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot create"):
        comparing.main([*map(str, pair), "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "kept"


def test_output_goes_beside_the_runs_or_here(tmp_path, monkeypatch, capsys):
    """Beside them, it is no run when the folder is compared again. Not beside records: docs/results holds no other."""
    monkeypatch.setattr(figures, "all_figures", lambda comparison, **options: {})
    pair, records = make_pair(tmp_path / "runs", with_igdm={"robust": 0.41}), tmp_path / "kept" / "a.json"
    records.parent.mkdir()
    (tmp_path / "runs" / "logs").mkdir()
    for _ in range(2):
        comparing.main([str(tmp_path / "runs"), "--records", str(records)])
        assert cells(capsys.readouterr().out, "AdaAD+IGDM")[3].startswith("+3.00 (")
    assert (tmp_path / "runs" / "comparison.md").exists()
    assert "+3.00" in compare(tmp_path), "a level further up"
    elsewhere = make_run(tmp_path / "elsewhere" / "base")
    for number, sources in enumerate(([elsewhere, pair[1]], [records])):
        folder = tmp_path / f"here{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        comparing.main([str(source) for source in sources])
        assert (folder / "comparison.md").exists()
    assert [path.name for path in records.parent.iterdir()] == ["a.json"]


def test_output_that_nobody_reads_is_no_error(pair, tmp_path):
    """compare.py ... | head; of unfinished runs, which draw nothing."""
    for folder in pair:
        (folder / "result.json").unlink()
    command = [sys.executable, "-u", str(ROOT / "compare.py"), *map(str, pair), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + 13


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/results.md",
        "docs/tutorial.md",
        *(f"docs/results/{path.name}" for path in ROOT.glob("docs/results/*.md")),
    ],
)
def test_committed_tables_and_figures_are_those_of_the_committed_records(document, tmp_path):
    text = (ROOT / document).read_text()
    # A study without records has its published figures only.
    sources = {
        path.stem: path
        for folder, kind in (("studies", "toml"), ("docs/results", "json"))
        for path in sorted((ROOT / folder).glob(f"*.{kind}"))
    }
    marks = {name for names in re.findall(r"<!-- begin ([\w+]+)", text) for name in names.split("+")}
    (tmp_path / "made.md").write_text(text)
    fill_marks(tmp_path / "made.md", [sources[mark] for mark in sorted(marks)], run_dir=tmp_path)
    for drawn in sorted(tmp_path.glob("figures/*")):
        assert drawn.read_text() == (ROOT / document).parent.joinpath("figures", drawn.name).read_text(), drawn.name
    assert (tmp_path / "made.md").read_text() == text
