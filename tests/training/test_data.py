"""Folders, shards and memory; order, resumption, broken pictures."""

import csv
import io
import json
import re
import shutil
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pixeldecoder.flow import Purpose, SampleRandom
from pixeldecoder.pictures import to_tensor
from pixeldecoder.sources import Folder, Record, Shards, bucket
from pixeldecoder.training.data import batches, batches_in_memory, bucket_sizes, crop, side_multiple
from pixeldecoder.training.distill import StudentStage
from pixeldecoder.training.teacher import TeacherStage
from training.conftest import write_photos

CASES = Path(__file__).parents[1] / "cases"


def take(count, *args, **kwargs):
    return list(islice(batches(*args, **kwargs), count))


def test_buckets():
    sizes = bucket_sizes(128, 32, 2.0)
    assert (128, 128) in sizes and (160, 96) in sizes and (96, 160) in sizes
    assert all(w % 32 == h % 32 == 0 and max(w / h, h / w) <= 2 for w, h in sizes)
    assert bucket_sizes(128, 32, 1.0) == [(128, 128)]
    with pytest.raises(ValueError, match=r"resolution 100: expected a multiple of 32.* 96"):
        bucket_sizes(100, 32, 1.0)


def test_pictures_go_to_the_bucket_of_their_shape(tmp_path):
    write_photos(tmp_path / "wide", 2, (160, 96))
    write_photos(tmp_path / "tall", 2, (96, 160))
    shapes = {
        (batch.names[0].split("/")[0], batch.image.shape[2:])
        for batch in take(8, Folder(tmp_path), bucket_sizes(128, 32, 2.0), 1, seed=0)
    }
    assert shapes == {("wide", (96, 160)), ("tall", (160, 96))}


def test_bucket_that_a_picture_covers():
    sizes = bucket_sizes(512, 32, 2.0)
    assert bucket((512, 512), sizes) == (512, 512)
    assert bucket((4000, 3000), sizes) == (576, 448)  # 1.29, the next to 1.33
    assert bucket((3000, 4000), sizes) == (448, 576)
    assert bucket((4000, 500), sizes) == (704, 384)  # a panorama goes to the widest
    assert bucket((640, 390), sizes) is None  # large enough by area alone
    assert bucket((511, 513), sizes) is None and bucket((4000, 383), sizes) is None
    # 640 x 416 would be next in shape, but is 6 px too high.
    assert (640, 416) in sizes and bucket((710, 410), sizes) == (672, 384)


def test_small_pictures_are_left_out_not_enlarged(tmp_path, capsys):
    for name, size in {"fits": (64, 64), "larger": (96, 80), "short": (63, 70), "tiny": (20, 30)}.items():
        write_photos(tmp_path / name, 2, size)
    source = Folder(tmp_path)
    found = take(12, source, [(64, 64)], 1, seed=0)
    assert {batch.names[0].split("/")[0] for batch in found} == {"fits", "larger"} and len(source) == 4
    assert set(source.skipped.reasons) == {"short/0.png", "short/1.png", "tiny/0.png", "tiny/1.png"}
    assert source.skipped.reasons["short/0.png"] == "63 x 70 px, which is too small for --data.resolution 64"
    assert str(source.skipped) == "4 pictures could not be used: short/0.png, short/1.png, tiny/0.png, ..."
    # A picture of just the size stays as it is.
    batch = next(batch for batch in found if batch.names == ["fits/1.png"])
    pixels = torch.tensor(list(Image.open(tmp_path / "fits/1.png").get_flattened_data()), dtype=torch.uint8)
    assert torch.equal(((batch.image[0] + 1) * 127.5).round().byte().flatten(1).T, pixels)
    source = Folder(tmp_path)
    found = list(islice(batches_in_memory(source, 64, 4, seed=0), 4))
    assert {name.split("/")[0] for batch in found for name in batch.names} == {"fits", "larger"}
    assert len(source.skipped.reasons) == 4


def test_all_pictures_too_small(tmp_path):
    """The setting that the message gives works, and most pictures are used."""
    write_photos(tmp_path / "a", 1, (200, 60))
    write_photos(tmp_path / "b", 3, (100, 120))
    write_photos(tmp_path / "c", 33, (150, 127))
    write_photos(tmp_path / "d", 3, (300, 200))
    with pytest.raises(ValueError) as error:
        Folder(tmp_path).require(bucket_sizes(512, 32, 2.0), 32)
    message = (
        "too small for --data.resolution 512: all 40 pictures; give --data.resolution 96, which suits half of them"
    )
    assert str(error.value) == f"{tmp_path}: {message} or more"
    source = Folder(tmp_path)
    source.require(bucket_sizes(96, 32, 2.0), 32)
    assert len(source) == 39
    with pytest.raises(ValueError, match="all 40 pictures; larger ones are needed"):
        Folder(tmp_path).require([(512, 512)], 256)


def test_order_depends_on_the_seed_alone(tmp_path):
    source = Folder(write_photos(tmp_path))
    first, again, other = (take(6, source, [(64, 64)], 2, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert a.names == b.names and a.samples == b.samples and torch.equal(a.image, b.image)
    assert [b.names for b in first] != [b.names for b in other]
    epochs = [[name for batch in three for name in batch.names] for three in (first[:3], first[3:])]
    assert all(sorted(epoch) == [f"{i}.png" for i in range(6)] for epoch in epochs)
    assert epochs[0] != epochs[1]  # each in an order of its own


def test_resumption_and_processes_change_nothing(tmp_path):
    source = Folder(write_photos(tmp_path))
    whole = take(5, source, [(64, 64)], 4, seed=3)
    resumed = take(2, source, [(64, 64)], 4, seed=3, start=whole[2].position)
    halves = [take(5, source, [(64, 64)], 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for index, batch in enumerate(whole):
        together = torch.cat([halves[0][index].image, halves[1][index].image])
        assert torch.equal(together, batch.image)
        assert halves[0][index].samples + halves[1][index].samples == batch.samples
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole[3:], resumed, strict=True))


def test_broken_pictures_are_named_and_replaced(tmp_path):
    write_photos(tmp_path, 3)
    (tmp_path / "noise.png").write_bytes(b"no picture")
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    source = Folder(tmp_path)
    found = take(8, source, [(64, 64)], 2, seed=0)
    assert set(source.skipped.reasons) == {"noise.png", "half.png"}
    assert {name for batch in found for name in batch.names} == {"0.png", "1.png", "2.png"}
    # Also where a step has nothing else.
    assert "half.png" not in {batch.names[0] for batch in take(8, Folder(tmp_path), [(64, 64)], 1, seed=0)}


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no usable picture: expected .png"):
        Folder(tmp_path)
    write_photos(tmp_path, 1)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"no picture can be decoded, among them 0.png"):
        take(1, Folder(tmp_path), [(64, 64)], 1, seed=0)
    with pytest.raises(ValueError, match=r"at least 64 px, among them 0.png"):
        next(batches_in_memory(Folder(tmp_path), 64, 1, seed=0))


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_captions(tmp_path, kind):
    folder = write_photos(tmp_path / "photos", 3)
    table = None if kind == "txt" else tmp_path / f"captions.{kind}"
    if kind == "txt":
        (folder / "1.txt").write_text("a cat\n")
    elif kind == "csv":
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), ("1.png", "a cat"), ("0.png", "")])
    else:
        rows = [{"file_name": "1.png", "text": "a cat"}, {"file_name": "0.png", "text": ""}]
        table.write_text("\n".join(map(json.dumps, rows)))
    captions = {record.name: record.caption for record in Folder(folder, table).items}
    assert captions == {"0.png": "", "1.png": "a cat"} | ({"2.png": ""} if kind == "txt" else {})


def test_captions_without_their_columns(tmp_path):
    (tmp_path / "captions.csv").write_text("name,words\na,b\n")
    with pytest.raises(ValueError, match='expected "file_name" and "text"'):
        Folder(write_photos(tmp_path / "photos", 1), tmp_path / "captions.csv")


def test_shards(tmp_path):
    write_photos(tmp_path, 6)
    for number in range(2):
        with tarfile.open(tmp_path / f"data-{number}.tar", "w") as tar:
            for index in range(3 * number, 3 * number + 3):
                for suffix, data in (
                    ("png", b"broken" if index == 4 else (tmp_path / f"{index}.png").read_bytes()),
                    ("txt", f"caption {index}".encode()),
                ):
                    info = tarfile.TarInfo(f"{index}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    source = Shards(str(tmp_path / "data-{0..1}.tar"))
    whole = take(5, source, [(64, 64)], 2, seed=0)
    assert {caption for batch in whole for caption in batch.captions} == {f"caption {i}" for i in (0, 1, 2, 3, 5)}
    assert any(name.endswith(":4") for name in source.skipped.reasons)
    resumed = take(2, source, [(64, 64)], 2, seed=0, start=whole[2].position)
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole[3:], resumed, strict=True))


def test_shards_of_small_pictures(tmp_path):
    write_photos(tmp_path / "small", 3, (40, 90))
    write_photos(tmp_path / "large", 3, (90, 90))
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*/*.png")):
            tar.add(path, f"{path.parent.name}_{path.name}")
    source = Shards(str(tmp_path / "data.tar"))
    assert {batch.names[0].split(":")[-1][:5] for batch in take(6, source, [(64, 64)], 1, seed=0)} == {"large"}
    assert len(source.skipped.reasons) == 3
    with pytest.raises(ValueError, match=r"these shards: \d+ x 90 px, which is too small for --data.resolution 96"):
        take(1, Shards(str(tmp_path / "data.tar")), [(96, 96)], 1, seed=0)


def test_shards_without_pictures(tmp_path):
    with tarfile.open(tmp_path / "data.tar", "w"):
        pass
    with pytest.raises(ValueError, match="no usable picture in these shards"):
        take(1, Shards(str(tmp_path / "data.tar")), [(64, 64)], 2, seed=0)


def test_in_memory(tmp_path):
    source = Folder(write_photos(tmp_path, 4, (128, 96)))
    stream = batches_in_memory(source, 64, 3, seed=0)
    first, second = next(stream), next(stream)
    assert first.image.shape == (3, 3, 64, 64) and not torch.equal(first.image, second.image)
    resumed = next(batches_in_memory(source, 64, 3, seed=0, start=first.position))
    assert torch.equal(resumed.image, second.image)
    # A crop, not a resized picture: its pixels are the file's.
    record = next(r for r in source.items if r.name == first.names[0])
    pixels = {tuple(p) for p in Image.open(tmp_path / record.name).convert("RGB").get_flattened_data()}
    crop = ((first.image[0] + 1) * 127.5).round().byte().flatten(1).T.tolist()
    assert all(tuple(p) in pixels for p in crop)


def test_random_numbers_depend_on_the_sample_alone():
    both = SampleRandom(0, [5, 9], "training").normal(3)
    assert torch.equal(both[1], SampleRandom(0, [9], "training").normal(3)[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, SampleRandom(1, [5, 9], "training").normal(3))


def test_random_numbers_for_two_purposes_are_independent():
    """Of 4000 samples: a share or a correlation is right within four standard errors, 1 / sqrt(4000) each."""
    draws = {
        (seed, purpose): SampleRandom(seed, list(range(4000)), purpose).uniform(4)
        for seed in (0, 1)
        for purpose in get_args(Purpose)
    }
    together = torch.cat(list(draws.values()), dim=1)
    assert (together.mean(dim=0) - 0.5).abs().max() < 4 * 12**-0.5 * 4000**-0.5
    correlation = together.T.corrcoef() - torch.eye(together.shape[1])
    assert correlation.abs().max() < 5 * 4000**-0.5


class DrawnError(Exception):
    """A condition was drawn."""


@pytest.mark.parametrize("losses", ["teacher.losses", "student.critic_losses", "student.student_losses"])
def test_a_crop_s_place_does_not_decide_its_noise(losses, request, tmp_path):
    """A picture whose colours tell where a crop of it is: what an update draws for the crop does not depend on that."""
    ramp = torch.arange(192).to(torch.uint8)
    columns, rows = ramp.expand(192, 192), ramp[:, None].expand(192, 192)
    (tmp_path / "ramp").mkdir()
    Image.fromarray(torch.stack([columns, rows, columns], dim=-1).numpy()).save(tmp_path / "ramp" / "0.png")
    kind, name = losses.split(".")
    config = replace(request.getfixturevalue(kind), noise_probability=0.5)
    if kind == "teacher":
        config.latent_dropout = 0.5
    stage = (TeacherStage if kind == "teacher" else StudentStage)(config, Accelerator(cpu=True))
    conditions, found = stage.conditions, []

    def draw(batch, *args, **kwargs):
        condition = conditions(batch, *args, **kwargs)
        found.append([*batch.image[:, :2, 0, 0].T, condition.sigma > 0, condition.sigma, condition.kept])
        raise DrawnError

    stage.conditions = draw
    for batch in islice(batches_in_memory(Folder(tmp_path / "ramp"), 64, 200, seed=config.seed), 5):
        with pytest.raises(DrawnError):
            getattr(stage, name)(batch, *([1.0] if name == "student_losses" else []))
    left, top, *drawn = (torch.cat([part.float() for part in parts]) for parts in zip(*found, strict=True))
    drawn = [values for values in drawn if values.std() > 0]
    assert len(drawn) == (3 if kind == "teacher" else 2)  # a student's latents are not dropped
    correlation = torch.stack([left, top, *drawn]).corrcoef()
    assert correlation[:2, 2:].abs().max() < 4 * 1000**-0.5
    is_noised = drawn[0].bool()
    for place in (left, top):  # in every quarter of the places a half is noised
        for quarter in is_noised[place.argsort()].float().chunk(4):
            assert quarter.mean() == pytest.approx(0.5, abs=4 * 0.5 * 250**-0.5)


def test_a_picture_is_cropped_elsewhere_each_time(tmp_path):
    source = Folder(write_photos(tmp_path, 1, (320, 64)))
    crops = [batch.image.numpy().tobytes() for batch in islice(batches(source, [(32, 32)], 1, seed=0), 12)]
    assert len(set(crops)) > 6


def test_processes_share_what_is_in_memory(tmp_path):
    source = Folder(write_photos(tmp_path, 3, (96, 80)))
    whole = list(islice(batches_in_memory(source, 32, 4, seed=0), 3))
    shares = [list(islice(batches_in_memory(source, 32, 2, seed=0, rank=rank, world_size=2), 3)) for rank in (0, 1)]
    for batch, *both in zip(whole, *shares, strict=True):
        assert torch.equal(batch.image, torch.cat([share.image for share in both]))
        assert batch.samples == both[0].samples + both[1].samples


def test_crops_reach_every_edge(tmp_path):
    """Of a picture one pixel larger than a crop there are four."""
    source = Folder(write_photos(tmp_path, 1, (33, 33)))
    (batch,) = islice(batches_in_memory(source, 32, 40, seed=0), 1)
    assert len({image.numpy().tobytes() for image in batch.image}) == 4


def test_every_bucket():
    """About 16 times 32^2, up to sqrt(2) or 2 times as wide as the square."""
    expected = [(96, 160), (128, 128), (160, 96)]
    assert bucket_sizes(128, 32, 2.0) == expected
    wide = [(64, 224), (64, 256), (96, 192), (192, 96), (224, 64), (256, 64)]
    assert bucket_sizes(128, 32, 4.0) == sorted(expected + wide)


def test_side_multiple():
    config = dict(patch_size=16, scale=4, latent_downscale_factor=6)
    assert side_multiple(SimpleNamespace(**config, latent_channels=16)) == 48
    assert side_multiple(SimpleNamespace(**config, latent_channels=None)) == 16


def test_captions_stay_with_their_pictures(tmp_path):
    """On both ways, past a broken one."""
    write_photos(tmp_path, 4, (64, 64))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:300])
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"caption of {index}.png")
    for stream in batches(Folder(tmp_path), [(64, 64)], 3, seed=0), batches_in_memory(Folder(tmp_path), 64, 3, seed=0):
        names = set()
        for found in islice(stream, 6):
            assert found.captions == [f"caption of {name}" for name in found.names]
            for name, image in zip(found.names, found.image, strict=True):
                assert torch.equal(image, to_tensor(Image.open(tmp_path / name))[0])
            names |= set(found.names)
        assert names == {"0.png", "2.png", "3.png"}


def test_every_region_counts_alike(tmp_path):
    """One of two pictures is three times as large."""
    write_photos(tmp_path / "a", 1, (64, 32))
    write_photos(tmp_path / "b", 1, (64, 96))
    (batch,) = islice(batches_in_memory(Folder(tmp_path), 32, 1000, seed=0), 1)
    assert batch.names.count("b/0.png") / 1000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 1000) ** 0.5)


@pytest.mark.parametrize("size, covering, corner", [((120, 80), (48, 32), (16, 0)), ((60, 150), (32, 80), (0, 48))])
def test_a_crop_is_shrunk_until_it_just_covers(size, covering, corner):
    """At the lower right, if the random numbers are the largest."""
    record = Record("a", "", size, lambda: Image.radial_gradient("L").resize(size).convert("RGB"))
    found = crop(record, (32, 32), SimpleNamespace(randint=lambda low, high: high))
    expected = record.open().resize(covering, Image.Resampling.BICUBIC)
    expected = expected.crop((*corner, corner[0] + 32, corner[1] + 32))
    assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("captions_blank_line.jsonl", {"a.png": "x", "b.png": "y"}),
        ("captions_utf8_bom.csv", {"a.png": "a cat"}),
        ("cap_excel_bom.csv", {"0.png": "a"}),
        ("cap_blank_last_line.jsonl", {"0.png": "a"}),
        ("cap_CSV_upper.CSV", {"0.png": "a"}),
    ],
)
def test_captions_as_people_have_them(tmp_path, name, expected):
    for file in expected:
        Image.new("RGB", (64, 64)).save(tmp_path / file)
    folder = Folder(tmp_path, CASES / name)
    assert {record.name: record.caption for record in folder.items} == expected


@pytest.mark.parametrize("name", ["cap_deep.jsonl", "cap_long_field.csv", "cap_missing.csv", "nowhere.csv"])
def test_captions_that_cannot_be_read(tmp_path, name):
    write_photos(tmp_path, 1)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        Folder(tmp_path, CASES / name)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_rows_without_a_text(tmp_path, caplog):
    """They are skipped, counted and named, and so are names that no picture has; none becomes the word "None"."""
    write_photos(tmp_path / "photos", 5)
    rows = [("0.png", "a cat"), ("1.png", None), ("2.png", 5), ("3.png", ["a"]), ("B.png", "b"), ("missing.png", "c")]
    table = tmp_path / "captions.jsonl"
    table.write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows))
    with caplog.at_level("WARNING"):
        folder = Folder(tmp_path / "photos", table)
    assert [(record.name, record.caption) for record in folder.items] == [("0.png", "a cat")]
    assert list(folder.skipped.reasons) == ["1.png", "2.png", "3.png"]
    assert "2 of its names are no pictures" in caplog.text and "B.png, missing.png" in caplog.text


def test_texts_beside_pictures(tmp_path):
    write_photos(tmp_path, 3)
    (tmp_path / "0.txt").write_bytes("\ufeffa cat\n".encode())
    shutil.copy(CASES / "caption_latin1.txt", tmp_path / "1.txt")
    folder = Folder(tmp_path)
    assert [(record.name, record.caption) for record in folder.items] == [("0.png", "a cat"), ("2.png", "")]
    assert "1.txt: expected text in UTF-8" in folder.skipped.reasons["1.png"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shard_caption_null.tar", '"caption" is None: expected a text'),
        ("shard_json_is_list.tar", 'expected an object with "caption", got'),
        ("json_list.tar", 'expected an object with "caption", got'),
        ("deep_json.tar", "too deep to be read"),
        ("traversal.tar", "leads out"),
    ],
)
def test_samples_that_are_skipped(name, reason):
    shards = Shards(str(CASES / name))
    try:
        captions = [record.caption for record in shards.once()]
    except ValueError as error:
        captions = []
        assert "no usable picture" in str(error)
    assert any(reason in text for text in shards.skipped.reasons.values()), shards.skipped.reasons
    assert not {"None", "null", "[]"} & set(captions)


def test_what_is_hidden_or_made_is_no_source(tmp_path):
    write_photos(tmp_path, 2)
    write_photos(tmp_path / "run" / "validation", 1)
    (tmp_path / "._0.png").write_bytes(b"AppleDouble")
    (tmp_path / "album.png").mkdir()
    assert [record.name for record in Folder(tmp_path, output=tmp_path / "run").items] == ["0.png", "1.png"]


def test_a_thin_picture_is_left_out():
    image = CASES / "thin_2x3000.png"
    assert bucket(Image.open(image).size, [(64, 64), (32, 128)]) is None


def test_pictures_are_upright_in_srgb_and_on_white(tmp_path):
    for name in "exif_orientation6_96x64.jpg", "rgba_magenta_under_transparent.png", "grey16_ramp_0_65535.png":
        shutil.copy(CASES / name, tmp_path)
    turned, grey, flat = Folder(tmp_path).items
    assert turned.size == turned.open().size == (64, 96)
    assert np.asarray(grey.open()).mean() == pytest.approx(127.5, abs=0.1)
    assert np.asarray(flat.open()).reshape(-1, 3).max(0).tolist() == [255, 255, 255]
