"""Data: augmentation against a loop over images, the order of an epoch, every format, every way a file can be bad."""

import contextlib
import gc
import hashlib
import http.server
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

from experiment import UserError, compat, data
from experiment.data import as_float, augment, load_data
from experiment.data.arrays import Arrays, hold_out, reduce_side


def refusal(*args, **kwargs):
    """The one line with which load_data refuses."""
    with pytest.raises(UserError) as caught:
        load_data(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Augmentation


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


def test_the_middle_crop_is_the_image():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).to(torch.uint8)
    assert torch.equal(augment(images, 4, torch.full((2, 2), 4), None), images)
    assert torch.equal(augment(images, 4, torch.full((2, 2), 4), torch.ones(2, dtype=torch.int64)), images.flip(3))


def test_as_float_is_the_nearest_float32_to_each_fraction():
    levels = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([level / 255 for level in range(256)], dtype=torch.float64).float()
    assert torch.equal(as_float(levels), expected)
    assert levels.dtype == torch.uint8
    assert levels[255] == 255


# The batches of an epoch


def made(n=23, side=8, pad=4, flip=True):
    """Image i has label i, so that labels tell the order."""
    x = torch.randint(256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.Data("made", x, torch.arange(n), x[:2], torch.arange(2), n, pad, flip, "0" * 64)


def collect(batches):
    return [(x.clone(), y.clone(), first, total) for x, y, first, total in batches]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, z) and torch.equal(y, w) and rest == other
        for (x, y, *rest), (z, w, *other) in zip(a, b, strict=True)
    )


def test_the_same_seed_and_epoch_give_the_same_bits_and_no_others_do():
    images = made()
    state = torch.get_rng_state()
    epochs = {key: collect(images.batches(5, *key)) for key in [(0, 1), (0, 2), (1, 1), (1, 0), (12, 3), (1, 23)]}
    assert torch.equal(torch.get_rng_state(), state)  # generators of their own
    torch.manual_seed(99)
    for key, batches in epochs.items():
        assert same(collect(images.batches(5, *key)), batches)
    orders = {tuple(torch.cat([y for _, y, _, _ in batches]).tolist()) for batches in epochs.values()}
    assert len(orders) == len(epochs)


def test_x_is_the_augmented_image_of_y():
    images = made()
    seen = set()
    for x, y, _, _ in images.batches(5, 0, 1):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        for image, label in zip(x, y, strict=True):
            candidates = [
                (row, column, mirror)
                for row in range(9)
                for column in range(9)
                for mirror in (0, 1)
                if torch.equal(
                    image,
                    as_float(
                        slow_augment(
                            images.x_train[label][None], 4, torch.tensor([[row], [column]]), torch.tensor([mirror])
                        )[0]
                    ),
                )
            ]
            assert len(candidates) == 1
            seen.update(candidates)
    assert len(seen) > 15  # each image at an offset of its own


def test_all_offsets_and_both_directions_occur_equally_often():
    """Images with one bright pixel in the middle tell where they were moved to."""
    n, side = 8100, 9
    x = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    x[:, :, 4, 4] = 255
    images = data.Data("made", x, torch.arange(n), x[:2], torch.arange(2), n, 4, True, "0" * 64)
    (moved, _, _, _), *_ = images.batches(n, 0, 1)
    counts = (moved[:, 0] > 0).sum(dim=0)
    assert counts.sum() == n
    # 81 places with 100 images each on average: six standard deviations.
    assert counts.min() > 40
    assert counts.max() < 160
    x[:, :, 4, 5] = 128
    (moved, _, _, _), *_ = images.batches(n, 0, 1)
    bright = moved[:, 0].flatten(1).argmax(dim=1)
    inside = (bright % side > 0) & (bright % side < side - 1)
    right = moved[:, 0].flatten(1)[torch.arange(n), (bright + 1).clamp(max=side * side - 1)] > 0
    assert right[inside].float().mean().item() == pytest.approx(0.5, abs=0.05)  # 6,300 images: six deviations are 0.04


def test_no_pad_and_no_flip_leave_images_alone():
    images = made(pad=0, flip=False)
    for x, y, _, _ in images.batches(5, 0, 1):
        assert torch.equal(x, as_float(images.x_train[y]))


@pytest.mark.parametrize(("n", "batch", "sizes"), [(20, 5, [5] * 4), (23, 5, [5] * 4 + [3]), (4, 128, [4])])
def test_every_image_comes_once(n, batch, sizes):
    images = made(n)
    batches = collect(images.batches(batch, 0, 1))
    assert [len(y) for _, y, _, _ in batches] == sizes
    assert [(first, total) for *_, first, total in batches] == [(0, size) for size in sizes]
    assert torch.cat([y for _, y, _, _ in batches]).sort().values.tolist() == list(range(n))
    assert images.steps(batch) == len(sizes)


@pytest.mark.parametrize(("n", "batch", "sizes"), [(21, 5, [5] * 4), (129, 128, [128]), (22, 5, [5] * 4 + [2])])
def test_a_lone_last_image_is_left_out(n, batch, sizes):
    """BatchNorm cannot train on one; another image is left out in another epoch."""
    images = made(n)
    left_out = set()
    for epoch in range(1, 4):
        labels = [y for _, y, _, _ in images.batches(batch, 0, epoch)]
        assert [len(y) for y in labels] == sizes
        left_out |= set(range(n)) - set(torch.cat(labels).tolist())
    assert images.steps(batch) == len(sizes)
    assert (len(left_out) > 1) == (sum(sizes) < n)


@pytest.mark.parametrize("first", [0, 1, 3, 4, 5])
def test_an_epoch_entered_late_is_the_tail_of_the_whole(first):
    images = made()
    assert same(collect(images.batches(5, 3, 2, first=first)), collect(images.batches(5, 3, 2))[first:])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("first", [0, 2])
def test_ranks_together_hold_the_batch_of_one(world, first):
    images = made()
    whole = collect(images.batches(8, 0, 1, first=first))
    ranks = [collect(images.batches(8, 0, 1, first=first, rank=rank, world=world)) for rank in range(world)]
    for step, (x, y, _, total) in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([share[0] for share in shares]), x)
        assert torch.equal(torch.cat([share[1] for share in shares]), y)
        assert {share[3] for share in shares} == {total}
        begin = 0
        for share in shares:
            assert share[2] == begin
            begin += len(share[1])
        assert max(len(share[1]) for share in shares) - min(len(share[1]) for share in shares) <= 1
    assert all(len(rank) == len(whole) for rank in ranks)


# Digits


def test_digits_are_scikit_learns_split_once_and_for_all():
    from sklearn.datasets import load_digits

    digits = load_data("digits")
    assert digits.x_train.shape == (1437, 3, 8, 8)
    assert digits.x_test.shape == (360, 3, 8, 8)
    assert digits.y_train.shape == (1437,)
    assert (digits.num_classes, digits.name, digits.pad, digits.flip) == (10, "digits", 1, False)
    for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test)):
        assert x.dtype == torch.uint8
        assert y.dtype == torch.int64
        assert x.max() == 255
        assert x.min() == 0
        assert torch.equal(x[:, 0], x[:, 1])
        assert torch.equal(x[:, 0], x[:, 2])
    # Nothing lost, nothing twice: the two parts together are the whole set.
    source = load_digits()
    whole = sorted(
        (*np.round(image.ravel() * 255 / 16).astype(int).tolist(), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    )
    both = sorted(
        (*image[0].flatten().tolist(), label)
        for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test))
        for image, label in zip(x, y.tolist(), strict=True)
    )
    assert both == whole
    assert len(set(whole)) == 1797  # so that no image is in both parts
    # Stratified: a fifth of each class.
    for total, test in zip(np.bincount(source.target), digits.y_test.bincount().tolist(), strict=True):
        assert test == pytest.approx(total * 360 / 1797, abs=1)


def test_digits_are_the_same_every_time():
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_data("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second = load_data("digits")
    assert first.sha256 == second.sha256
    assert len(first.sha256) == 64
    assert torch.equal(first.x_test, second.x_test)
    assert torch.equal(first.y_train, second.y_train)


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
    np.savez(path, **content)
    return path


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i2"])
def test_npz_of_the_documented_format(tmp_path, dtype):
    content = arrays()
    content["y_train"], content["y_test"] = content["y_train"].astype(dtype), content["y_test"].astype(dtype)
    path = npz(tmp_path, content)
    loaded = load_data(str(path))
    assert (loaded.num_classes, loaded.name, loaded.pad, loaded.flip) == (3, str(path), 4, True)
    order = np.random.RandomState(0).permutation(4)
    assert loaded.test_order == "shuffled"
    assert torch.equal(loaded.x_train, torch.from_numpy(content["x_train"]).permute(0, 3, 1, 2))
    assert torch.equal(loaded.x_test, torch.from_numpy(content["x_test"][order]).permute(0, 3, 1, 2))
    assert loaded.x_train.dtype == torch.uint8
    assert loaded.x_train.is_contiguous()
    for labels, expected in ((loaded.y_train, content["y_train"]), (loaded.y_test, content["y_test"][order])):
        assert labels.dtype == torch.int64
        assert labels.tolist() == expected.tolist()


def test_compressed_npz_and_images_that_are_not_square(tmp_path):
    content = arrays()
    content["x_train"], content["x_test"] = np.zeros((12, 9, 11, 3), np.uint8), np.ones((4, 9, 11, 3), np.uint8)
    path = tmp_path / "images.npz"
    np.savez_compressed(path, **content)
    assert load_data(str(path)).x_train.shape == (12, 3, 9, 11)


def test_the_hash_is_that_of_the_arrays(tmp_path):
    content = arrays()
    before = load_data(str(npz(tmp_path, content))).sha256
    assert load_data(str(npz(tmp_path, content))).sha256 == before
    content["x_test"][0, 0, 0, 0] ^= 1
    assert load_data(str(npz(tmp_path, content))).sha256 != before


def test_the_test_set_of_a_sorted_file_is_shuffled_once_and_for_all(tmp_path):
    """The first N images, which AutoAttack takes, must be a sample of the classes."""
    content = arrays(n=40, classes=4) | {
        "x_test": np.zeros((400, 8, 8, 3), np.uint8),
        "y_test": np.repeat(range(4), 100),
    }
    content["x_test"][:, 0, 0, 0] = np.arange(400) % 256
    content["x_test"][:, 0, 0, 1] = np.arange(400) // 256
    path = str(npz(tmp_path, content))
    np.random.seed(1)
    first, second = load_data(path), load_data(path)
    assert torch.equal(first.x_test, second.x_test)
    assert first.y_test[:40].bincount(minlength=4).min() >= 4
    index = first.x_test[:, 0, 0, 0].int() + 256 * first.x_test[:, 1, 0, 0].int()
    assert index.sort().values.tolist() == list(range(400))  # all are there
    assert torch.equal(index // 100, first.y_test)  # each with its label


# What is done to a set when it is loaded: --side and --holdout


@given(st.sampled_from([(16, 8), (24, 8), (32, 16), (8, 8)]), st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_side_is_the_mean_of_whole_blocks_half_up(sides, seed):
    side, reduced = sides
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    labels = np.arange(2)
    found = reduce_side(Arrays(x, labels, x[::-1], labels, 2), reduced)
    k = side // reduced
    for n, row, column, channel in np.ndindex(2, reduced, reduced, 3):
        block = x[n, row * k : (row + 1) * k, column * k : (column + 1) * k, channel]
        assert found.x_train[n, row, column, channel] == (int(block.sum()) + k * k // 2) // (k * k)
    assert np.array_equal(found.x_test, found.x_train[::-1])
    assert found.x_train.dtype == np.uint8


@pytest.mark.parametrize(("side", "allowed"), [(7, "8, 16"), (32, "8, 16"), (12, "8, 16"), (4, "8, 16")])
def test_a_side_that_does_not_divide_is_refused(tmp_path, side, allowed):
    path = str(npz(tmp_path, arrays(side=16)))
    line = f"--side {side} is not allowed for images of 16 x 16 pixels; {allowed}"
    assert refusal(path, side=side) == line
    assert load_data(path, side=16).sha256 == load_data(path).sha256


def test_side_needs_square_images(tmp_path):
    content = arrays() | {"x_train": np.zeros((12, 16, 32, 3), np.uint8), "x_test": np.zeros((4, 16, 32, 3), np.uint8)}
    assert "as they are not square" in refusal(str(npz(tmp_path, content)), side=8)


@given(st.lists(st.integers(2, 40), min_size=2, max_size=6), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=40, deadline=None)
def test_holdout_has_the_classes_shares_and_loses_nothing(sizes, seed, draw):
    labels = np.random.default_rng(seed).permutation(np.repeat(range(len(sizes)), sizes))
    total = len(labels)
    count = draw.draw(st.integers(1, total // 3))
    x = np.zeros((total, 8, 8, 3), np.uint8)
    x[:, 0, 0, 0] = np.arange(total)  # at most 240
    whole = Arrays(x, labels, x, labels, len(sizes))
    held = hold_out(whole, count)
    assert np.array_equal(held.x_holdout, hold_out(whole, count).x_holdout)
    assert (len(held.y_holdout), len(held.y_train)) == (count, total - count)
    for images, found in ((held.x_holdout, held.y_holdout), (held.x_train, held.y_train)):
        index = images[:, 0, 0, 0]
        assert np.array_equal(found, labels[index])
        assert (np.diff(index.astype(int)) > 0).all()  # in the set's order
    everything = np.concatenate([held.x_holdout, held.x_train])[:, 0, 0, 0]
    assert sorted(everything) == list(range(total))
    for label, size in enumerate(sizes):
        assert abs((held.y_holdout == label).sum() - count * size / total) < 1
    assert held.x_test is whole.x_test


def test_a_holdout_that_empties_a_class_is_refused():
    assert "--holdout 1430 is not allowed with 1437 training images" in refusal("digits", holdout=1430)


def test_train_examples_are_drawn_in_the_classes_shares_and_always_the_same():
    whole, some = load_data("digits"), load_data("digits", train_examples=143)
    assert len(some.x_train) == len(some.y_train) == 143
    assert (143 * whole.y_train.bincount() / len(whole.y_train) - some.y_train.bincount()).abs().max() < 1
    assert torch.equal(some.x_train, load_data("digits", train_examples=143).x_train)
    stored = {
        (image.numpy().tobytes(), label) for image, label in zip(whole.x_train, whole.y_train.tolist(), strict=True)
    }
    assert {
        (image.numpy().tobytes(), label) for image, label in zip(some.x_train, some.y_train.tolist(), strict=True)
    } <= stored
    assert torch.equal(some.x_test, whole.x_test)
    assert some.sha256 != whole.sha256
    assert load_data("digits", train_examples=1437).sha256 == whole.sha256
    both = load_data("digits", train_examples=143, holdout=43)
    assert (len(both.x_train), len(both.x_holdout)) == (100, 43)


@pytest.mark.parametrize("count", [5, 1438])
def test_too_few_or_too_many_train_examples_are_refused(count):
    assert f"--train_examples {count} is not allowed with 1437 training images" in refusal(
        "digits", train_examples=count
    )


def test_side_and_holdout_are_in_the_hash_and_off_by_default():
    plain, held = load_data("digits"), load_data("digits", holdout=100)
    assert (len(plain.x_holdout), len(plain.y_holdout)) == (0, 0)
    assert plain.sha256 == load_data("digits", side=8).sha256 != held.sha256
    assert held.x_holdout.shape == (100, 3, 8, 8)
    assert held.y_holdout.bincount().tolist() == [10] * 10
    assert len(held.x_train) == 1337
    assert torch.equal(held.x_test, plain.x_test)


def test_class_names_tell_the_number_of_classes(tmp_path, capsys):
    """A sample of few images may lack a class; without the names the same file is refused."""
    content = arrays()
    path = npz(tmp_path, content | {"class_names": np.array(["cat", "dog", "fox"])})
    loaded = load_data(str(path))
    assert (loaded.num_classes, loaded.class_names) == (3, ("cat", "dog", "fox"))
    assert capsys.readouterr().err == ""
    path = npz(tmp_path, content | {"class_names": np.array([b"cat", b"dog", b"fox"])})
    assert load_data(str(path)).class_names == ("cat", "dog", "fox")
    path = npz(tmp_path, content | {"class_names": np.array(["cat", "dog", "fox", "owl", "rat"])})
    assert load_data(str(path)).num_classes == 5
    assert capsys.readouterr().err == f"warning: {path}: 2 of 5 classes have no training image\n"


def change(key, value):
    """A new value for one array, computed from the arrays."""
    return lambda content: content | {key: value(content)}


BAD = {
    "float images": (change("x_train", lambda c: c["x_train"] / 255), "x_train is float64; uint8"),
    "NaN images": (change("x_test", lambda c: np.full((4, 8, 8, 3), np.nan, np.float32)), "x_test is float32; uint8"),
    "int64 images": (change("x_test", lambda c: c["x_test"].astype(np.int64)), "x_test is int64; uint8"),
    "NCHW": (change("x_train", lambda c: c["x_train"].transpose(0, 3, 1, 2)), "x_train has shape (12, 3, 8, 8)"),
    "grey": (change("x_train", lambda c: c["x_train"][..., 0]), "x_train has shape (12, 8, 8); (N, H, W, 3)"),
    "one channel": (change("x_test", lambda c: c["x_test"][..., :1]), "x_test has shape (4, 8, 8, 1)"),
    "one number": (change("x_train", lambda c: np.uint8(3)), "x_train has shape ()"),
    "too small": (change("x_train", lambda c: c["x_train"][:, :7]), "of at least 8"),
    "float labels": (change("y_train", lambda c: c["y_train"].astype(float)), "y_train is float64; integers"),
    "NaN labels": (change("y_test", lambda c: np.full(4, np.nan)), "y_test is float64; integers"),
    "durations": (change("y_test", lambda c: c["y_test"].astype("m8[s]")), "integers are needed"),
    "bool labels": (change("y_train", lambda c: c["y_train"] > 0), "y_train is bool; integers"),
    "text labels": (change("y_train", lambda c: c["y_train"].astype(str)), "integers are needed"),
    "labels too few": (change("y_train", lambda c: c["y_train"][:-1]), "y_train has shape (11,); (12,)"),
    "labels too many": (change("y_test", lambda c: np.zeros(5, int)), "y_test has shape (5,); (4,)"),
    "one-hot labels": (change("y_train", lambda c: np.eye(3, dtype=int)[c["y_train"]]), "y_train has shape (12, 3)"),
    "one label": (change("y_train", lambda c: np.int64(1)), "y_train has shape ()"),
    "negative label": (change("y_train", lambda c: c["y_train"] - 1), "labels from -1 to 1; 0 up to"),
    "huge label": (change("y_test", lambda c: np.full(4, 2**63, np.uint64)), "0 up to 9999 are allowed"),
    "an empty class": (change("y_train", lambda c: c["y_train"] % 2 * 2), "no image of class 1; each class needs one"),
    "one class": (change("y_train", lambda c: c["y_train"] * 0), "no image of class 1"),
    "unknown test label": (change("y_test", lambda c: c["y_test"] + 1), "y_test has label 3; 0 to 2"),
    "no images": (lambda c: c | {"x_test": c["x_test"][:0], "y_test": c["y_test"][:0]}, "0 images; at least 2"),
    "one image": (lambda c: c | {"x_train": c["x_train"][:1], "y_train": c["y_train"][:1]}, "1 images; at least 2"),
    "two sizes": (change("x_test", lambda c: np.zeros((4, 9, 9, 3), np.uint8)), "they must be equal"),
    "object images": (change("x_train", lambda c: c["x_train"].astype(object)), "not a readable .npz of plain arrays"),
    "object labels": (change("y_test", lambda c: c["y_test"].astype(object)), "not a readable .npz of plain arrays"),
    "too few names": (change("class_names", lambda c: np.array(["a", "b"])), "class_names has shape (2,)"),
    "a lone name": (change("class_names", lambda c: np.array("abc")), "class_names has shape ()"),
    "object names": (change("class_names", lambda c: np.array(["a"] * 3, object)), "not a readable .npz"),
    "no labels": (lambda c: {k: v for k, v in c.items() if k != "y_test"}, "lacks y_test; needed are x_train, y_train"),
    "other names": (lambda c: {"images": c["x_train"]}, "lacks x_train, y_train, x_test, y_test"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused(case, tmp_path):
    spoil, expected = BAD[case]
    path = npz(tmp_path, spoil(arrays()))
    line = refusal(str(path))
    assert str(path) in line
    assert expected in line


def test_an_object_array_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'burst')!r}, 'w')",))

    path = npz(tmp_path, arrays() | {"y_test": np.array([Bomb()] * 4, dtype=object)})
    refusal(str(path))
    path = npz(tmp_path, arrays() | {"class_names": np.array([Bomb()] * 3, dtype=object)})
    refusal(str(path))
    assert not (tmp_path / "burst").exists()


def member(name, content=b""):
    """An .npz with the arrays, one of them replaced by these bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for key, value in (arrays() | {"class_names": np.array(["cat", "dog", "fox"])}).items():
            saved = io.BytesIO()
            np.save(saved, value)
            archive.writestr(f"{key}.npy", content if key == name else saved.getvalue())
    return stream.getvalue()


def saved():
    stream = io.BytesIO()
    np.savez(stream, **arrays())
    return stream.getvalue()


def with_header(header):
    """A member whose header says what it likes."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


FILES = {
    "empty": lambda: b"",
    "text": lambda: b"x_train, y_train\n1, 2\n",
    "a web page": lambda: b"<!DOCTYPE html><html>Sign in</html>",
    "truncated": lambda: saved()[: len(saved()) // 2],
    "without its end": lambda: saved()[:-10],
    "a flipped byte": lambda: flipped(saved(), 1000),
    "a pickle": lambda: pickle.dumps(arrays()),
    "a bare .npy": lambda: with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (0,), }"),
    "an empty member": lambda: member("x_train"),
    "a member that is no array": lambda: member("y_test", b"not an array at all"),
    "names that are no array": lambda: member("class_names", b"cat dog fox"),
    "a header without data": lambda: member(
        "x_train", with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 8, 8, 3), }")
    ),
    "a header of a petabyte": lambda: member(
        "x_train", with_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**40}, 32, 32, 3), }}")
    ),
    "a header of code": lambda: member("x_train", with_header("__import__('os').abort()")),
}


@pytest.mark.parametrize("case", FILES)
def test_unreadable_files_are_refused(case, tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(FILES[case]())
    line = refusal(str(path))
    assert f"{path} is not a readable .npz of plain arrays" in line
    assert len(line) < len(str(path)) + 200


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = npz(tmp_path, arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("padding.npy", b"")
        archive.infolist()[0].file_size = 2**45  # what the directory declares; a real one would be long in the making
    assert "would unpack to 32768 GiB; at most 16 are allowed" in refusal(str(path))


def test_a_missing_file_and_a_folder(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    for name in ("absent.npz", "folder.npz"):
        assert f"{name}: no such file" in refusal(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{name}: no such file"):
            data.check_dataset(str(tmp_path / name))


@pytest.mark.parametrize("name", ["cifar", "CIFAR100", "", "imagenet", "images.npy", "digits "])
def test_unknown_names_are_refused(name):
    line = refusal(name)
    allowed = "cifar100, cifar10, svhn, digits, the path of an .npz file, or a folder of images"
    assert line == f"--dataset {name!r} is not allowed; {allowed}"
    with pytest.raises(UserError) as caught:
        data.check_dataset(name)
    assert str(caught.value) == line


def test_known_names_pass_the_check(tmp_path):
    for name in ("cifar100", "cifar10", "svhn", "digits", str(npz(tmp_path, arrays()))):
        data.check_dataset(name)


# CIFAR

TRAINING = {"cifar100": ["train"], "cifar10": [f"data_batch_{i}" for i in range(1, 6)]}
TEST, META = {"cifar100": "test", "cifar10": "test_batch"}, {"cifar100": "meta", "cifar10": "batches.meta"}
PER_FILE = {"cifar100": 200, "cifar10": 20}


def batch_file(dataset, name, classes):
    """A file as the authors of CIFAR made them: rows of 3,072 bytes, red plane first, and a list of labels."""
    generator = np.random.default_rng(len(name) * 1000 + sum(name.encode()))
    n = PER_FILE[dataset]
    content = {"data": generator.integers(0, 256, (n, 3072), dtype=np.uint8), "batch_label": name, "filenames": []}
    labels = [i % classes for i in range(n)]
    if dataset == "cifar100":
        return content | {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
    return content | {"labels": labels}


class Source:
    """A small CIFAR: the folder's files, its archive, and torchvision told to take them for the real ones."""

    def __init__(self, dataset, monkeypatch):
        datasets = compat.import_torchvision().datasets
        self.kind = datasets.CIFAR100 if dataset == "cifar100" else datasets.CIFAR10
        classes = 100 if dataset == "cifar100" else 10
        self.train = [batch_file(dataset, name, classes) for name in TRAINING[dataset]]
        self.test = batch_file(dataset, TEST[dataset], classes)
        names = {self.kind.meta["key"]: [f"class {i}" for i in range(classes)]}
        contents = [
            *zip(TRAINING[dataset], self.train, strict=True),
            (TEST[dataset], self.test),
            (META[dataset], names),
        ]
        # Protocol 2 is what Python 2 wrote and torchvision reads.
        self.files = {name: pickle.dumps(content, protocol=2) for name, content in contents}
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            for name, content in self.files.items():
                entry = tarfile.TarInfo(f"{self.kind.base_folder}/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        self.archive = stream.getvalue()

        def md5(content):
            return hashlib.md5(content, usedforsecurity=False).hexdigest()

        monkeypatch.setattr(self.kind, "train_list", [[name, md5(self.files[name])] for name in TRAINING[dataset]])
        monkeypatch.setattr(self.kind, "test_list", [[TEST[dataset], md5(self.files[TEST[dataset]])]])
        meta = {**self.kind.meta, "md5": md5(self.files[META[dataset]])}
        monkeypatch.setattr(self.kind, "meta", meta)
        monkeypatch.setattr(self.kind, "tgz_md5", md5(self.archive))
        # A port that nobody listens at: no test may ask the real server.
        monkeypatch.setattr(self.kind, "url", f"http://127.0.0.1:{closed_port()}/{self.kind.filename}")

    def unpack(self, folder):
        (folder / self.kind.base_folder).mkdir()
        for name, content in self.files.items():
            (folder / self.kind.base_folder / name).write_bytes(content)

    def check(self, loaded):
        """Every image and label is the file's."""
        for x, y, parts in (
            (loaded.x_train, loaded.y_train, self.train),
            (loaded.x_test, loaded.y_test, [self.test]),
        ):
            assert torch.equal(x, torch.from_numpy(np.concatenate([p["data"] for p in parts])).view(-1, 3, 32, 32))
            assert y.tolist() == [label for p in parts for label in p.get("labels", p.get("fine_labels"))]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def source(monkeypatch):
    return Source("cifar100", monkeypatch)


@contextlib.contextmanager
def served(source, monkeypatch, answer):
    """A web server in a thread whose GET does what `answer` does with its handler."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            answer(self)

        def log_message(self, *args):
            """Stay quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(source.kind, "url", f"http://127.0.0.1:{server.server_port}/{source.kind.filename}")
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def reply(handler, body, length=None, kind="application/gzip"):
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_cifar_files_of_the_real_format(dataset, tmp_path, monkeypatch):
    source = Source(dataset, monkeypatch)
    source.unpack(tmp_path)
    loaded = load_data(dataset, str(tmp_path))
    source.check(loaded)
    assert (loaded.name, loaded.pad, loaded.flip) == (dataset, 4, True)
    assert loaded.num_classes == (100 if dataset == "cifar100" else 10)
    assert loaded.class_names == tuple(f"class {i}" for i in range(loaded.num_classes))
    assert loaded.test_order == "as stored"
    assert loaded.x_train.dtype == torch.uint8
    assert loaded.y_test.dtype == torch.int64


def test_an_archive_put_there_by_hand_is_unpacked(source, tmp_path, capsys):
    (tmp_path / source.kind.filename).write_bytes(source.archive)
    source.check(load_data("cifar100", str(tmp_path)))
    assert capsys.readouterr() == ("", "")


def test_a_good_archive_mends_a_damaged_folder(source, tmp_path):
    source.unpack(tmp_path)
    (tmp_path / source.kind.base_folder / "train").write_bytes(b"cut")
    (tmp_path / source.kind.filename).write_bytes(source.archive)
    source.check(load_data("cifar100", str(tmp_path)))


def test_download(source, tmp_path, monkeypatch, capsys):
    before = socket.getdefaulttimeout()
    with served(source, monkeypatch, lambda handler: reply(handler, source.archive)):
        source.check(load_data("cifar100", str(tmp_path / "deep" / "data")))
        assert capsys.readouterr() == (
            f"cifar100 is not in {tmp_path / 'deep' / 'data'}; downloading {source.kind.url}\n",
            "",
        )
    assert socket.getdefaulttimeout() == before
    source.check(load_data("cifar100", str(tmp_path / "deep" / "data")))  # and not once more


def test_what_a_killed_download_left_does_not_stop_the_next(source, tmp_path, monkeypatch):
    left = tmp_path / ".cifar100.part"
    left.mkdir()
    (left / source.kind.filename).write_bytes(source.archive[:100])
    (left / source.kind.base_folder).mkdir()
    with served(source, monkeypatch, lambda handler: reply(handler, source.archive)):
        source.check(load_data("cifar100", str(tmp_path)))
    assert not left.exists()


def test_several_processes_download_once(source, tmp_path, monkeypatch, capsys):
    """Threads here: the lock is held per open file. Every one gets the whole set, and one of them fetches it."""
    found = []
    with served(source, monkeypatch, lambda handler: reply(handler, source.archive)):
        threads = [
            threading.Thread(target=lambda: found.append(load_data("cifar100", str(tmp_path)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert capsys.readouterr().out.count("downloading") == 1
    assert len(found) == 3
    for loaded in found:
        source.check(loaded)


def check_no_download(source, folder):
    before = socket.getdefaulttimeout()
    line = refusal("cifar100", str(folder))
    archive = folder / source.kind.filename
    assert "cifar100 could not be downloaded (" in line
    assert line.endswith(f"; fetch {source.kind.url} in a browser and put it at {archive}")
    assert not archive.exists()
    assert socket.getdefaulttimeout() == before
    return line


def test_no_network(source, tmp_path):
    assert "refused" in check_no_download(source, tmp_path / "data")


ANSWERS = {
    "a web page": lambda handler: reply(handler, b"<!DOCTYPE html><html>Quota exceeded</html>", kind="text/html"),
    "nothing": lambda handler: reply(handler, b""),
    "half of it": lambda handler: reply(handler, bytes(50_000), length=100_000),
    "not found": lambda handler: handler.send_error(404),
    "not HTTP": lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a broken chunk": lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\ncut"
    ),
}


# After an answer that breaks HTTP, urllib leaves its socket to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_not_the_archive_is_refused_and_removed(answer, source, tmp_path, monkeypatch):
    with served(source, monkeypatch, ANSWERS[answer]):
        check_no_download(source, tmp_path)
    assert list(tmp_path.rglob("*.tar.gz*")) == []
    gc.collect()  # here, where the warning is expected


def test_a_damaged_archive_is_refused_and_left_in_place(source, tmp_path):
    archive = tmp_path / source.kind.filename
    archive.write_bytes(source.archive[:-100])
    line = refusal("cifar100", str(tmp_path))
    assert f"{archive} is damaged or incomplete" in line
    assert source.kind.url in line
    assert archive.read_bytes() == source.archive[:-100]


def test_a_damaged_folder_alone_asks_for_the_archive(source, tmp_path):
    source.unpack(tmp_path)
    damaged = tmp_path / source.kind.base_folder / "test"
    damaged.write_bytes(b"cut")
    assert f"{damaged.parent} is incomplete or altered (MD5), and " in check_no_download(source, tmp_path)
    assert damaged.read_bytes() == b"cut"


def test_an_altered_folder_beside_its_archive_is_kept_aside(source, tmp_path, capsys):
    """Somebody's noisy labels, perhaps: they are not CIFAR's, but not ours to delete."""
    source.unpack(tmp_path)
    for i in (1, 2):
        (tmp_path / source.kind.filename).write_bytes(source.archive)
        (tmp_path / source.kind.base_folder / "train").write_bytes(b"noisy")
        load_data("cifar100", str(tmp_path))
        kept = tmp_path / f"{source.kind.base_folder}.altered{i}"
        assert (kept / "train").read_bytes() == b"noisy"
        assert f"kept as {kept}" in capsys.readouterr().out


def test_a_data_dir_that_is_a_file(source, tmp_path):
    (tmp_path / "data").write_text("no folder")
    line = refusal("cifar100", str(tmp_path / "data"))
    assert str(tmp_path / "data") in line
    assert (tmp_path / "data").read_text() == "no folder"


# SVHN


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """Files of SVHN's format: images (32, 32, 3, N), labels (N, 1) from 1 to 10, where 10 is the digit 0."""
    from scipy.io import savemat

    kind = compat.import_torchvision().datasets.SVHN
    generator, entries, parts = np.random.default_rng(0), {}, {}
    for split, n in (("train", 20), ("test", 12)):
        x, y = generator.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), np.arange(n)[:, None] % 10 + 1
        name = f"{split}_32x32.mat"
        savemat(tmp_path / name, {"X": x, "y": y.astype(np.uint8)})
        digest = hashlib.md5((tmp_path / name).read_bytes(), usedforsecurity=False).hexdigest()
        entries[split] = [f"http://127.0.0.1:{closed_port()}/{name}", name, digest]
        parts[split] = (x.transpose(3, 2, 0, 1), y[:, 0] % 10)
    monkeypatch.setattr(kind, "split_list", entries)
    return parts


def test_svhn_files_of_the_real_format(svhn, tmp_path):
    loaded = load_data("svhn", str(tmp_path))
    (x, y), (x_test, y_test) = svhn["train"], svhn["test"]
    order = np.random.RandomState(0).permutation(len(y_test))
    assert torch.equal(loaded.x_train, torch.from_numpy(x))
    assert loaded.y_train.tolist() == y.tolist()
    assert torch.equal(loaded.x_test, torch.from_numpy(x_test[order]))
    assert loaded.y_test.tolist() == y_test[order].tolist()
    assert (loaded.num_classes, loaded.flip, loaded.pad, loaded.class_names[9]) == (10, False, 4, "9")


def test_svhn_that_is_damaged_or_absent(svhn, tmp_path):
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is damaged or incomplete" in refusal("svhn", str(tmp_path))
    file.unlink()
    line = refusal("svhn", str(tmp_path))
    assert "svhn could not be downloaded (" in line
    assert line.endswith(f"put it at {file}")
    assert [path.name for path in tmp_path.glob("*.mat")] == ["train_32x32.mat"]


# Folders of images


def image(path, value, size=(8, 8), mode="RGB"):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


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
    assert (loaded.test_order, loaded.pad, loaded.flip) == ("shuffled", 4, True)
    (folder / "val").rename(folder / "test")
    image(folder / "train" / "cat" / "0.png", 5, mode="L")  # grey
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


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_8_bits_are_refused(folder, mode):
    """Converted as they are, nearly all of their pixels would be white."""
    from PIL import Image

    name, format = ("deep.png", "PNG") if mode != "F" else ("deep.jpg", "TIFF")
    Image.new(mode, (8, 8), 300).save(folder / "train" / "cat" / name, format)
    assert f"{name} has pixels of more than 8 bits (mode {mode}" in refusal(str(folder))


def test_folders_that_are_no_data_set(folder, tmp_path):
    def line():
        return refusal(str(folder))

    (tmp_path / "empty").mkdir()
    assert "needs train/ and test/ or val/" in refusal(str(tmp_path / "empty"))
    image(folder / "val" / "dog" / "2.png", 0, (8, 9))
    assert "2.png is (9, 8), others are (8, 8); equal sizes are needed" in line()
    (folder / "val" / "dog" / "2.png").write_bytes(b"no image")
    assert "2.png cannot be read as an image (UnidentifiedImageError)" in line()
    (folder / "val" / "dog" / "2.png").unlink()
    image(folder / "val" / "fox" / "0.png", 0)
    assert "has the class 'fox', which" in line()
    (folder / "val" / "fox" / "0.png").rename(folder / "train" / "cat" / "9.png")
    (folder / "train" / "ant").mkdir()
    assert f"{folder / 'train' / 'ant'} holds no image; each class needs one" in line()
