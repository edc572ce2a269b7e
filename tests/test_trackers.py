"""Weights & Biases and TensorBoard, read back from what the real packages wrote."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fault_server import SCRIPTS, SMALL

from experiment.run import trackers

FLAGS = [*SMALL, "--tensorboard", "1", "--nowand", "0", "--wandb_tags", "mine", "--wandb_artifact", "1"]
BLOCK = 32768
"""Bytes of a block of a .wandb file, a log as LevelDB writes it: records of 7 bytes of header and their content."""


def records_of(path):
    """The records of a .wandb file, in order."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def items(updates):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def events_of(folder):
    """{name: [(step, value)]} of a folder's event files; in a process of its own, whose warnings are its affair."""
    code = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, folder], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def mirrored(small):
    """A run that was stopped in its second epoch and resumed, mirrored by both."""
    flags = [*FLAGS, "--run_name", "mirrored"]
    small.server.run(SCRIPTS[1], flags, small.home, faults=[("step", 9, "SIGTERM")]).expect(75)
    resumed = small.server.run(SCRIPTS[1], flags, small.home).expect(0)
    folder = small.home / "runs" / "mirrored"
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(folder=folder, home=small.home, result=result, config=config, rows=rows, out=resumed.out)


def test_tensorboard_has_every_row_once(mirrored):
    events = events_of(mirrored.folder / "tensorboard")
    for name, value in (("train/loss", "loss"), ("train/loss_igdm", "loss_igdm"), ("train/lr", "lr")):
        expected = [(row["epoch"], pytest.approx(row[value])) for row in mirrored.rows]  # float32 in the file
        assert [tuple(event) for event in events[name]] == expected
    assert events["test/pgd20"] == [[2, pytest.approx(mirrored.rows[1]["pgd20"])]]
    assert events["result/autoattack"] == [[2, pytest.approx(mirrored.result["autoattack"]["accuracy"])]]
    assert events["result/gd"] == [[2, pytest.approx(mirrored.result["gradients"]["gd"])]]
    assert f"tensorboard --logdir {mirrored.folder.relative_to(mirrored.home)}" in mirrored.out


def test_wandb_offline_has_every_row_of_a_resumed_run(mirrored):
    """The log of the second process alone holds both epochs: the first one's may be lost."""
    files = sorted(mirrored.home.glob(f"wandb/offline-run-*-{mirrored.config['id']}/*.wandb"))
    assert len(files) == 2
    records = records_of(files[-1])
    history = [items(record.history.item) for record in records if record.HasField("history")]
    for row, logged in zip(mirrored.rows, history, strict=True):
        expected = {"epoch": row["epoch"], **trackers.named_metrics(row)}
        assert {name: logged[name] for name in expected} == expected
    assert f"wandb sync wandb/{files[-1].parent.name}" in mirrored.out.replace(f"{mirrored.home}/", "")


def test_wandb_knows_what_the_run_is(mirrored):
    path = sorted(mirrored.home.glob(f"wandb/offline-run-*-{mirrored.config['id']}/*.wandb"))[-1]
    records = records_of(path)
    run = next(record.run for record in records if record.HasField("run"))
    assert run.run_group == "teacher/RES-8/digits"  # teacher, student, data set
    assert run.job_type == "distillation"
    tags = [tag for record in records if record.HasField("run") for tag in record.run.tags]
    assert {"mine", "AdaAD", "IGDM", "RES-8", "digits"} <= set(tags)
    config = {}
    for record in records:
        config |= items(record.config.update) | (items(record.run.config.update) if record.HasField("run") else {})
    for name in ("method", "adds", "commit", "dataset_sha256", "teacher_sha256", "code_sha256"):
        assert config[name] == mirrored.config[name]
    assert config["alpha"] == mirrored.config["settings"]["alpha"]
    summary = {}
    for record in records:
        summary |= items(record.summary.update)
    assert summary["result/autoattack"] == mirrored.result["autoattack"]["accuracy"]
    assert summary["time/train"] == mirrored.result["seconds"]["train"]
    assert "seconds" not in summary  # it would mean two things
    artifacts = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    assert [(found.type, [entry.path for entry in found.manifest.contents]) for found in artifacts] == [
        ("model", ["student.pt"])
    ]


def test_the_mirrors_change_no_bit(mirrored, small):
    assert mirrored.result["student_sha256"] == small.expected[SCRIPTS[1]]["student_sha256"]
