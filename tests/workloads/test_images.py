"""Pictures of the user's own: classes, split, decoding, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from batchlab.core.errors import InputError
from batchlab.data.fetch import fetch
from batchlab.workloads import images
from batchlab.workloads.images import ImageFiles, read_image


def pictures(root, counts, size=12, suffix=".png"):
    """Noise, bluer for each further class."""
    rng = np.random.default_rng(0)
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2] += np.uint8(60 * label)
            Image.fromarray(pixels).save(root / name / f"{i}{suffix}")
    return root


def test_a_sub_folder_is_a_class(tmp_path):
    root = pictures(tmp_path / "zoo", {"ant": 30, "bee": 20, ".hidden": 5})
    (root / "empty").mkdir()
    (root / "ant" / "notes.txt").write_text("no picture")
    (root / "stray.png").write_bytes(b"no picture")
    job = images(root, size=12)
    assert job.name == "images:zoo"
    assert (len(job.train), len(job.valid)) == (40, 10)
    assert torch.bincount(job.train.targets).tolist() == [24, 16]
    assert torch.bincount(job.valid.targets).tolist() == [6, 4]
    assert job.model()(job.train.inputs[:3]).shape == (3, 2)


def test_parts_share_no_picture_and_are_the_same_each_time(tmp_path):
    root = pictures(tmp_path, {"a": 15, "b": 15})
    job, again = images(root, size=12), images(root, size=12)
    every = torch.cat([job.train.inputs, job.valid.inputs]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 30
    assert torch.equal(job.valid.inputs, again.valid.inputs)


def test_read_when_needed_is_the_same_as_kept(tmp_path):
    root = pictures(tmp_path, {"a": 15, "b": 15})
    kept, read = images(root, size=8), images(root, size=8, cache_bytes=1)
    assert isinstance(read.train, ImageFiles)
    for chosen in ([3], [7, 0, 7]):
        for ours, theirs in zip(
            fetch(kept.train, chosen, kept.collate), fetch(read.train, chosen, read.collate), strict=True
        ):
            assert torch.equal(ours, theirs)
        assert torch.equal(read.collate([read.train[i] for i in chosen]).inputs, kept.train.inputs[chosen])


def test_it_learns_a_colour(tmp_path):
    job = images(pictures(tmp_path, {"dark": 60, "blue": 60}, size=8), size=8)
    torch.manual_seed(0)
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        batch = fetch(job.train, torch.randint(len(job.train), (16,)).tolist(), job.collate)
        optimizer.zero_grad()
        job.loss(model, batch).backward()
        optimizer.step()
    held = fetch(job.valid, list(range(len(job.valid))), job.collate)
    assert float(job.metric(model, held)["accuracy"]) > 0.9  # mean blue differs by 60, 0.9 deviations of one pixel


def test_every_mode_becomes_rgb(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    plain = Image.fromarray(ramp)
    plain.save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 256).save(tmp_path / "grey16.png")
    Image.merge("RGBA", [plain] * 3 + [Image.new("L", (8, 8), 7)]).save(tmp_path / "alpha.png")
    plain.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("L", (8, 8), 255)])
    expected = torch.from_numpy(ramp).expand(3, 8, 8)
    for file in tmp_path.iterdir():
        assert torch.equal(read_image(file, 8), expected), file.name


def test_a_cameras_orientation_is_followed(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = read_image(tmp_path / "turned.png", 16)
    assert read[:, :8].max() == 0 and read[:, 8:].min() == 255


def test_large_pictures_are_averaged_down(tmp_path):
    for suffix in (".png", ".jpg"):
        Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / f"c{suffix}")
        read = read_image(tmp_path / f"c{suffix}", 8).float()
        assert (read - 127.5).abs().max() < 8, suffix


def damaged(root, how):
    root = pictures(root, {"a": 10, "b": 10})
    file = root / "b" / "3.png"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-60], "text": b"no picture", "empty": b""}[how])
    return root


@pytest.mark.parametrize("how", ["cut", "text", "empty"])
def test_a_damaged_picture_is_named(tmp_path, how):
    with pytest.raises(InputError, match=r"3\.png is not a readable picture: ") as caught:
        images(damaged(tmp_path, how))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda p: p / "none", {}, "none does not exist"),
        (lambda p: p, {}, "holds no class: at least two sub-folders with pictures are needed"),
        (lambda p: pictures(p, {"cat": 12}), {}, "holds one class, 'cat': at least two sub-folders"),
        (lambda p: pictures(p, {"a": 5, "b": 4}), {}, "holds 9 pictures, but at least 10 are needed"),
        (lambda p: pictures(p, {"a": 6, "b": 6}), {"size": 0}, "size must be an integer of at least 1, got 0"),
        (lambda p: pictures(p, {"a": 6, "b": 6}), {"valid_share": 1.0}, r"must lie in \(0, 1\), got 1.0"),
        (lambda p: pictures(p, {"a": 6}) / "a" / "0.png", {}, "0.png is not a folder"),
    ],
)
def test_what_is_refused(tmp_path, make, options, message):
    with pytest.raises(InputError, match=message):
        images(make(tmp_path), **options)
