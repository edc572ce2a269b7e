"""Damaged, crafted and random files: checkpoints, data sets, teachers, config.json."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_server import SCRIPTS, SMALL, Server, reproduces, stopped_run, tree


def damaged_checkpoints(server: Server, home: Path, expected: dict, times: int, seed: int = 4):
    """last.pt truncated, or with one bit flipped: previous.pt takes over; both damaged: refused."""
    rng, script = random.Random(seed), SCRIPTS[0]
    whole = stopped_run(server, home, "to_damage")
    for kind in ("truncated", "with one bit flipped", "emptied"):
        for i in range(times):
            name = f"damaged_{i}"
            folder = home / "runs" / name
            shutil.copytree(whole, folder)
            config = json.loads((folder / "config.json").read_text())
            config["settings"]["run_name"] = name
            (folder / "config.json").write_text(json.dumps(config))
            content = bytearray((folder / "last.pt").read_bytes())
            position = rng.randrange(1000, len(content) - 1000)
            if kind == "with one bit flipped":
                content[position] ^= 1 << rng.randrange(8)
            else:
                del content[position if kind == "cut short" else 0 :]
            (folder / "last.pt").write_bytes(content)
            outcome = server.run(script, [*SMALL, "--run_name", name], home, faults=[("start", 1, "")])
            outcome.expect(2, "admitted")
            harmless = "renamed to" not in outcome.out  # the flipped bit was in padding between the tensors
            assert harmless == (folder / "last.pt").exists()
            assert harmless or (folder / "last.damaged.pt").read_bytes() == content
            reproduces(server, script, home, name, expected[script])
            shutil.rmtree(folder)
        yield f"last.pt: {kind}", times, "warning, resumed from previous.pt, damaged file kept; bit-identical"
    for path in (whole / "last.pt", whole / "previous.pt"):
        path.write_bytes(path.read_bytes()[:-5000])
    before = tree(whole)
    outcome = server.run(script, [*SMALL, "--run_name", "to_damage"], home)
    outcome.expect(2, "error: .*last.pt is truncated.*previous.pt is truncated.*no other checkpoint is left: delete")
    assert tree(whole) == before
    shutil.rmtree(whole)
    yield "last.pt and previous.pt damaged", 1, "one line, exit status 2; no file changed"


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to eight bytes changed, removed, added, moved or cut off."""
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


def refused_or_admitted(server: Server, home: Path, argv: list[str], script: str = SCRIPTS[0]) -> bool:
    """Run up to the start; assert a clean refusal or a clean start, and that no file changed. Whether it started."""
    before = tree(home)
    outcome = server.run(script, argv, home, faults=[("start", 1, "")]).expect(2, "(?m)^error: ")
    after = tree(home)
    shutil.rmtree(home / "runs" / "fuzzed", ignore_errors=True)
    new = {name for name in after if name.startswith("runs/fuzzed/")}
    assert {name: after[name] for name in after if name not in new} == before
    return "error: admitted" in outcome.err


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


def fuzz_files(server: Server, home: Path, times: int, seed: int = 5) -> Iterator[tuple[str, int, str]]:
    """Byte mutations of a data set, a teacher, a last.pt and a config.json: `times` of each."""
    rng = random.Random(seed)
    (home / "fuzz").mkdir()
    originals = {
        ".npz data set": small_npz(home / "fuzz" / "data.npz"),
        "teacher checkpoint": Path(shutil.copy(home / "teacher" / "student.pt", home / "fuzz" / "teacher.pt")),
    }
    folder = stopped_run(server, home, "resumed")
    (folder / "previous.pt").unlink()
    originals |= {"last.pt": folder / "last.pt", "config.json": folder / "config.json"}
    for kind, path in originals.items():
        content, started = path.read_bytes(), 0
        for _ in range(times):
            path.write_bytes(mutate(rng, content))
            flags = ["--run_name", "resumed" if path.parent == folder else "fuzzed"]
            if kind == ".npz data set":
                flags += ["--dataset", path, "--batch", "8"]
            elif kind == "teacher checkpoint":
                flags += ["--teacher", path]
            started += refused_or_admitted(server, home, [*SMALL, *flags])
        path.write_bytes(content)
        outcome = "one line, exit status 2, unless harmless; no file changed"
        yield f"random bytes changed: {kind} ({started} harmless)", times, outcome


def crafted_files(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """Well-formed files with bad content."""
    import numpy as np
    import torch

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {home}/executed",)

    def checks(kind: str, cases: dict[str, Callable[[Path], object]], suffix: str, flag: str):
        for name, make in cases.items():
            path = home / f"crafted{suffix}"
            make(path)
            argv = [*SMALL, "--batch", "8", flag, path, "--run_name", "fuzzed"]
            assert not refused_or_admitted(server, home, argv), name
            path.unlink()
        assert not (home / "executed").exists()
        return kind, len(cases), "one line, exit status 2; no file changed"

    x, y = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 10

    def bomb(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("x_train", "y_train", "x_test", "y_test"):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
                    )
                    member.write(bytes(1 << 20))

    npz = {
        "object array": {"x_train": np.array([None] * 40, dtype=object)},
        "float images": {"x_train": x.astype(np.float32)},
        "NaN": {"x_train": np.full(x.shape, np.nan)},
        "NCHW": {"x_train": x.transpose(0, 3, 1, 2)},
        "other sizes": {"x_train": np.zeros((40, 9, 9, 3), np.uint8)},
        "float labels": {"y_train": y.astype(float)},
        "durations as labels": {"y_train": y.astype("timedelta64[s]")},
        "negative label": {"y_train": y - 1},
        "label out of range": {"y_test": np.full(20, 10)},
        "huge label": {"y_train": y.astype(np.uint64) + 2**63},
        "empty class": {"y_train": np.where(y == 3, 4, y)},
        "missing array": {"y_test": None},
        "no images": {"x_test": x[:0], "y_test": y[:0]},
        "too few labels": {"y_train": y[:-1]},
    }
    cases = {name: lambda path, c=changes: small_npz(path, **c) for name, changes in npz.items()}
    yield checks(
        "crafted file: .npz (zip bomb, object array, labels out of range, ...)",
        {**cases, "zip bomb": bomb},
        ".npz",
        "--dataset",
    )

    good = torch.load(home / "teacher" / "student.pt", weights_only=True)
    vast = {k: v.new_zeros(1).expand(1 << 40) if v.ndim else v for k, v in good["state_dict"].items()}

    def recompressed(path: Path) -> None:
        with (
            zipfile.ZipFile(home / "teacher" / "student.pt") as source,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for member in source.infolist():
                target.writestr(member.filename, source.read(member))

    saved = {
        "pickle that runs code": Evil(),
        "list": [1, 2],
        "other format": {**good, "format": "x"},
        "unknown architecture": {**good, "architecture": "RES-9000"},
        "architecture that is a list": {**good, "architecture": ["RES-8"]},
        "architecture too large for any memory": {**good, "architecture": "WRN-994-20"},
        "number of classes too large": {**good, "num_classes": 1 << 40},
        "number of classes as text": {**good, "num_classes": "10"},
        "weights larger than the file": {**good, "state_dict": vast},
        "weight missing": {**good, "state_dict": dict(list(good["state_dict"].items())[1:])},
        "state_dict that is a tensor": {**good, "state_dict": torch.zeros(3)},
        "numbers for weights": {**good, "state_dict": dict.fromkeys(good["state_dict"], 1.0)},
    }
    cases = {name: lambda path, c=content: torch.save(c, path) for name, content in saved.items()}
    cases |= {
        "old pickle that runs code": lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
        "compressed archive": recompressed,
    }
    cases |= {"HTML page": lambda path: path.write_text("<!DOCTYPE html><html></html>")}
    cases |= {"empty file": lambda path: path.write_bytes(b"")}
    yield checks(
        "crafted file: teacher checkpoint (pickle that runs code, HTML page, missing weights, ...)",
        cases,
        ".pt",
        "--teacher",
    )

    folder = stopped_run(server, home, "crafted")
    (folder / "previous.pt").unlink()
    last, config = folder / "last.pt", folder / "config.json"
    state, settings = torch.load(last, weights_only=True), json.loads(config.read_text())

    def refused(kind: str, cases: dict[str, object], path: Path, write: Callable[[object], None]):
        original = path.read_bytes()
        for name, content in cases.items():
            write(content)
            assert not refused_or_admitted(server, home, [*SMALL, "--run_name", "crafted"]), name
        path.write_bytes(original)
        assert not (home / "executed").exists()
        return kind, len(cases), "one line, exit status 2; no file changed"

    states = {
        "pickle that runs code": Evil(),
        "that of another run": {**state, "id": "0123456789ab"},
        "epoch out of range": {**state, "epoch": 10**9},
        "epoch as text": {**state, "epoch": "1"},
        "rows missing": {**state, "rows": []},
        "rows that are no rows": {**state, "rows": [1]},
        "generator state of a wrong size": {**state, "rng": state["rng"][:9]},
        "sums as text": {**state, "sums": {"adaad": "much"}},
        "without optimizer": {**state, "optimizer": {}},
        "of another network": {**state, "model": good["state_dict"] | {"fc.weight": torch.zeros(3)}},
    }
    yield refused(
        "crafted file: last.pt (pickle that runs code, another run, wrong types, ...)",
        states,
        last,
        lambda content: torch.save(content, last),
    )
    edits = {
        "another setting": {**settings, "settings": {**settings["settings"], "lr": 0.2}},
        "setting of a wrong type": {**settings, "settings": {**settings["settings"], "lr": "0.1"}},
        "setting missing": {**settings, "settings": {"lr": 0.1}},
        "setting unknown": {**settings, "settings": {**settings["settings"], "temperature": 4}},
        "settings as list": {**settings, "settings": []},
        "other data": {**settings, "dataset_sha256": "0" * 64},
        "other teacher": {**settings, "teacher_sha256": None},
        "other script": {**settings, "script": SCRIPTS[1] + ".py"},
        "id as number": {**settings, "id": 7},
        "other format": {**settings, "format": 2},
        "a list": [],
    }
    cases = {name: json.dumps(content) for name, content in edits.items()}
    cases |= {"not JSON": "{", "deep nesting": "[" * 100_000, "not UTF-8": "\udcff"}
    yield refused(
        "crafted file: config.json (other settings, not JSON, ...)",
        cases,
        config,
        lambda text: config.write_bytes(text.encode(errors="surrogateescape")),
    )
