"""Data: augmentation against a loop over images, the order of an epoch, every format, every way a file can be bad."""

import contextlib
import gc
import hashlib
import io
import pickle
import socket
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from web_server import served

from experiment import UserError, compat, data, files
from experiment.data import as_float, augment, load_data


def error_of(*args, **kwargs):
    """The one line of load_data's error."""
    with pytest.raises(UserError) as caught:
        load_data(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Augmentation and the batches of an epoch


def slow_augment(images, pad, shift, mirror):
    out = []
    for i, image in enumerate(images.numpy()):
        channels, height, width = image.shape
        padded = np.zeros((channels, height + 2 * pad, width + 2 * pad), np.uint8)
        padded[:, pad : pad + height, pad : pad + width] = image
        row, column = shift[0, i].item(), shift[1, i].item()
        crop = padded[:, row : row + height, column : column + width]
        out.append(crop[:, :, ::-1] if mirror is not None and mirror[i] else crop)
    return torch.from_numpy(np.stack(out))


@given(
    st.integers(1, 5), st.sampled_from([1, 3]), st.integers(3, 9), st.integers(3, 9), st.integers(0, 4), st.integers()
)
@settings(max_examples=60, deadline=None)
def test_augment_equals_a_loop_over_images(n, channels, height, width, pad, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    images = torch.randint(256, (n, channels, height, width), generator=generator, dtype=torch.uint8)
    shift = torch.randint(2 * pad + 1, (2, n), generator=generator)
    for mirror in (None, torch.randint(2, (n,), generator=generator)):
        out = augment(images, pad, shift, mirror)
        assert out.dtype == torch.uint8
        assert torch.equal(out, slow_augment(images, pad, shift, mirror))


def test_as_float_is_the_nearest_float32_to_each_fraction():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([level / 255 for level in range(256)], dtype=torch.float64).float()
    assert torch.equal(as_float(levels), expected)
    assert levels[255] == 255


def random_data(n=23, pad=4, flip=True):
    """Image i has label i, so that labels show the order."""
    x = torch.randint(256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.Data("random", x, torch.arange(n), x[:2], torch.arange(2), n, pad, flip, "0" * 64)


def identical(batches, others):
    return all(
        torch.equal(x, z) and torch.equal(y, w) and rest == other
        for (x, y, *rest), (z, w, *other) in zip(batches, others, strict=True)
    )


def test_batches_depend_on_seed_and_epoch_only():
    images = random_data()
    state = torch.get_rng_state()
    epochs = {key: list(images.batches(5, *key)) for key in [(0, 1), (0, 2), (1, 1), (1, 0), (12, 3), (1, 23)]}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for key, batches in epochs.items():
        assert identical(images.batches(5, *key), batches)
    orders = {tuple(torch.cat([y for _, y, _, _ in batches]).tolist()) for batches in epochs.values()}
    assert len(orders) == len(epochs)


def test_crops_and_flips_are_those_of_the_labelled_image_and_all_occur():
    images = random_data(800)
    places = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    seen = torch.zeros(len(places))
    ((x, y, _, _),) = images.batches(800, 0, 1)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    for image, label in zip(x, y, strict=True):
        repeated = images.x_train[label].expand(len(places), -1, -1, -1)
        candidates = as_float(augment(repeated, 4, places[:, :2].T, places[:, 2]))
        found = (candidates == image).flatten(1).all(dim=1)
        assert found.sum() == 1
        seen += found
    # Each direction 400 times and each offset 89 times on average, within six standard deviations.
    assert abs(seen.view(81, 2).sum(dim=0)[0] - 400) < 85
    for counts in (seen.view(9, 9, 2).sum(dim=(1, 2)), seen.view(9, 9, 2).sum(dim=(0, 2))):
        assert ((counts - 89).abs() < 54).all()
    plain = random_data(pad=0, flip=False)
    for x, y, _, _ in plain.batches(5, 0, 1):
        assert torch.equal(x, as_float(plain.x_train[y]))


@pytest.mark.parametrize(
    ("n", "sizes"), [(20, [5] * 4), (23, [5] * 4 + [3]), (4, [4]), (21, [5] * 4), (22, [5] * 4 + [2])]
)
def test_every_image_comes_once_but_for_a_lone_last_one(n, sizes):
    """BatchNorm cannot train on one image; another one is left out in another epoch."""
    images, left_out = random_data(n), set()
    assert images.steps(5) == len(sizes)
    for epoch in range(1, 4):
        batches = list(images.batches(5, 0, epoch))
        assert [(first, total) for *_, first, total in batches] == [(0, size) for size in sizes]
        labels = torch.cat([y for _, y, _, _ in batches]).tolist()
        assert len(labels) == len(set(labels)) == sum(sizes)
        left_out |= set(range(n)) - set(labels)
    assert (len(left_out) > 1) == (sum(sizes) < n)


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_an_epoch_resumed_is_the_rest_of_the_whole(first):
    images = random_data()
    assert identical(list(images.batches(5, 3, 2, first=first)), list(images.batches(5, 3, 2))[first:])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 2])
def test_shares_of_the_ranks_make_up_the_batch(world, first):
    images = random_data()
    whole = images.batches(8, 0, 1, first=first)
    ranks = [images.batches(8, 0, 1, first=first, rank=rank, world=world) for rank in range(world)]
    for (x, y, _, total), *shares in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), x)
        assert torch.equal(torch.cat([share[1] for share in shares]), y)
        sizes = [len(share[1]) for share in shares]
        assert [share[2:] for share in shares] == [(sum(sizes[:rank]), total) for rank in range(world)]
        assert max(sizes) - min(sizes) <= 1


# Digits, and what --side, --train_examples and --holdout make of them


def rows(x, y):
    """Every image with its label, as something that can be compared and counted."""
    return sorted((image.numpy().tobytes(), label) for image, label in zip(x, y.tolist(), strict=True))


def test_digits_are_the_same_in_every_version_of_scikit_learn():
    torch.manual_seed(1)
    np.random.seed(1)
    digits = load_data("digits")
    assert digits.sha256 == "30937357f2f9d82f36d5db43a214cd2ae5e1d99f5909b82315547be2f09ce23c"  # of every run on them
    assert (digits.x_train.shape, digits.x_test.shape) == ((1437, 3, 8, 8), (360, 3, 8, 8))
    assert (digits.num_classes, digits.pad, digits.flip) == (10, 1, False)
    assert (digits.y_test.bincount() - digits.y_train.bincount() * 360 / 1437).abs().max() <= 1


def test_subsets_are_stratified_and_fixed():
    whole, some = load_data("digits"), load_data("digits", train_examples=143)
    held, both = load_data("digits", holdout=100), load_data("digits", train_examples=143, holdout=43)
    for labels, source, count in ((some.y_train, whole, 143), (held.y_holdout, whole, 100), (both.y_holdout, some, 43)):
        sizes = source.y_train.bincount()
        assert len(labels) == count
        assert (labels.bincount() - count * sizes / sizes.sum()).abs().max() < 1
    assert set(rows(some.x_train, some.y_train)) < set(rows(whole.x_train, whole.y_train))
    for part, source in ((held, whole), (both, some)):
        x, y = torch.cat([part.x_train, part.x_holdout]), torch.cat([part.y_train, part.y_holdout])
        assert rows(x, y) == rows(source.x_train, source.y_train)
        assert torch.equal(part.x_test, whole.x_test)
    # As in the config.json of runs.
    assert [each.sha256[:12] for each in (held, both)] == ["478ae30410ed", "0f9d7cebf98a"]
    assert load_data("digits", train_examples=1437, side=8).sha256 == whole.sha256
    assert len(whole.x_holdout) == len(whole.y_holdout) == 0


@pytest.mark.parametrize(("flag", "count"), [("holdout", 1430), ("train_examples", 5), ("train_examples", 1438)])
def test_a_subset_that_loses_a_class_is_an_error(flag, count):
    assert f"--{flag} {count} is not possible with 1437 training images" in error_of("digits", **{flag: count})


# .npz files


def arrays(n=12, side=8, classes=3):
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        "y_train": np.arange(n) % classes,
        "x_test": generator.integers(0, 256, (4, side, side, 3), dtype=np.uint8),
        "y_test": np.arange(4) % classes,
    }


def npz(tmp_path, content):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, **content)
    return str(path)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i2"])
def test_npz_of_the_documented_format(tmp_path, dtype):
    content = arrays() | {"x_train": np.zeros((12, 9, 11, 3), np.uint8), "x_test": np.zeros((4, 9, 11, 3), np.uint8)}
    content["x_train"][:, 2, 3, 1] = range(12)
    content |= {name: content[name].astype(dtype) for name in ("y_train", "y_test")}
    path = npz(tmp_path, content)
    loaded = load_data(path)
    assert (loaded.name, loaded.num_classes, loaded.class_names) == (path, 3, None)
    assert (loaded.pad, loaded.flip) == (4, True)
    assert torch.equal(loaded.x_train, torch.from_numpy(content["x_train"]).permute(0, 3, 1, 2))
    assert loaded.x_train.is_contiguous()
    assert loaded.y_train.dtype == torch.int64
    assert loaded.y_train.tolist() == content["y_train"].tolist()
    content["x_test"][0, 0, 0, 0] ^= 1
    assert load_data(npz(tmp_path, content)).sha256 != loaded.sha256


def test_the_test_set_of_a_sorted_file_is_shuffled_with_a_fixed_seed(tmp_path):
    """The first N images, which AutoAttack takes, must be a sample of the classes."""
    x, y = np.zeros((400, 8, 8, 3), np.uint8), np.repeat(range(4), 100)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = np.arange(400) % 256, np.arange(400) // 256
    np.random.seed(1)
    loaded = load_data(npz(tmp_path, arrays(n=40, classes=4) | {"x_test": x, "y_test": y}))
    index = loaded.x_test[:, 0, 0, 0].int() + 256 * loaded.x_test[:, 1, 0, 0].int()
    assert index.tolist() == np.random.RandomState(0).permutation(400).tolist()
    assert torch.equal(index // 100, loaded.y_test)
    assert loaded.y_test[:40].bincount(minlength=4).min() >= 4


@pytest.mark.parametrize(("side", "reduced"), [(16, 8), (24, 8), (32, 16), (27, 9)])
def test_side_is_the_mean_of_whole_blocks_half_up(tmp_path, side, reduced):
    content = arrays(side=side)
    loaded, block = load_data(npz(tmp_path, content), side=reduced), side // reduced
    means = content["x_train"].reshape(12, reduced, block, reduced, block, 3).mean(axis=(2, 4))
    assert torch.equal(loaded.x_train, torch.from_numpy(np.floor(means + 0.5)).permute(0, 3, 1, 2).byte())
    assert loaded.x_test.shape == (4, 3, reduced, reduced)


@pytest.mark.parametrize("side", [4, 7, 12, 32])
def test_a_side_that_does_not_divide_is_an_error(tmp_path, side):
    assert f"--side {side} is not possible for images of 16 x 16" in error_of(npz(tmp_path, arrays(side=16)), side=side)
    wide = {f"x_{split}": np.zeros((4, 16, 32, 3), np.uint8) for split in ("train", "test")}
    wide |= {"y_train": np.array([0, 1, 0, 1]), "y_test": np.array([0, 1, 0, 1])}
    assert "images of 16 x 32 pixels (expected square images" in error_of(npz(tmp_path, wide), side=side)


def test_class_names_give_the_number_of_classes(tmp_path):
    """A sample of few images may lack a class; without the names the same file is an error."""
    for names in (["cat", "dog", "fox"], [b"cat", b"dog", b"fox"]):
        loaded = load_data(npz(tmp_path, arrays() | {"class_names": np.array(names)}))
        assert (loaded.num_classes, loaded.class_names) == (3, ("cat", "dog", "fox"))
    path = npz(tmp_path, arrays() | {"class_names": np.array(["cat", "dog", "fox", "owl", "rat"])})
    assert load_data(path).num_classes == 5


def change(key, value):
    """A new value for one array, computed from the arrays."""
    return lambda content: content | {key: value(content)}


BAD = {
    "NaN images": (change("x_test", lambda c: np.full((4, 8, 8, 3), np.nan)), "x_test is float64; expected uint8"),
    "NCHW": (change("x_train", lambda c: c["x_train"].transpose(0, 3, 1, 2)), "x_train has shape (12, 3, 8, 8)"),
    "one number": (change("x_train", lambda c: np.uint8(3)), "x_train has shape ()"),
    "too small": (change("x_train", lambda c: c["x_train"][:, :7]), "of at least 8"),
    "float labels": (change("y_train", lambda c: c["y_train"].astype(float)), "y_train is float64; expected integers"),
    "durations": (change("y_test", lambda c: c["y_test"].astype("m8[s]")), "expected integers"),
    "too few labels": (change("y_train", lambda c: c["y_train"][:-1]), "y_train has shape (11,); expected (12,)"),
    "negative label": (change("y_train", lambda c: c["y_train"] - 1), "labels from -1 to 1; expected 0 to"),
    "huge label": (change("y_test", lambda c: np.full(4, 2**63, np.uint64)), "expected 0 to 9999"),
    "empty class": (change("y_train", lambda c: c["y_train"] % 2 * 2), "y_train has no image of class 1"),
    "one class": (change("y_train", lambda c: c["y_train"] * 0), "there are 1 classes; expected at least 2"),
    "unknown test label": (change("y_test", lambda c: c["y_test"] + 1), "y_test has label 3; expected 0 to 2"),
    "no images": (lambda c: c | {"x_test": c["x_test"][:0], "y_test": c["y_test"][:0]}, "x_test has 0 images"),
    "two sizes": (change("x_test", lambda c: np.zeros((4, 9, 9, 3), np.uint8)), "(8, 8, 3) in x_train and (9, 9, 3)"),
    "too few names": (change("class_names", lambda c: np.array(["a", "b"])), "y_train has label 2; expected 0 to 1"),
    "a lone name": (change("class_names", lambda c: np.array("abc")), "class_names has shape ()"),
    "no labels": (
        lambda c: {k: v for k, v in c.items() if k != "y_test"},
        "has no y_test; expected the arrays",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_an_error(case, tmp_path):
    spoil, expected = BAD[case]
    path = npz(tmp_path, spoil(arrays()))
    line = error_of(path)
    assert path in line
    assert expected in line


def member(key, content):
    """An .npz with the arrays, one of them replaced by these bytes."""
    stream = io.BytesIO()
    np.savez(stream, **{name: value for name, value in arrays().items() if name != key})
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(f"{key}.npy", content)
    return stream.getvalue()


class Bomb:
    def __reduce__(self):
        return exec, ("open('burst', 'w')",)


def objects(key):
    stream = io.BytesIO()
    np.savez(stream, **arrays() | {key: np.array([Bomb()] * 4, dtype=object)})
    return stream.getvalue()


FILES = {
    "a web page": b"<!DOCTYPE html><html>Sign in</html>",
    "truncated": member("class_names", b"")[:-1000],
    "a pickle": pickle.dumps(Bomb()),
    "pickled labels": objects("y_test"),
    "pickled names": objects("class_names"),
    "an empty member": member("x_train", b""),
    "a member that is not an array": member("y_test", b"not an array at all"),
    "names that are not an array": member("class_names", b"cat dog fox"),
}
"""Further ones are among the faults."""


@pytest.mark.parametrize("case", FILES)
def test_unreadable_files_are_an_error_and_run_no_code(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "images.npz"
    path.write_bytes(FILES[case])
    line = error_of(str(path))
    assert f"{path} is not a readable .npz of plain arrays" in line
    assert len(line) < len(str(path)) + 200
    assert not (tmp_path / "burst").exists()


@pytest.mark.parametrize(
    "name", ["cifar", "CIFAR100", "", "images.npy", "digits ", "absent.npz", "folder.npz", "x" * 999]
)
def test_unknown_names_are_an_error_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    line = error_of(name)
    allowed = "cifar100, cifar10, svhn, digits, a .npz file or a folder of images"
    npz_line = f"--dataset {name}: no such file"
    assert line == (npz_line if name.endswith(".npz") else f"--dataset {name!r} is not allowed; expected {allowed}")
    with pytest.raises(UserError) as caught:
        data.check_dataset(name)
    assert str(caught.value) == line


# torchvision's sets

FILES_OF = {
    "cifar100": (["train"], "test", "meta", 100, "fine_labels"),
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", 10, "labels"),
}


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Source:
    """A small CIFAR: the folder's files and its archive, patched into torchvision in place of the real ones."""

    def __init__(self, dataset, monkeypatch):
        datasets = compat.import_torchvision().datasets
        self.kind = datasets.CIFAR100 if dataset == "cifar100" else datasets.CIFAR10
        names, test, meta, self.classes, self.key = FILES_OF[dataset]
        # As the authors of CIFAR made them: rows of 3,072 bytes, red plane first, and a list of labels.
        labels, generator = [i % self.classes for i in range(2 * self.classes)], np.random.default_rng(0)
        self.parts = [
            {"data": generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8), self.key: labels}
            for _ in (*names, test)
        ]
        contents = [*self.parts, {self.kind.meta["key"]: [f"class {i}" for i in range(self.classes)]}]
        # Protocol 2 is what Python 2 wrote and torchvision reads.
        pickles = [pickle.dumps(content, protocol=2) for content in contents]
        self.files = dict(zip((*names, test, meta), pickles, strict=True))
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for name, content in self.files.items():
                entry = tarfile.TarInfo(f"{self.kind.base_folder}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        self.archive = stream.getvalue()
        with socket.socket() as probe:  # a port without a server: no test may contact the real one
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}/{self.kind.filename}"
        for attribute, value in {
            "train_list": [[name, md5(self.files[name])] for name in names],
            "test_list": [[test, md5(self.files[test])]],
            "meta": {**self.kind.meta, "md5": md5(self.files[meta])},
            "tgz_md5": md5(self.archive),
            "url": url,
        }.items():
            monkeypatch.setattr(self.kind, attribute, value)

    def unpack(self, folder):
        (folder / self.kind.base_folder).mkdir()
        for name, content in self.files.items():
            (folder / self.kind.base_folder / name).write_bytes(content)

    def check(self, loaded):
        """Every image and label is the file's, in its order."""
        *train, test = self.parts
        for x, y, parts in ((loaded.x_train, loaded.y_train, train), (loaded.x_test, loaded.y_test, [test])):
            assert torch.equal(x, torch.from_numpy(np.concatenate([p["data"] for p in parts])).view(-1, 3, 32, 32))
            assert y.tolist() == [label for part in parts for label in part[self.key]]


@pytest.fixture
def source(monkeypatch):
    return Source("cifar100", monkeypatch)


@contextlib.contextmanager
def serving(source, monkeypatch, answer):
    """A server from which the source's archive is downloaded."""
    with served(answer) as server:
        url = f"http://127.0.0.1:{server.server_port}/{source.kind.filename}"
        monkeypatch.setattr(source.kind, "url", url)
        yield server


@pytest.mark.parametrize("dataset", FILES_OF)
def test_cifar_files_of_the_real_format(dataset, tmp_path, monkeypatch, capsys):
    source = Source(dataset, monkeypatch)
    source.unpack(tmp_path)
    loaded = load_data(dataset, str(tmp_path))
    source.check(loaded)
    assert (loaded.name, loaded.pad, loaded.flip) == (dataset, 4, True)
    assert loaded.class_names == tuple(f"class {i}" for i in range(source.classes))
    assert capsys.readouterr() == ("", "")


def test_several_processes_download_once(source, tmp_path, monkeypatch, capsys):
    """Threads instead of processes: the lock is held per open file."""
    folder, found = tmp_path / "deep" / "data", []
    with serving(source, monkeypatch, lambda handler: handler.reply(source.archive)):
        threads = [threading.Thread(target=lambda: found.append(load_data("cifar100", str(folder)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    line = f"{folder / source.kind.filename} is missing; downloading {source.kind.url}\n"
    assert capsys.readouterr() == (line, "")
    assert {path.name for path in folder.iterdir()} - {".cifar100.lock"} == {
        source.kind.filename,
        source.kind.base_folder,
    }
    for loaded in (*found, load_data("cifar100", str(folder))):
        source.check(loaded)
    assert len(found) == 3


def failed_download(source, folder):
    line, archive = error_of("cifar100", str(folder)), folder / source.kind.filename
    assert f"{archive} is missing and could not be downloaded (" in line
    assert line.endswith(f"; download {source.kind.url} in a browser and save it as {archive}")
    assert {path.name for path in folder.iterdir()} <= {".cifar100.lock"}
    return line


ANSWERS = {
    "MD5 of the download": lambda handler: handler.reply(b"<!DOCTYPE html><html>Quota</html>"),
    "404": lambda handler: handler.send_error(404),
    "SSH": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "IncompleteRead": lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\ncut"
    ),
    "timed out": lambda handler: handler.wait(),
}


# After an answer that breaks HTTP, urllib leaves its socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_failed_downloads_leave_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS_OF_SILENCE", 0.5)
    with serving(source, monkeypatch, None) as server:
        for reason, server.answer in ANSWERS.items():
            assert reason in failed_download(source, tmp_path)
    assert "refused" in failed_download(source, tmp_path)  # the server is closed
    gc.collect()  # within the filter of warnings


def test_an_archive_is_unpacked_and_an_altered_folder_left_in_place(source, tmp_path, capsys):
    """It may contain a user's noisy labels, which must not be deleted."""
    (tmp_path / source.kind.filename).write_bytes(source.archive)
    source.check(load_data("cifar100", str(tmp_path)))
    assert capsys.readouterr() == ("", "")
    altered = tmp_path / source.kind.base_folder / "train"
    altered.write_bytes(b"noisy")
    assert f"{altered.parent} is incomplete or altered (MD5); move it away" in error_of("cifar100", str(tmp_path))
    assert altered.read_bytes() == b"noisy"


def test_a_data_dir_that_is_a_file(source, tmp_path):
    (tmp_path / "data").write_text("no folder")
    line = error_of("cifar100", str(tmp_path / "data"))
    assert line.startswith(f"cannot write to {tmp_path / 'data'}: ")
    assert line.endswith("choose another --data_dir")
    assert (tmp_path / "data").read_text() == "no folder"


def test_svhn_in_its_real_format_damaged_and_missing(tmp_path, monkeypatch):
    """Images (32, 32, 3, N), labels (N, 1) from 1 to 10, where 10 is the digit 0."""
    from scipy.io import savemat

    entries, parts, order = {}, {}, np.random.RandomState(0).permutation(12)
    for split, n in (("train", 20), ("test", 12)):
        x, y = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), dtype=np.uint8), np.arange(n) % 10 + 1
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": x, "y": y.astype(np.uint8)[:, None]})
        entries[split] = ["http://127.0.0.1:1/file", file.name, md5(file.read_bytes())]
        parts[split] = (torch.from_numpy(x.transpose(3, 2, 0, 1).copy()), torch.from_numpy(y % 10))
    monkeypatch.setattr(compat.import_torchvision().datasets.SVHN, "split_list", entries)
    loaded = load_data("svhn", str(tmp_path))
    assert torch.equal(loaded.x_train, parts["train"][0])
    assert torch.equal(loaded.y_train, parts["train"][1])
    assert torch.equal(loaded.x_test, parts["test"][0][order])
    assert torch.equal(loaded.y_test, parts["test"][1][order])
    assert (loaded.num_classes, loaded.flip, loaded.pad, loaded.class_names[9]) == (10, False, 4, "9")
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is damaged or incomplete" in error_of("svhn", str(tmp_path))
    file.unlink()
    line = error_of("svhn", str(tmp_path))
    assert f"{file} is missing and could not be downloaded (" in line
    assert line.endswith(f"save it as {file}")


# Folders of images


def image(path, value, size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes; PNG, for which the pixels are the file's."""
    for split, n in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(n):
                image(tmp_path / "set" / split / name / f"{i}.png", (100 * label + i, n, 7))
    return tmp_path / "set"


def test_a_folder_of_images(folder):
    loaded = load_data(str(folder))
    assert loaded.class_names == ("cat", "dog")
    assert loaded.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.x_train[:, :, 3, 3].tolist() == [[100 * label + i, 3, 7] for label in (0, 1) for i in range(3)]
    assert sorted(loaded.x_test[:, 0, 0, 0].tolist()) == [0, 1, 100, 101]
    assert torch.equal(loaded.y_test, loaded.x_test[:, 0, 0, 0] // 100)
    assert (loaded.pad, loaded.flip) == (4, True)
    (folder / "val").rename(folder / "test")
    image(folder / "train" / "cat" / "0.png", 5, mode="L")
    assert load_data(str(folder)).x_train[0, :, 0, 0].tolist() == [5, 5, 5]


def test_tiny_imagenets_layout(tmp_path):
    for label, name in enumerate(("n01", "n02")):
        for i in range(2):
            image(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * label + 40, (64, 64), "L")
    rows = [("val_0.JPEG", "n02", 140), ("val_1.JPEG", "n01", 40), ("val_2.JPEG", "n02", 140)]
    for name, _, value in rows:
        image(tmp_path / "val" / "images" / name, value, (64, 64), "L")
    table = "".join(f"{name}\t{label}\t0\t0\t62\t62\n" for name, label, _ in rows)
    (tmp_path / "val" / "val_annotations.txt").write_text(table)
    (tmp_path / "train" / "n01" / "n01_boxes.txt").write_text("")
    image(tmp_path / "test" / "images" / "test_0.JPEG", 40, (64, 64), "L")  # without labels
    loaded = load_data(str(tmp_path), side=32)
    assert loaded.x_train.shape == (4, 3, 32, 32)
    assert loaded.y_train.tolist() == [0, 0, 1, 1]
    assert ((loaded.x_test[:, 0, 5, 5] > 90).long()).tolist() == loaded.y_test.tolist()


BAD_FOLDERS = {
    "2.png is (9, 8), others are (8, 8); expected equal sizes": lambda f: image(f / "val/dog/2.png", 0, (8, 9)),
    "2.png cannot be read as an image (UnidentifiedImageError)": lambda f: (f / "val/dog/2.png").write_text("no"),
    "has the class 'fox', which": lambda f: image(f / "val/fox/0.png", 0),
    "ant has no image; each class needs one": lambda f: (f / "train/ant").mkdir(),
    "expected train/ and test/ or val/": lambda f: (f / "val").rename(f / "elsewhere"),
    "val has no image (.png, .jpg, .jpeg)": lambda f: [path.unlink() for path in f.glob("val/*/*")],
    # Converted, nearly all of their pixels would be white.
    "16.png has pixels of more than 8 bits (mode I;16)": lambda f: image(f / "train/cat/16.png", 300, mode="I;16"),
    "f.jpg has pixels of more than 8 bits (mode F)": lambda f: image(f / "val/cat/f.jpg", 9, mode="F", format="TIFF"),
}


@pytest.mark.parametrize("line", BAD_FOLDERS)
def test_bad_folders_are_an_error(line, folder):
    BAD_FOLDERS[line](folder)
    assert line in error_of(str(folder))
