"""Networks that go wrong, teachers that have nothing to teach, flags and paths that nobody meant."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from fault_files import small_npz
from fault_server import SCRIPTS, SMALL, Server, tree


def numerical(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """Not finite, constant, collapsed: stopped within the epoch with status 3; what was saved is from before."""
    # 206 steps: settled from 200 on.
    long = [*SMALL, "--batch", "14", "--steps", "1", "--checkpoint_minutes", "10"]
    cases = {
        "loss NaN": ("loss", 9, "nan", SMALL, "the loss is not finite in epoch 2, step 3"),
        "weights NaN after the last step of an epoch": ("step", 12, "nan weights", SMALL, "weights are not finite in"),
        "student's logits the same for every image": ("step", 12, "constant", SMALL, "logits are the same for every"),
        "student collapsed to one class": ("step", 206, "one class", long, "predicts one class for every image"),
    }
    for i, (kind, (point, n, action, flags, message)) in enumerate(cases.items()):
        script = SCRIPTS[flags is SMALL]  # the baseline's steps take less time
        outcome = server.run(script, [*flags, "--run_name", f"bad_{i}"], home, faults=[(point, n, action)])
        outcome.expect(3, f"{message}.*lr 0.*The diverged state is not saved.*last.pt")
        folder = home / "runs" / f"bad_{i}"
        assert not (folder / "student.pt").exists()
        assert not (folder / "result.json").exists()
        assert "nan" not in (folder / "metrics.jsonl").read_text().lower()
        server.run(script, [*flags, "--run_name", f"bad_{i}"], home, faults=[("start", 1, "")]).expect(2, "admitted")
        yield kind, 1, "stopped within the epoch, exit status 3; the previous checkpoint is valid"
    flags = [*long, "--stop_on_collapse", "0", "--aa_examples", "0", "--run_name", "bad_3"]  # free of that stop
    server.run(SCRIPTS[0], flags, home, faults=[("start", 1, "")]).expect(2, "other settings .aa_examples")
    flags[flags.index("bad_3")] = "unequal"
    server.run(SCRIPTS[0], flags, home, faults=[("step", 206, "one class")]).expect(0)
    yield "student of one class, with --stop_on_collapse 0", 1, "allowed"
    outcome = server.run(
        SCRIPTS[1], [*SMALL, "--aa_examples", "0", "--run_name", "early"], home, faults=[("step", 3, "one class")]
    )
    outcome.expect(0)
    yield "student of one class in the first 200 steps", 1, "allowed: BatchNorm statistics have not converged"
    outcome = server.run(SCRIPTS[1], [*SMALL, "--run_name", "oom"], home, faults=[("attack", 3, "memory")])
    outcome.expect(2, "error: .*out of GPU memory at --batch 256 .*try --batch 128")
    server.run(SCRIPTS[1], [*SMALL, "--batch", "128", "--run_name", "oom"], home, faults=[("start", 1, "")]).expect(2)
    yield "out of GPU memory (raised on the CPU)", 1, "one line that suggests a batch size, exit status 2"


def broken_teachers(server: Server, home: Path) -> Iterator[tuple[str, int, str]]:
    """A teacher that is not finite, one that says the same of every image, one of another number of classes."""
    import torch

    from cifar100_models import build_model
    from experiment import files

    for kind, status, message in (
        ("teacher with NaN weights", 2, "values that are not finite"),
        ("teacher with infinite logits", 3, "logits are not finite"),
        ("teacher with constant logits", 3, "logits are the same for every image"),
        ("teacher of another number of classes", 2, "has 7 classes but the data has 10"),
    ):
        model = build_model("RES-8", 7 if "another" in kind else 10)
        weight = list(model.parameters())[-2]
        with torch.no_grad():
            weight.fill_(float("nan") if "NaN" in kind else 3e38 if "infinite" in kind else 0)
            model.layer3[0].bn2.bias.fill_(10)  # features far above 0, so that 3e38 times their sum is infinite
        files.save_student(home / "broken.pt", model, "RES-8", weight.shape[0], {})
        outcome = server.run(SCRIPTS[0], [*SMALL, "--teacher", "broken.pt", "--run_name", kind], home)
        outcome.expect(status, message)
        yield kind, 1, f"error before training, exit status {status}"


def flag_values():
    """A hypothesis strategy of values that nobody meant for a flag."""
    from hypothesis import strategies as st

    odd = ["", " ", "-1", "0", "nan", "inf", "-inf", "1e400", "8/0", "8/255/2", "0x10", "1_0", "٣", "½", "None", "true",
           "..", "/", "a/b", "~", "*", "--", "-", "%s", "{}", "\n", "💾", "x" * 5000, "9" * 400, "RES-8 ", "WRN-28-999",
           "/dev/null", ".", "cuda:99", "cuda:-1", "missing.npz", "missing.pt"]  # fmt: skip
    # What a command line can hold: no NUL. Lone surrogates stand for bytes that are no UTF-8.
    text = st.text(st.characters(exclude_characters="\0"), max_size=20)
    return st.one_of(st.sampled_from(odd), text, st.floats().map(str), st.integers().map(str))


def fuzz_flags(server: Server, home: Path, times: int) -> tuple[int, str]:
    """Random values for random flags of random scripts, through hypothesis; no run ever begins."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from experiment.cli.flags import FLAGS

    flags = sorted({*FLAGS, "unknown"} - {"run_dir", "nowand", "wandb"})
    done = 0

    @settings(max_examples=times, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(SCRIPTS), st.lists(st.tuples(st.sampled_from(flags), flag_values()), min_size=1, max_size=3))
    def fuzz(script, given_flags):
        nonlocal done
        extra = [part for name, value in given_flags for part in (f"--{name}", value)]
        before = tree(home)
        # --batch 1 is refused at the start: what is valid gets that far.
        argv = [*SMALL, "--run_name", "fuzzed", "--batch", "1", *extra]
        outcome = server.run(script, argv, home, faults=[("start", 1, "")])
        assert outcome.status == 2 or (outcome.status == 0 and "usage:" in outcome.out), (argv, outcome.err)
        if outcome.status == 2:
            outcome.expect(2, "^error: |\nerror: ")
        after = tree(home)
        assert {name: digest for name, digest in after.items() if not name.startswith("runs/")} == {
            name: digest for name, digest in before.items() if not name.startswith("runs/")
        }
        done += 1

    fuzz()
    shutil.rmtree(home / "runs" / "fuzzed", ignore_errors=True)
    return done, "one line, exit status 2, no traceback; no file changed"


def odd_paths(server: Server, home: Path) -> tuple[int, str]:
    """Spaces, unicode and symbolic links in every path."""
    place = home / "ein Ordner" / "Ünïcödé 数字"
    place.mkdir(parents=True)
    shutil.copy(home / "teacher" / "student.pt", place / "der Lehrer.pt")
    (place / "link.pt").symlink_to(place / "der Lehrer.pt")
    small_npz(place / "meine Daten.npz")
    (home / "linked").symlink_to(place, target_is_directory=True)
    flags = [*SMALL, "--epochs", "1", "--aa_examples", "2", "--batch", "20"]
    for i, (teacher, data, runs) in enumerate(
        (
            (place / "der Lehrer.pt", place / "meine Daten.npz", place / "meine Läufe"),
            (home / "linked" / "link.pt", home / "linked" / "meine Daten.npz", home / "linked" / "l"),
        )
    ):
        flags += ["--teacher", teacher, "--dataset", data, "--run_dir", runs, "--run_name", f"Lauf {i} ☃"]
        server.run(SCRIPTS[0], flags, home).expect(0)
        assert (runs / f"Lauf {i} ☃" / "result.json").is_file()
    return 2, "trained, attacked and saved"
