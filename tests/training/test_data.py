import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.bundle import ZOO, load_bundle
from service.images.decoder import ImageDecoder
from tests.service.images.test_images import png_bomb
from tests.training import tiny
from training.cifar100 import CIFAR100_MEAN, CIFAR100_STD
from training.data import load_image_set
from training.image_folder import IMAGENET_MEAN, IMAGENET_STD
from training.image_set import DataError, ImageSet, Split


def assert_is_tiny(images: ImageSet) -> None:
    expected_train, train_labels = tiny.coloured(tiny.N_TRAIN, 1)
    expected_test, test_labels = tiny.coloured(tiny.N_TEST, 2)
    assert images.name == "cifar100"
    assert images.class_names == tiny.CLASS_NAMES
    assert images.train_images.dtype == np.uint8
    assert images.train_labels.dtype == np.int64
    assert np.array_equal(images.train_images, expected_train)
    assert np.array_equal(images.test_images, expected_test)
    assert np.array_equal(images.train_labels, train_labels)
    assert np.array_equal(images.test_labels, test_labels)


def test_the_official_archive_and_its_folder_hold_the_same_images(tmp_path: Path) -> None:
    tar = tiny.write_tar(tmp_path / "cifar-100-python.tar.gz", tiny.official_parts())
    folder = tiny.write_folder(tmp_path / "cifar-100-python")
    for path in (tar, folder, tmp_path):
        assert_is_tiny(load_image_set(path))


def test_strips_hold_the_same_images(tmp_path: Path) -> None:
    train, train_labels = tiny.coloured(tiny.N_TRAIN, 1)
    test, test_labels = tiny.coloured(tiny.N_TEST, 2)
    np.savez(
        tmp_path / "cifar100-labels.npz",
        train_labels=train_labels,
        test_labels=test_labels,
        class_names=np.array(tiny.CLASS_NAMES),
    )
    strips = {"train-000": train[:52], "train-001": train[52:], "test-000": test}
    for number, names in ((1, ["train-001"]), (2, ["test-000", "train-000"])):
        with zipfile.ZipFile(tmp_path / f"cifar100-images-{number}of2.zip", "w") as archive:
            for name in names:
                packed = io.BytesIO()
                Image.fromarray(strips[name].reshape(-1, 32, 3)).save(packed, "WEBP", lossless=True)
                archive.writestr(f"{name}.webp", packed.getvalue())
    assert_is_tiny(load_image_set(tmp_path))
    (tmp_path / "cifar100-images-1of2.zip").unlink()
    with pytest.raises(DataError, match=r"52 train images and 104 labels\); copy all its files"):
        load_image_set(tmp_path)


def save_image(path: Path, size: tuple[int, int], colour: tuple[int, int, int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_an_image_folder_is_read_by_class_resized_and_cropped(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "a.png", (64, 48), (250, 0, 0))
    save_image(tmp_path / "train" / "cat" / "b.jpg", (48, 96), (250, 0, 0), "L")
    save_image(tmp_path / "train" / "ant" / "c.webp", (32, 32), (0, 250, 0))
    save_image(tmp_path / "val" / "cat" / "d.png", (40, 40), (250, 0, 0), "RGBA")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    images = load_image_set(tmp_path, image_size_px=24)
    assert images.class_names == ["ant", "cat"]
    assert images.image_size_px == 24
    assert images.train_images.shape == (3, 24, 24, 3)
    assert images.train_labels.tolist() == [0, 1, 1]
    assert (images.train_images[1] == [250, 0, 0]).all()
    assert images.test_labels.tolist() == [1]


def test_orientation_in_a_photo_is_followed(tmp_path: Path) -> None:
    save_image(tmp_path / "val" / "a" / "x.png", (8, 8), (0, 0, 0))
    save_image(tmp_path / "train" / "b" / "x.png", (8, 8), (0, 0, 0))
    picture = Image.new("RGB", (16, 16))
    picture.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "train" / "a").mkdir()
    picture.save(tmp_path / "train" / "a" / "x.png", exif=exif)
    images = load_image_set(tmp_path, image_size_px=16)
    assert images.train_images[0, 0].max() == 0
    assert images.train_images[0, -1].min() == 255


def pictures() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """Noise images in all pixel modes, with a transparency gradient where the mode has one."""
    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (47, 61, 3), dtype=np.uint8))
    alpha = Image.fromarray(np.tile(np.arange(61, dtype=np.uint8) * 4, (47, 1)))
    see_through = Image.merge("RGBA", (*noise.split(), alpha))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(draw.integers(0, 65536, (47, 61), dtype=np.uint16))
    return {
        "black-and-white.png": (noise.convert("1"), {}),
        "cmyk.jpg": (noise.convert("CMYK"), {}),
        "grey.jpg": (noise.convert("L"), {}),
        "palette.png": (noise.quantize(16), {"transparency": 3}),
        "see-through.png": (see_through, {}),
        "see-through.webp": (see_through, {"lossless": True}),
        "see-through-grey.png": (see_through.convert("LA"), {}),
        "sixteen-bits.png": (deep, {}),
        "turned.jpg": (noise, {"exif": turned}),
    }


def test_training_and_serving_decode_images_alike(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "val/a"):
        save_image(tmp_path / folder / "0.png", (8, 8), (0, 0, 0))
    for name, (picture, options) in pictures().items():
        picture.save(tmp_path / "train" / "a" / name, **options)
    images = load_image_set(tmp_path, image_size_px=24)
    decoder = ImageDecoder(24, 24, max_pixels=10_000)
    for row, path in enumerate(sorted((tmp_path / "train" / "a").iterdir())):
        assert np.array_equal(images.train_images[row], decoder.decode_now(path.read_bytes())), path.name
    decoder.close()


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch fired",)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = tiny.official_parts()
    parts["meta"] = pickle.dumps({b"fine_label_names": _Bomb()})
    with pytest.raises(DataError, match=r"asks for (posix|nt)\.system, which no CIFAR file does"):
        load_image_set(tiny.write_tar(tmp_path / "bad.tar.gz", parts))
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "numpy.core.multiarray.fromfile"])
def test_only_the_names_that_arrays_need_are_unpickled(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    parts = tiny.official_parts()
    parts["train"] = f"c{module}\n{function}\n(S'1'\ntR.".encode()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_image_set(tiny.write_tar(tmp_path / "bad.tar.gz", parts))


def cut(parts: dict[str, bytes]) -> None:
    parts["train"] = parts["train"][: len(parts["train"]) // 2]


def drop(parts: dict[str, bytes]) -> None:
    del parts["test"]


def garble(parts: dict[str, bytes]) -> None:
    parts["test"] = b"\x80\x02garbage."


def other_keys(parts: dict[str, bytes]) -> None:
    parts["train"] = pickle.dumps({b"images": []}, protocol=2)


def label_out_of_range(parts: dict[str, bytes]) -> None:
    images, labels = tiny.coloured(4, 1)
    content = {b"data": images.reshape(4, -1), b"fine_labels": (labels + 1).tolist()}
    parts["train"] = pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("damage", [cut, drop, garble, other_keys, label_out_of_range])
def test_a_damaged_archive_is_named_with_the_fix(tmp_path: Path, damage) -> None:
    parts = tiny.official_parts()
    damage(parts)
    with pytest.raises(DataError, match=r"cifar.tar.gz: .*download"):
        load_image_set(tiny.write_tar(tmp_path / "cifar.tar.gz", parts))


def test_paths_that_are_no_image_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_image_set(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not an image set"):
        load_image_set(tmp_path)
    (tmp_path / "fake.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(DataError, match="download it again"):
        load_image_set(tmp_path / "fake.tar.gz")
    save_image(tmp_path / "train" / "cat" / "a.png", (8, 8), (0, 0, 0))
    with pytest.raises(DataError, match="neither val/ nor test/"):
        load_image_set(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="at least 2"):
        load_image_set(tmp_path)
    save_image(tmp_path / "train" / "dog" / "a.png", (8, 8), (0, 0, 0))
    with pytest.raises(DataError, match="no images"):
        load_image_set(tmp_path)
    save_image(tmp_path / "val" / "dog" / "a.png", (8, 8), (0, 0, 0))
    (tmp_path / "train" / "dog" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: not a readable image"):
        load_image_set(tmp_path)
    (tmp_path / "train" / "dog" / "b.png").write_bytes(png_bomb(14_000))
    with pytest.raises(DataError, match=r"b\.png: not a readable image \(.*decompression bomb"):
        load_image_set(tmp_path)


def test_inconsistent_train_and_test_folders_are_refused(tmp_path: Path) -> None:
    for place in ("train/cat", "train/dog", "val/cat", "val/dgo"):
        save_image(tmp_path / place / "a.png", (8, 8), (0, 0, 0))
    with pytest.raises(DataError, match=r"val: dgo: no such class in train/"):
        load_image_set(tmp_path)
    (tmp_path / "val" / "dgo").rename(tmp_path / "val" / "dog")
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match=r"train: no images in ant; add some, or remove the folder"):
        load_image_set(tmp_path)
    (tmp_path / "train" / "ant").rmdir()
    assert load_image_set(tmp_path, image_size_px=8).class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("bundle", "mean", "std"),
    [("cifar100-msdnet", CIFAR100_MEAN, CIFAR100_STD), ("imagenette-msdnet", IMAGENET_MEAN, IMAGENET_STD)],
)
def test_images_are_normalised_as_those_of_the_bundles_that_ship(
    bundle: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    told = load_bundle(ZOO / bundle, verify=False).manifest.input
    assert (tuple(told.mean), tuple(told.std)) == (mean, std)


def test_a_split_contains_every_image_once_and_can_be_reloaded(tmp_path: Path) -> None:
    split = Split.make(1000, 100, seed=3)
    both = np.concatenate([split.train, split.held_out])
    assert len(split.held_out) == 100
    assert np.array_equal(np.sort(both), np.arange(1000))
    split.save(tmp_path / "split.npz")
    again = Split.load(tmp_path / "split.npz", 1000)
    assert again.sha256 == split.sha256 == Split.make(1000, 100, seed=3).sha256
    assert Split.make(1000, 100, seed=4).sha256 != split.sha256
    with pytest.raises(DataError, match="give the images that the run was started with"):
        Split.load(tmp_path / "split.npz", 999)
    Split(split.train, split.train[:100]).save(tmp_path / "split.npz")
    with pytest.raises(DataError):
        Split.load(tmp_path / "split.npz", 1000)
    (tmp_path / "split.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="can't be read"):
        Split.load(tmp_path / "split.npz", 1000)


@pytest.mark.parametrize("n_held_out", [0, 10, 11])
def test_a_split_needs_images_on_both_sides(n_held_out: int) -> None:
    with pytest.raises(DataError, match=r"choose from 2 to 9 .*--set held_out_images"):
        Split.make(10, n_held_out, seed=0)
