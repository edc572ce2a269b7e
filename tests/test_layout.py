"""The layout, read from the sources: import directions, the scripts' skeleton, forbidden words. Style is ruff's."""

import ast
import graphlib
import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASELINES = ("ard", "rslad", "adaad")
METHODS = tuple(f"{method}{added}_cifar100" for method in BASELINES for added in ("", "_IGDM"))
WITH_IGDM = ("pgd_at", "trades")
EXAMPLES = (*(f"{method}{added}_cifar100" for method in WITH_IGDM for added in ("", "_IGDM")), "saad_cifar100")
SCRIPTS = (*METHODS, "train_teacher", "evaluate", "compare", "study", "export", "hubconf")
LIBRARIES = ("attacks", "rslad_loss")
PACKAGES = ("cifar100_models", "experiment", "examples")

# Floors of experiment/, from below: imports go down only, also those inside functions.
FLOORS = (
    ("text", "files", "entry", "compat", "optim"),
    ("records",),
    ("cli",),
    ("data", "teachers", "engine"),
    ("evaluation",),
    ("run",),
    ("study",),
    ("compare",),
)
# What a file may import of the project beside its own package. Scripts and examples: METHOD_PARTS; others: nothing.
METHOD_PARTS = {"attacks", "rslad_loss", "cifar100_models", "experiment"}
ALLOWED = {
    "attacks.py": {"rslad_loss"},  # one home for the divergence of both
    "train_teacher.py": METHOD_PARTS | {"examples"},  # whose losses it trains with
    "evaluation": {"attacks"},
    "engine": {"attacks"},  # frozen(), and every rank draws its rows of a start
    "run": {"attacks"},  # a network that has diverged is probed with frozen parameters
    "files": {"cifar100_models"},  # load_student builds the network that a file names
    "entry": {"cifar100_models"},  # a mistake in the user's own network is a line
    "teachers": {"cifar100_models"},  # bare weights need their architecture
    "cli": {"cifar100_models", "attacks"},  # --student is checked before anything is built; --attack's choices
    "study": {"cifar100_models"},  # a dry run counts the operations of the networks
}
PROJECT = {*SCRIPTS, *LIBRARIES, *PACKAGES, "tests", "benchmarks"}


def parts():
    """Every source file of the product: (path from the root, syntax tree)."""
    files = [ROOT / f"{name}.py" for name in (*SCRIPTS, *LIBRARIES)]
    files += [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


PARTS = parts()
DOORS = {
    Path(part).parent.name: {alias.name for node in tree.body for alias in getattr(node, "names", ())}
    for part, tree in PARTS.items()
    if part.count("/") == 2 and part.endswith("/__init__.py")
}
every_part = pytest.mark.parametrize("part", PARTS)


def imports(tree):
    """Top-level names of all modules imported anywhere in a file, functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def room_of(module):
    """experiment.teachers.zoo and experiment/teachers/zoo.py are of the room teachers; None for experiment itself."""
    names = module.removesuffix(".py").replace("/", ".").split(".")
    return names[1] if len(names) > 1 and names[1] != "__init__" else None


def project_imports(part):
    """(module, name) of every import of experiment in a file, functions included."""
    for node in ast.walk(PARTS[part]):
        if isinstance(node, ast.Import):
            assert [alias.name for alias in node.names if alias.name.startswith("experiment.")] == []
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "experiment":
            yield from ((node.module, alias.name) for alias in node.names)


EXPERIMENT = pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("experiment/")])


@every_part
def test_imports_of_the_project(part):
    """Libraries, networks and rooms are below the methods; no file imports a script."""
    package, _, _ = part.partition("/")
    name = room_of(part) if package == "experiment" else part
    default = METHOD_PARTS if part.removesuffix(".py") in SCRIPTS or package == "examples" else set()
    assert set(imports(PARTS[part])) & PROJECT - {package} <= ALLOWED.get(name, default)


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith((*LIBRARIES, "cifar100_models/"))])
def test_attacks_losses_and_networks_need_torch_only(part):
    assert set(imports(PARTS[part])) - set(sys.stdlib_module_names) - PROJECT <= {"torch"}


def test_every_room_has_a_floor():
    assert {room_of(part) for part in PARTS if part.startswith("experiment/")} == {None, *itertools.chain(*FLOORS)}


@EXPERIMENT
def test_imports_go_down_only(part):
    """Never up, and never beside: so there is no circle between rooms."""
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(part)
    for module, name in project_imports(part):
        there = room_of(module) or room_of(f"experiment.{name}")
        if there in floor and there != here:
            assert here is not None, f"experiment/__init__.py imports {there}"
            assert floor[there] < floor[here], f"{part} imports {there}"


@every_part
def test_a_package_is_imported_through_its_init(part):
    """A room's modules are its own affair; others import from experiment.ROOM what its __init__ imports."""
    for module, name in project_imports(part):
        room = room_of(module)
        if module.count(".") > 1:
            assert part.startswith(f"experiment/{room}/"), f"{part} imports {module}"
        elif room and room != room_of(part) and (ROOT / "experiment" / room).is_dir():
            assert name in DOORS[room], f"{part}: {name} is not in the door of {room}"


def test_no_circle_between_the_modules_of_a_room():
    edges = {}
    for part in PARTS:
        module = part.removesuffix(".py").replace("/", ".")
        edges[module] = {other for other, _ in project_imports(part) if other.count(".") == 2}
    graphlib.TopologicalSorter(edges).prepare()


# The skeleton of the six scripts


def skeleton(script):
    """A script without what is the method's own: docstring, RECIPE, training_loss."""
    docstring, *body = PARTS[f"{script}.py"].body
    assert isinstance(docstring.value.value, str)

    def name(node):
        return node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)

    own = ("linearised_attack", "kl") if script == "examples/saad_cifar100" else ()
    assert [name(node) for node in body if name(node)] == ["RECIPE", *own, "training_loss", "main"]
    rest = [node for node in body if name(node) not in ("RECIPE", *own, "training_loss")]
    return [ast.unparse(node) for node in rest]


def without_teacher(statements):
    """A skeleton without the lines that load a teacher; its imports aside."""
    lines = "\n".join(text for text in statements if not text.startswith(("import", "from"))).splitlines()
    return [line for line in lines if not line.startswith("    teacher = ")]


@pytest.mark.parametrize("script", METHODS[1:])
def test_all_six_have_one_skeleton(script):
    assert skeleton(script) == skeleton(METHODS[0])


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_have_the_skeleton_of_the_six(example):
    """But for the teacher, which the baselines have not, and for functions of the method's own."""
    assert without_teacher(skeleton(f"examples/{example}")) == without_teacher(skeleton(METHODS[0]))


@pytest.mark.parametrize("script", [*METHODS, *(f"examples/{example}" for example in EXAMPLES)])
def test_methods_have_one_signature_and_return_terms(script):
    (function,) = [node for node in PARTS[f"{script}.py"].body if getattr(node, "name", "") == "training_loss"]
    assert ast.unparse(function.args) == "student, teacher, x, y, epoch, args"
    assert ast.unparse(function.body[-1]) == "return terms"


@pytest.mark.parametrize("method", [*BASELINES, *(f"examples/{method}" for method in WITH_IGDM)])
def test_an_igdm_script_only_adds_lines(method):
    """Its baseline is what is left when lines are taken away, so that diff shows additions only."""
    baseline = (ROOT / f"{method}_cifar100.py").read_text().splitlines()
    with_igdm = (ROOT / f"{method}_IGDM_cifar100.py").read_text().splitlines()
    remaining = iter(with_igdm)
    assert [line for line in baseline if line not in remaining] == []
    assert len(with_igdm) - len(baseline) <= 20


@pytest.mark.parametrize(("script", "most"), [*((m, 90) for m in METHODS), *((f"examples/{e}", 95) for e in EXAMPLES)])
def test_a_script_is_short(script, most):
    assert 60 <= len((ROOT / f"{script}.py").read_text().splitlines()) <= most


# Words


@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("experiment/")])
def test_nothing_in_experiment_names_a_base_method(part):
    assert re.findall(r"(?i).*\b(?:ard|rslad|adaad)\b.*", (ROOT / part).read_text()) == []


@every_part
def test_no_device_of_its_own(part):
    assert ".cuda(" not in (ROOT / part).read_text()


def test_no_folder_hides_a_package():
    """A local autoattack/ shadows the package; a tests package would hide behind the one robustbench installs."""
    present = {path.name for path in ROOT.iterdir()}
    assert present & {"autoattack", "robustbench", "torchattacks", "wandb.py", "torch"} == set()
    assert not (ROOT / "tests" / "__init__.py").exists()
