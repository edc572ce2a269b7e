"""The pages: what they name exists, the commands they show are accepted, the method they show is a file."""

import importlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from fault_server import ROOT

import attacks
from benchmarks import workload
from cifar100_models import build_model
from experiment import cli
from experiment.study import plan
from experiment.study.command import forward_macs

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
ROOMS = ("benchmarks", "cifar100_models", "examples", "experiment")
PRODUCT = [
    *(ROOT / name for name in ("Makefile", "requirements.txt", "pyproject.toml")),
    *ROOT.glob("*.py"),
    *(path for room in ROOMS for path in (ROOT / room).rglob("*.py")),
]
# What commands write, and a document of the AutoAttack package.
WRITTEN = {"comparison.md", "gpu_check.md", "FILE.md", "flags_doc.md"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


of_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@of_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("path", [*PAGES, *PRODUCT], ids=name_of)
def test_documents_that_are_named_are_here(path):
    """A reader has this repository and nothing else."""
    named = set(re.findall(r"[\w./-]+\.md\b", path.read_text())) - WRITTEN
    folders = (ROOT, ROOT / "docs", path.parent)
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_fidelity_notes_are_numbered_and_those_that_are_named_exist():
    notes = [int(number) for number in re.findall(r"^(\d+)\. ", (ROOT / "docs/fidelity.md").read_text(), re.MULTILINE)]
    assert notes == list(range(1, len(notes) + 1))
    named = [re.findall(r"[Ff]idelity note (\d+)", path.read_text()) for path in PRODUCT]
    assert {int(number) for numbers in named for number in numbers} <= set(notes)


def commands(page):
    """The lines of a page's code blocks that run a script of this repository, as lists of words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if found := re.search(r"\b(?:python|torchrun [^#]*?) (?:(\w+)\.py|-m (examples\.\w+))\b(.*)", line):
            yield found[1] or found[2], shlex.split(found[3], comments=True)


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL], ids=name_of)
def test_commands_are_accepted(page):
    for script, flags in commands(page):
        module = importlib.import_module(script)
        if hasattr(module, "RECIPE"):
            cli.parse_args(module.__file__, module.RECIPE, [*flags, "--device", "cpu"])
        elif hasattr(module, "build_parser"):
            module.build_parser().parse_args(flags)


def test_the_readme_loop_runs_with_two_files_alone(tmp_path):
    """IGDM in a foreign loop: attacks.py and rslad_loss.py copied, nothing else of this repository."""
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for name in ("attacks.py", "rslad_loss.py"):
        shutil.copy(ROOT / name, tmp_path)
    use = """
torch.manual_seed(0)
student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).double() for _ in range(2))
x = torch.rand(4, 3, 2, 2).double()
torch.manual_seed(0)
with_igdm = training_loss(student, teacher.eval(), x, 2.0)
torch.manual_seed(0)
without = training_loss(student, teacher, x, 0.0)
with_igdm.backward()
print(with_igdm.item() > without.item() > 0, student[1].weight.grad.abs().sum().item() > 0, teacher[1].weight.grad)
"""
    (tmp_path / "loop.py").write_text(example + use)
    done = subprocess.run([sys.executable, "loop.py"], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True True None\n", 0), done.stderr


SMALLER = (
    ("--batch 64", "--batch 64 --train_examples 200"),
    ("--epochs 10", "--epochs 2 --steps 1"),
    ("batch = 64\n", "batch = 64\ntrain_examples = 200\nsteps = 1\n"),
    ("epochs = 10\n", "epochs = 1\n"),
    ("--aa_examples 360", "--aa_examples 4"),
    ("aa_examples = 360", "aa_examples = 4"),
    ("--attacks clean fgsm pgd autoattack", "--attacks clean fgsm pgd autoattack --aa_examples 4"),
    ("seed = [0, 1]", "seed = [0]"),
    ('["adaad_cifar100", "adaad_IGDM_cifar100"]', '["adaad_IGDM_cifar100"]'),
    ("range(200)", "range(2)"),
)
"""What the tutorial's blocks are run with here instead."""


def test_the_tutorial_runs(small, tmp_path):
    """Every block, in order: files are saved under the name in their first line, commands run."""
    page = TUTORIAL.read_text()
    for full, size in SMALLER:
        assert full in page, full
        page = page.replace(full, size)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language:
            (tmp_path / re.match(r"# (\S+)", block)[1]).write_text(block)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            killed, command, script, flags = re.fullmatch(r"(timeout.* )?(?:python|(\w+)) (\S+)(.*)", line).groups()
            if command:  # make, source, export: of a person's shell
                continue
            flags, faults = shlex.split(flags), [("step", 4, "SIGKILL")] if killed else []
            folder = ROOT if (ROOT / script).is_file() else tmp_path
            done = small.server.run(folder / script.removesuffix(".py"), flags, tmp_path, faults=faults)
            done.expect(-signal.SIGKILL if killed else 0)
    assert (tmp_path / "my_figure.png").is_file()
    assert len(list(tmp_path.glob("runs/two_seeds/*/result.json"))) == 1


@pytest.mark.parametrize("name", ["igdm", "attack_cost"])
def test_a_picture_is_the_one_its_script_draws(tmp_path, name):
    subprocess.run([sys.executable, ROOT / f"docs/figures/{name}.py", tmp_path / f"{name}.svg"], check=True)
    assert (tmp_path / f"{name}.svg").read_text() == (ROOT / f"docs/figures/{name}.svg").read_text()


@pytest.mark.parametrize(
    "study",
    [
        "digits",
        "cifar10_16",
        "digits_teacher10",
        "digits_student",
        "digits_long",
        "digits_target",
        "digits_attack",
        "cifar10_16_attack",
        "digits_methods",
        "digits_methods_long",
    ],
)
def test_gains_in_the_text_are_those_of_the_records(study):
    """Of two studies in the README too."""
    page = (ROOT / f"docs/results/{study}.md").read_text()
    gains = re.findall(r"(\S+) points, 95 % interval (\S+ to \S+\d)", page)
    assert gains
    for name in ("docs/results.md", "README.md") if study in ("digits", "cifar10_16") else ("docs/results.md",):
        text = " ".join((ROOT / name).read_text().replace("−", "-").split())
        assert [part for gain in gains for part in gain if part not in text] == []


def test_pairs_counted_in_the_text_are_those_of_the_records():
    signs = "AutoAttack rose", "GC rose", "GD fell", "logit GC rose", "logit GD fell"
    pattern = r"of (\d+) pairs of one seed: " + ", ".join(rf"{sign} in (\d+)" for sign in signs)
    text, total = (ROOT / "docs/results.md").read_text(), 0
    for study in ("digits", "cifar10_16", "digits_teacher10", "digits_student", "digits_long"):
        ((pairs, autoattack, gc, gd, logit_gc, logit_gd),) = re.findall(
            pattern, (ROOT / f"docs/results/{study}.md").read_text()
        )
        row = " | ".join(f"{count} of {pairs}" for count in (logit_gd, logit_gc, gd, gc, autoattack))
        assert f"| {row} |" in text, study
        assert logit_gd == pairs
        total += int(pairs)
    assert f"in all {total} pairs of five studies" in " ".join((ROOT / "README.md").read_text().split())


def test_the_table_of_performance_is_made_of_measured_figures():
    measured = (ROOT / "docs/performance_tables.md").read_text()
    rows = re.findall(
        r"^\| ((?:ARD|RSLAD|AdaAD)\S*) \| (.*) \|$", (ROOT / "docs/performance.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 6
    with torch.device("meta"):
        networks = [build_model(name) for name in ("RES-18", "WRN-28-10")]
    for method, cells in rows:
        name = method.replace("+", "_").replace("AdaAD", "adaad").replace("RSLAD", "rslad").replace("ARD", "ard")
        published, here, ratio, bfloat16, *counts = cells.split(" | ")
        assert f"| {name}, published order | {published} (" in measured
        assert re.search(rf"\| {name}, product, fp32, eager \| {here} \([^|]*\| {ratio} \(", measured)
        fast = re.search(rf"\| {name}, product, bf16, eager \| [^|]*\| (\S+) \(", measured)
        assert bfloat16 == (fast[1] if fast else "-")
        counted = workload.gflop_of_step(name, networks)
        assert counts == [f"{counted[kind]:.1f}" for kind in ("published", "product")]


@pytest.mark.parametrize(
    "row", ["teacher_every 1", "teacher_every 2", "teacher_every 5", "teacher_every 10", "attack rslad"]
)
def test_the_cost_of_the_attack_is_counted(row):
    """Passes counted on networks that are called, times the operations of one pass."""
    page = (ROOT / "docs/performance.md").read_text()
    cells = re.search(rf"^\| `--{row}`[^|]*\| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    student, teacher = forward_macs("RES-18") / 1e9, forward_macs("WRN-28-10") / 1e9
    flag, value = row.split()
    network, calls = torch.nn.Flatten(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    setting = {"attack": value} if flag == "attack" else {"attack": "adaad", "teacher_every": int(value)}
    x, y = torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    attacks.perturb(student=torch.nn.Flatten(), teacher=network, x=x, y=y, steps=10, **setting)
    of_attack = len(calls) * (1 if flag == "attack" else 2)  # forward, and backward where its gradient is used
    *written, per_epoch = map(float, cells.groups())
    expected = [passes * student + (loss + of_attack) * teacher for passes, loss in ((24, 1), (27, 2))]
    assert written == pytest.approx(expected, abs=0.06)  # one decimal is printed
    assert per_epoch == pytest.approx(expected[1] * 50_000 / 1e6, abs=0.06)


def block(page, language):
    """The code block of a page that has one of this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return found


def test_the_method_that_extending_shows_is_the_file():
    shown = block("docs/extending.md", "python")
    code = (ROOT / "examples/pgd_at_IGDM_cifar100.py").read_text()
    assert shown == code[: code.index("def main")].rstrip() + "\n"


def test_the_study_that_extending_shows_is_planned(tmp_path):
    (tmp_path / "methods.toml").write_text(block("docs/extending.md", "toml"))
    study = plan.read_study(tmp_path / "methods.toml", tmp_path)
    assert {run.name for run in study.runs} == {f"pgd_at{igdm}_seed{n}" for igdm in ("", "_IGDM") for n in (0, 1)}


def test_the_table_of_examples_names_them_all():
    named = re.findall(r"`(\w+_cifar100)`", (ROOT / "docs/extending.md").read_text())
    assert set(named) == {path.stem for path in (ROOT / "examples").glob("*_cifar100.py")}
