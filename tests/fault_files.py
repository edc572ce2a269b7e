"""Faults of what a run is given: damaged, crafted and random files, useless teachers, random flags, odd paths."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fault_server import SCRIPTS, SMALL, Server, reproduces, stopped_run, tree

REFUSED = "one line, exit status 2; no file changed"
CRAFTED = {
    ".npz": ".npz (zip bomb, object array, labels out of range, ...)",
    "teacher": "teacher checkpoint (pickle that runs code, HTML page, missing weights, ...)",
    "last.pt": "last.pt (pickle that runs code, another run, wrong types, ...)",
    "config.json": "config.json (other settings, not JSON, ...)",
}


def small_npz(path: Path, **changes: object) -> Path:
    """A valid .npz of 40 random images of ten classes, but for the changes."""
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 10,
        "x_test": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 10,
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def admitted(server: Server, home: Path, flags: list, script: str = SCRIPTS[0]) -> bool:
    """Run up to the start: whether it started. Otherwise it must end with one line and have changed no file."""
    before = tree(home)
    outcome = server.run(script, [*SMALL, *flags], home, faults=[("start", 1, "")]).expect(2, "(?m)^error: ")
    after = tree(home)
    shutil.rmtree(home / "runs" / "fuzzed", ignore_errors=True)
    assert {name: digest for name, digest in after.items() if not name.startswith("runs/fuzzed/")} == before
    return "error: admitted" in outcome.err


def targets(server: Server, home: Path) -> dict[str, tuple[Path, list]]:
    """The files that a run reads: path of a valid one, and the flags with which a run reads it."""
    shutil.rmtree(home / "runs" / "stopped", ignore_errors=True)
    folder = stopped_run(server, home, "stopped")
    (folder / "previous.pt").unlink()
    data, teacher = small_npz(home / "data.npz"), Path(shutil.copy(home / "teacher/student.pt", home / "teacher.pt"))
    own, fresh = ["--run_name", "stopped"], ["--run_name", "fuzzed"]
    return {
        ".npz": (data, ["--dataset", data, "--batch", "8", *fresh]),
        "teacher": (teacher, ["--teacher", teacher, *fresh]),
        "last.pt": (folder / "last.pt", own),
        "config.json": (folder / "config.json", own),
    }


def damaged_checkpoints(server: Server, home: Path, expected: dict, times: int) -> Iterator[tuple[str, int, str]]:
    """last.pt truncated, with one bit flipped or empty: previous.pt takes over; both damaged: an error."""
    rng, script = random.Random(4), SCRIPTS[0]
    whole = stopped_run(server, home, "damaged")
    kept = shutil.copytree(whole, home / "kept")
    for kind in ("truncated", "with one bit flipped", "emptied"):
        for _ in range(times):
            content = bytearray((whole / "last.pt").read_bytes())
            position = rng.randrange(1000, len(content) - 1000)
            if kind == "with one bit flipped":
                content[position] ^= 1 << rng.randrange(8)
            else:
                del content[position if kind == "truncated" else 0 :]
            (whole / "last.pt").write_bytes(content)
            outcome = server.run(script, [*SMALL, "--run_name", "damaged"], home, faults=[("start", 1, "")])
            outcome.expect(2, "admitted")
            harmless = "renamed to" not in outcome.out  # the flipped bit was in padding between the tensors
            assert harmless == (whole / "last.pt").exists()
            assert harmless or (whole / "last.damaged.pt").read_bytes() == content
            reproduces(server, script, home, "damaged", expected[script])
            shutil.rmtree(whole)
            shutil.copytree(kept, whole)
        yield f"last.pt: {kind}", times, "warning, resumed from previous.pt, damaged file kept; bit-identical"
    for path in (whole / "last.pt", whole / "previous.pt"):
        path.write_bytes(path.read_bytes()[:-5000])
    before = tree(whole)
    outcome = server.run(script, [*SMALL, "--run_name", "damaged"], home)
    outcome.expect(2, "error: .*last.pt is truncated.*previous.pt is truncated.*no other checkpoint is left: delete")
    assert tree(whole) == before
    yield "last.pt and previous.pt damaged", 1, REFUSED


def broken_teachers(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """A teacher that is not finite, one whose logits are constant, one of another number of classes."""
    import torch

    from cifar100_models import build_model
    from experiment import files

    for kind, classes, weight, status, message in (
        ("teacher with NaN weights", 10, float("nan"), 2, "values that are not finite"),
        ("teacher with infinite logits", 10, 3e38, 3, "logits are not finite"),
        ("teacher with constant logits", 10, 0, 3, "logits are the same for every image"),
        ("teacher of another number of classes", 7, 0, 2, "has 7 classes but the data has 10"),
    ):
        model = build_model("RES-8", classes)
        with torch.no_grad():
            list(model.parameters())[-2].fill_(weight)
            model.layer3[0].bn2.bias.fill_(10)  # features far above 0, so that 3e38 times their sum is infinite
        files.save_student(home / "broken.pt", model, "RES-8", classes, {})
        server.run(SCRIPTS[0], [*SMALL, "--teacher", "broken.pt"], home).expect(status, message)
        yield kind, 1, f"error before training, exit status {status}"


def crafted_arrays(path: Path) -> dict[str, object]:
    import numpy as np

    def bomb() -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
                    np.lib.format.write_array_header_1_0(member, header)
                    member.write(bytes(1 << 20))

    return {
        "object array": lambda: small_npz(path, x_train=np.array([None] * 40, dtype=object)),
        "label out of range": lambda: small_npz(path, y_test=np.full(20, 10)),
        "zip bomb": bomb,
    }


class RunsCode:
    """A pickle of it creates the file "executed" when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def crafted_teachers(path: Path) -> dict[str, object]:
    import torch

    good = torch.load(path, weights_only=True)
    weights = good["state_dict"]
    vast = {name: value.new_zeros(1).expand(1 << 40) if value.ndim else value for name, value in weights.items()}

    def recompress() -> None:
        with zipfile.ZipFile(path) as source:
            members = {member.filename: source.read(member) for member in source.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in members.items():
                target.writestr(name, content)

    return {
        "pickle that runs code": RunsCode(),
        "old pickle that runs code": lambda: torch.save(RunsCode(), path, _use_new_zipfile_serialization=False),
        "list": [1, 2],
        "other format": good | {"format": "x"},
        "unknown architecture": good | {"architecture": "RES-9000"},
        "architecture that is a list": good | {"architecture": ["RES-8"]},
        "architecture too large for any memory": good | {"architecture": "WRN-994-20"},
        "number of classes too large": good | {"num_classes": 1 << 40},
        "number of classes as text": good | {"num_classes": "10"},
        "weights larger than the file": good | {"state_dict": vast},
        "weight missing": good | {"state_dict": dict(list(weights.items())[1:])},
        "state_dict that is a tensor": good | {"state_dict": torch.zeros(3)},
        "numbers for weights": good | {"state_dict": dict.fromkeys(weights, 1.0)},
        "compressed archive": recompress,
        "HTML page": b"<!DOCTYPE html><html></html>",
        "empty file": b"",
    }


def crafted_checkpoints(path: Path) -> dict[str, object]:
    import torch

    state = torch.load(path, weights_only=True)
    return {
        "pickle that runs code": RunsCode(),
        "that of another run": state | {"id": "0123456789ab"},
        "epoch out of range": state | {"epoch": 10**9},
        "epoch as text": state | {"epoch": "1"},
        "rows missing": state | {"rows": []},
        "rows that are no rows": state | {"rows": [1]},
        "generator state of a wrong size": state | {"rng": state["rng"][:9]},
        "sums as text": state | {"sums": {"adaad": "much"}},
        "without optimizer": state | {"optimizer": {}},
        "of another network": state | {"model": state["model"] | {"linear.weight": torch.zeros(3)}},
    }


def crafted_configs(path: Path) -> dict[str, object]:
    config = json.loads(path.read_text())
    settings = config["settings"]
    edits = {
        "another setting": config | {"settings": settings | {"lr": 0.2}},
        "setting of a wrong type": config | {"settings": settings | {"lr": "0.1"}},
        "setting missing": config | {"settings": {"lr": 0.1}},
        "setting unknown": config | {"settings": settings | {"temperature": 4}},
        "settings as list": config | {"settings": []},
        "other data": config | {"dataset_sha256": "0" * 64},
        "other teacher": config | {"teacher_sha256": None},
        "other script": config | {"script": SCRIPTS[1] + ".py"},
        "id as number": config | {"id": 7},
        "other format": config | {"format": 2},
        "a list": [],
    }
    cases = {name: json.dumps(content).encode() for name, content in edits.items()}
    return {**cases, "not JSON": b"{", "deep nesting": b"[" * 100_000, "not UTF-8": b"\xff"}


def crafted_files(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """Well-formed files with bad content: bytes to write, a function that writes, or an object for torch.save."""
    import torch

    makers = {
        ".npz": crafted_arrays,
        "teacher": crafted_teachers,
        "last.pt": crafted_checkpoints,
        "config.json": crafted_configs,
    }
    for kind, (path, flags) in targets(server, home).items():
        original, cases = path.read_bytes(), makers[kind](path)
        for name, content in cases.items():
            path.write_bytes(content if isinstance(content, bytes) else original)
            if callable(content):
                content()
            elif not isinstance(content, bytes):
                torch.save(content, path)
            assert not admitted(server, home, flags), name
        path.write_bytes(original)
        assert not (home / "executed").exists()
        yield f"crafted file: {CRAFTED[kind]}", len(cases), REFUSED


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Change, remove, add or cut off one to eight times a few bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        position = rng.randrange(len(data) + 1)
        # Half of the time near the ends, where the headers and directories of archives are.
        if rng.random() < 0.5:
            position = min(len(data), rng.choice((position % 300, len(data) - position % 900)))
        kind = rng.randrange(5)
        if kind <= 1 and position < len(data):
            data[position] = rng.randrange(256)
        elif kind == 2:
            del data[position : position + rng.randint(1, 64)]
        elif kind == 3:
            data[position:position] = rng.randbytes(rng.randint(1, 16))
        elif rng.random() < 0.1:
            del data[position:]
        if not data:
            break
    return bytes(data)


def fuzzed_files(server: Server, home: Path, times: int) -> Iterator[tuple[str, int, str]]:
    """Random changes of the bytes of each kind of file."""
    rng = random.Random(5)
    for kind, (path, flags) in targets(server, home).items():
        content, started = path.read_bytes(), 0
        for _ in range(times):
            path.write_bytes(mutate(rng, content))
            started += admitted(server, home, flags)
        path.write_bytes(content)
        name = {".npz": ".npz data set", "teacher": "teacher checkpoint"}.get(kind, kind)
        outcome = "one line, exit status 2, unless harmless; no file changed"
        yield f"random bytes changed: {name} ({started} harmless)", times, outcome


ODD = ["", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "8/0", "8/255/2", "0x10", "1_0", "٣", "½", "None", "true",
       "..", "/", "a/b", "~", "*", "--", "-", "%s", "{}", "\n", "💾", "x" * 5000, "9" * 400, "RES-8 ", "WRN-28-999",
       "/dev/null", ".", "cuda:99", "cuda:-1", "missing.npz", "missing.pt"]  # fmt: skip


def fuzz_flags(server: Server, home: Path, times: int) -> tuple[str, int, str]:
    """Random values for random flags of random scripts, through hypothesis; no run ever begins."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from experiment.cli.flags import FLAGS

    flags = sorted({*FLAGS, "unknown"} - {"run_dir", "nowand", "wandb"})
    # What a command line can hold: no NUL. Lone surrogates stand for bytes that are no UTF-8.
    text = st.text(st.characters(exclude_characters="\0"), max_size=20)
    value = st.one_of(st.sampled_from(ODD), text, st.floats().map(str), st.integers().map(str))
    given_flags = st.lists(st.tuples(st.sampled_from(flags), value), min_size=1, max_size=3)

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SCRIPTS), given_flags)
    def fuzz(script, pairs):
        # --batch 1 is an error at the start: valid flags get that far.
        argv = [*SMALL, "--run_name", "fuzzed", "--batch", "1", *(part for k, v in pairs for part in (f"--{k}", v))]
        before = tree(home)
        outcome = server.run(script, argv, home, faults=[("start", 1, "")])
        if outcome.status or "usage:" not in outcome.out:
            outcome.expect(2, "(?m)^error: ")
        after = tree(home)
        assert {k: v for k, v in after.items() if not k.startswith("runs/")} == {
            k: v for k, v in before.items() if not k.startswith("runs/")
        }

    fuzz()
    return "random values for random flags", times, "one line, exit status 2, no traceback; no file changed"


def odd_paths(server: Server, home: Path) -> tuple[str, int, str]:
    """Spaces, unicode and symbolic links in every path."""
    place = home / "ein Ordner" / "Ünïcödé 数字"
    place.mkdir(parents=True)
    shutil.copy(home / "teacher" / "student.pt", place / "der Lehrer.pt")
    (place / "link.pt").symlink_to(place / "der Lehrer.pt")
    small_npz(place / "meine Daten.npz")
    (home / "linked").symlink_to(place, target_is_directory=True)
    for i, (folder, teacher) in enumerate(((place, "der Lehrer.pt"), (home / "linked", "link.pt"))):
        flags = [*SMALL, "--epochs", "1", "--aa_examples", "2", "--batch", "20", "--run_name", f"Lauf {i} ☃"]
        flags += ["--teacher", folder / teacher, "--dataset", folder / "meine Daten.npz", "--run_dir", folder / "Läufe"]
        server.run(SCRIPTS[0], flags, home).expect(0)
        assert (folder / "Läufe" / f"Lauf {i} ☃" / "result.json").is_file()
    return "paths with spaces, unicode, symbolic links", 2, "trained, attacked and saved"
