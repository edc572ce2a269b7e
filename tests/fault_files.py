"""Faults of what a run is given: damaged checkpoints, useless teachers, odd paths."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fault_server import SCRIPTS, SMALL, Row, Server, reproduces, stopped_run, tree


def small_npz(path: Path, **changes: object) -> Path:
    """A valid .npz of 40 random images of ten classes, but for the changes."""
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


def damaged_checkpoints(server: Server, home: Path, expected: dict, times: int) -> Iterator[Row]:
    """last.pt truncated or with one bit flipped: previous.pt takes over; both damaged: an error."""
    rng, script = random.Random(4), SCRIPTS[0]
    whole = stopped_run(server, home, "damaged")
    kept = shutil.copytree(whole, home / "kept")
    for kind in ("truncated", "with one bit flipped"):
        for _ in range(times):
            content = bytearray((whole / "last.pt").read_bytes())
            position = rng.randrange(1000, len(content) - 1000)
            if kind == "truncated":
                del content[position:]
            else:
                content[position] ^= 1 << rng.randrange(8)
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
    yield "last.pt and previous.pt damaged", 1, "one line, exit status 2; no file changed"


def broken_teachers(server: Server, home: Path) -> Iterator[Row]:
    """Teachers whose logits are infinite or constant."""
    import torch

    from cifar100_models import build_model
    from experiment import files

    for kind, weight, message in (
        ("teacher with infinite logits", 3e38, "logits are not finite"),
        ("teacher with constant logits", 0, "logits are the same for every image"),
    ):
        model = build_model("RES-8", 10)
        with torch.no_grad():
            list(model.parameters())[-2].fill_(weight)
            model.layer3[0].bn2.bias.fill_(10)  # features far above 0, so that 3e38 times their sum is infinite
        files.save_student(home / "broken.pt", model, "RES-8", 10, {})
        server.run(SCRIPTS[0], [*SMALL, "--teacher", "broken.pt"], home).expect(3, message)
        yield kind, 1, "error before training, exit status 3"


def odd_paths(server: Server, home: Path) -> Row:
    """Spaces, unicode and symbolic links in every path."""
    place = home / "ein Ordner" / "Ünïcödé 数字"
    place.mkdir(parents=True)
    shutil.copy(home / "teacher" / "student.pt", place / "der Lehrer.pt")
    (place / "link.pt").symlink_to(place / "der Lehrer.pt")
    small_npz(place / "meine Daten.npz")
    (home / "linked").symlink_to(place, target_is_directory=True)
    for i, (folder, teacher) in enumerate(((place, "der Lehrer.pt"), (home / "linked", "link.pt"))):
        flags = [*SMALL, "--epochs", "1", "--aa_examples", "2", "--batch", "20", "--train_examples", "0"]
        flags += ["--run_name", f"Lauf {i} ☃"]
        flags += ["--teacher", folder / teacher, "--dataset", folder / "meine Daten.npz", "--run_dir", folder / "Läufe"]
        server.run(SCRIPTS[0], flags, home).expect(0)
        assert (folder / "Läufe" / f"Lauf {i} ☃" / "result.json").is_file()
    return "paths with spaces, unicode, symbolic links", 2, "trained, attacked and saved"
