"""Image folders found in practice: without a test set, with stray files, unusual names or damaged images."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import image_folder
from training.data import load_image_set
from training.image_set import DataError, ImageSet

NAMES = ["crème brûlée", "two words", "новый год"]


def save(path: Path, colour: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Only class folders, with 10, 15 and 3 images, each of a different colour."""
    root = tmp_path / "mine"
    for label, (name, n_images) in enumerate(zip(NAMES, (10, 15, 3), strict=True)):
        for i in range(n_images):
            save(root / name / f"picture {i}.png", colour=50 * label + i)
    return root


def colours(images: np.ndarray) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def read(root: Path) -> ImageSet:
    return load_image_set(root, image_size_px=8)


def test_a_fifth_of_every_class_becomes_the_test_set_if_there_is_none(classes: Path) -> None:
    images = read(classes)
    assert images.class_names == NAMES
    assert np.bincount(images.test_labels, minlength=3).tolist() == [2, 3, 0]
    assert np.bincount(images.train_labels, minlength=3).tolist() == [8, 12, 3]
    everything = [50 * label + i for label, n in enumerate((10, 15, 3)) for i in range(n)]
    assert sorted(colours(images.train_images) + colours(images.test_images)) == everything
    assert images.train_labels.tolist() == [colour // 50 for colour in colours(images.train_images)]
    assert images.notes == (
        "mine has no train/ and val/: 5 of its 28 images, a fifth of every class, are set aside as test images",
    )


def test_the_test_set_is_reproducible_and_stable_as_classes_grow(classes: Path) -> None:
    before = read(classes)
    assert colours(before.test_images) == colours(read(classes).test_images)
    save(classes / NAMES[0] / "picture 10.png", colour=10)
    after = read(classes)
    assert len(set(colours(before.test_images)) & set(colours(after.test_images))) >= 4
    assert before.sha256 != after.sha256


def test_the_digest_depends_on_file_names_and_not_on_times(classes: Path) -> None:
    before = read(classes).sha256
    os.utime(classes / NAMES[2] / "picture 0.png", (0, 0))
    assert read(classes).sha256 == before
    (classes / NAMES[2] / "picture 0.png").rename(classes / NAMES[2] / "picture 9.png")
    assert read(classes).sha256 != before


def test_stray_files_are_skipped_and_reported(classes: Path) -> None:
    (classes / ".ipynb_checkpoints").mkdir()
    (classes / NAMES[0] / "._picture 0.png").write_bytes(b"what macOS leaves")
    (classes / NAMES[0] / "list.csv").touch()
    (classes / NAMES[1] / "scan.tif").touch()
    (classes / "LICENSE").touch()
    save(classes / NAMES[1] / "deeper" / "lost.png")
    images = read(classes)
    assert images.class_names == NAMES
    assert len(images.train_images) + len(images.test_images) == 28
    assert images.notes[1:] == (
        "ignored files that are not JPEG, PNG, WebP or BMP: 3 (.csv, .tif, LICENSE)",
        "ignored images that are not directly in a class folder: 1 (two words/deeper/lost.png)",
    )


def test_class_folders_may_be_called_train_and_test(classes: Path) -> None:
    (classes / NAMES[0]).rename(classes / "train")
    (classes / NAMES[1]).rename(classes / "test")
    images = read(classes)
    assert images.class_names == ["test", "train", NAMES[2]]
    assert len(images.train_labels) + len(images.test_labels) == 28


def test_of_two_test_folders_it_is_told_which_is_read(tmp_path: Path) -> None:
    for number, (part, name) in enumerate((p, n) for p in ("train", "val", "test") for n in "ab"):
        save(tmp_path / "set" / part / name / "picture.png", colour=number)
    images = read(tmp_path / "set")
    assert (colours(images.train_images), colours(images.test_images)) == ([0, 1], [2, 3])
    assert images.notes == ("val/ is read as the test images, and test/ is not read: to measure on it, rename the two",)


def test_symbolic_links_are_followed(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    for name in NAMES[:2]:
        (tmp_path / "linked" / name).symlink_to(classes / name)
    (classes / NAMES[1] / "picture 0.png").unlink()
    (classes / NAMES[1] / "picture 0.png").symlink_to(classes / NAMES[2] / "picture 0.png")
    images = read(tmp_path / "linked")
    assert 100 in colours(images.train_images) + colours(images.test_images)


def test_all_damaged_images_are_reported_together(classes: Path) -> None:
    for i in range(15):
        (classes / NAMES[1] / f"picture {i}.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"png: not a readable image .*; so are .*\.png.* and 9 more; remove"):
        read(classes)
    (classes / NAMES[0] / "gone.png").symlink_to(classes / "nowhere")
    with pytest.raises(DataError, match=r"gone\.png: not a readable image .*No such file"):
        read(classes)


def test_damaged_images_of_both_parts_are_reported_together(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            save(tmp_path / "set" / part / name / "whole.png")
        (tmp_path / "set" / part / "a" / "damaged.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"train/a/damaged\.png: not a readable image .*; so are .*val/a/damaged\.png;"):
        read(tmp_path / "set")


def test_the_content_of_a_file_decides_not_its_suffix(classes: Path) -> None:
    """Pillow reads dozens of formats, some through external programs or by executing the file: these are not used."""
    target = classes / NAMES[2] / "odd.png"
    Image.new("RGB", (8, 8), (250, 0, 0)).save(target, "GIF")  # a format that the server accepts, too
    assert 250 in colours(read(classes).train_images)
    Image.new("RGB", (8, 8)).save(target, "TIFF")
    with pytest.raises(DataError, match=r"odd\.png: not a readable image \(cannot identify"):
        read(classes)
    target.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"odd\.png: not a readable image \(cannot identify"):
        read(classes)


def test_names_that_are_not_utf_8_are_reported_escaped(classes: Path) -> None:
    (classes / NAMES[0] / "deeper").mkdir()
    save(classes / NAMES[0] / "deeper" / os.fsdecode(b"caf\xe9.png"))
    root = classes.rename(classes.with_name(os.fsdecode(b"mes images \xe9t\xe9")))
    images = read(root)
    assert images.name == r"mes images \udce9t\udce9"
    assert any(r"crème brûlée/deeper/caf\udce9.png" in note for note in images.notes)
    "\n".join([images.name, *images.notes]).encode()


def test_images_of_any_size_are_resized(classes: Path) -> None:
    save(classes / NAMES[2] / "tiny.png", 250, (1, 1))
    save(classes / NAMES[2] / "line.png", 251, (1, 4000))
    save(classes / NAMES[2] / "large.png", 252, (5000, 3000))
    images = read(classes)
    assert {250, 251, 252} <= set(colours(images.train_images) + colours(images.test_images))


def test_large_photographs_are_read_without_warnings(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 179 million pixels: as many as Pillow reads."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    save(classes / NAMES[2] / "large.png", 250, (10, 10))  # warnings are errors in tests
    assert 250 in colours(read(classes).train_images)
    save(classes / NAMES[2] / "larger.png", 250, (10, 11))
    with pytest.raises(DataError, match=r"larger\.png: not a readable image \(Image size \(110 pixels\) exceeds"):
        read(classes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([b"only"], r"not an image set.* Here, only only/ has images \(\.bmp, .*\) directly in it$"),
        ([b"a/deeper", b"b/deeper"], r"not an image set.* Here, none of its 2 folders has images \(\.bmp, "),
        ([b"a", b"b"], "no class has 5 images"),
        ([b"a", b"b\xff"], r"unprintable names: 'b\\udcff'"),
        ([b"a", b"b\nc"], r"unprintable names: 'b\\nc'"),
    ],
)
def test_folders_that_are_no_image_set_are_refused(tmp_path: Path, names: list[bytes], message: str) -> None:
    for name in names:
        save(tmp_path / "set" / os.fsdecode(name) / "a.png")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "set")


def test_image_sets_larger_than_memory_are_refused_with_their_size(classes: Path) -> None:
    with pytest.raises(DataError, match=r"23 images of 80000000 x 80000000 px take .* GB of memory"):
        load_image_set(classes, image_size_px=80_000_000)


def test_ctrl_c_ends_reading_at_once(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, n_read = threading.Event(), []

    def interrupted(image: Image.Image, size: tuple[int, int], orientation: int) -> Image.Image:
        n_read.append(1)
        if started.is_set():
            time.sleep(0.1)  # as slow as real images: otherwise all would be read before the interrupt
        started.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(image_folder, "fitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(classes)
    assert started.is_set()
    assert len(n_read) < 23
