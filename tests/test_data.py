"""Generated scenes and image sources."""

import io
import json
import os
import tarfile
from itertools import islice

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.builder import build_wds_dataset
from PIL import Image
from torchvision.datasets import ImageFolder

from dgmr_tp.data import scenes
from dgmr_tp.data.decoding import decode_image
from dgmr_tp.data.images import Images
from dgmr_tp.data.labels import check_class_names, check_label_range, check_prompts
from dgmr_tp.data.scenes import CLASSNAMES, Scene, distinct
from dgmr_tp.data.streams import find_images
from dgmr_tp.distillation.data import (
    Crops,
    StreamCrops,
    batches,
    distinct_global_batch,
    global_batch,
    stream_batches,
    training_transform,
)
from dgmr_tp.errors import DgmrError
from dgmr_tp.evaluation.shards import Shards
from dgmr_tp.pipeline.recipe import parse_recipe
from dgmr_tp.pipeline.run_directory import fingerprint
from dgmr_tp.utils.files import atomic_write, write_json
from dgmr_tp.utils.sources import Source

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)


def test_a_scene_is_the_same_picture_every_time_and_another_one_differs():
    assert (Scene.draw(5, 17).image() == Scene.draw(5, 17).image()).all()
    assert (Scene.draw(5, 17).image() != Scene.draw(5, 18).image()).any()
    assert (Scene.draw(5, 17).image() != Scene.draw(6, 17).image()).any()


def test_a_known_scene_has_not_changed():
    """The demo CLIP was trained on these images. A change of the generator needs a new demo CLIP."""
    scene = Scene.draw(0, 0)
    assert scene.caption == "a medium striped purple cross at the top left on a plain background"
    assert scene.image().shape == (64, 64, 3)
    assert abs(float(scene.image().mean()) - 84.70) < 0.1


def test_captions_name_the_class_and_all_classes_occur():
    drawn = [Scene.draw(0, i) for i in range(2000)]
    assert all(CLASSNAMES[scene.label] in scene.caption for scene in drawn)
    assert {scene.label for scene in drawn} == set(range(len(CLASSNAMES))) and len(CLASSNAMES) >= 48
    unique = list(distinct(drawn))
    assert len({scene.caption for scene in unique}) == len(unique) > 1900


def test_the_object_is_where_the_caption_says():
    """Two renderings with the same random numbers and different colors differ only in the object's pixels."""
    for index in range(60):
        scene = Scene.draw(3, index)
        other = Scene(**{**scene.__dict__, "color": "red" if scene.color != "red" else "blue"})
        differs = (scene.image().astype(int) != other.image().astype(int)).any(-1)
        y, x = np.argwhere(differs).mean(0) / 64
        assert abs(x - scenes.COLUMNS[scene.column]) < 0.15 and abs(y - scenes.ROWS[scene.row]) < 0.15, scene.caption


def test_shards_hold_what_the_scenes_say(tmp_path):
    scenes.write_classification(tmp_path / "a", 20, seed=4)
    with tarfile.open(tmp_path / "a" / "test" / "0.tar") as tar:
        assert tar.extractfile("000007.cls").read().decode() == str(Scene.draw(4, 7).label)
        picture = Image.open(io.BytesIO(tar.extractfile("000007.png").read()))
        assert (np.asarray(picture) == Scene.draw(4, 7).image()).all()
    assert len(Images.find(tmp_path / "a")) == 20


@pytest.fixture
def folder(tmp_path):
    """Ten good images, one of them in a subfolder, two broken ones and a text file."""
    for i in range(9):
        Image.fromarray(Scene.draw(0, i).image()).save(tmp_path / f"{i}.png")
    (tmp_path / "sub").mkdir()
    Image.fromarray(Scene.draw(0, 9).image()).save(tmp_path / "sub" / "9.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


def test_broken_and_foreign_files_are_counted_and_skipped(folder):
    images = Images.find(folder)
    assert len(images) == 12 and images.other_files == 1
    read = torch.cat(list(images.sample(100, 0, to_tensor, batch_size=4)))
    assert len(read) == 10
    assert {name.rsplit("/", 1)[1] for name in images.broken} == {"broken.png", "cut.png"}


def test_a_sample_depends_on_the_seed_alone(folder):
    take = lambda seed, size: torch.cat(list(Images.find(folder).sample(5, seed, to_tensor, batch_size=size)))  # noqa: E731
    assert torch.equal(take(1, 2), take(1, 5))
    assert not torch.equal(take(1, 5), take(2, 5))


def test_pictures_of_sixteen_bits_keep_their_shades_and_those_without_a_range_are_broken(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.tif")
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "c.tif")
    images = Images.find(tmp_path)
    for place in (0, 1):
        pixels = np.asarray(images.read(place)).astype(int)
        assert pixels.shape == (16, 16, 3) and (pixels == np.arange(256).reshape(16, 16, 1)).all()
    assert images.read(2) is None and "mode F" in images.broken[str(tmp_path / "c.tif")]


def test_linked_folders_are_folders_and_names_need_not_be_utf_8(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("linked")
    (place / "first").symlink_to(folder)
    (place / "again").symlink_to(place)
    latin = os.fsencode(place) + b"/caf\xe9.png"
    with open(latin, "wb") as file:
        file.write((folder / "0.png").read_bytes())
    images = Images.find(place)
    assert len(images) == 13 and {record.class_name() for record in images.records} == {"first", None}
    atomic_write(place / "names.txt", "\n".join(record.name for record in images.records))
    assert b"caf\xe9.png" in (place / "names.txt").read_bytes()


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(DgmrError, match="does not exist"):
        Images.find(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DgmrError, match=r"no image \(1 other"):
        Images.find(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DgmrError, match=r"none of the 1 images.*a\.png"):
        list(Images.find(tmp_path).sample(5, 0, to_tensor))
    (tmp_path / "b.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DgmrError, match=r"b\.tar"):
        Images.find(tmp_path)


@pytest.mark.parametrize("damage", ["a header", "cut at a header", "cut in a file", "no end"])
def test_a_damaged_shard_is_named_and_not_taken_for_a_shorter_one(tmp_path, damage):
    scenes.write_classification(tmp_path / "whole", 20, seed=4)
    content = bytearray((tmp_path / "whole" / "test" / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "whole" / "test" / "0.tar") as tar:
        member = tar.getmembers()[20]
        end = tar.offset
    if damage == "a header":
        content[member.offset] ^= 1
    else:
        del content[
            {"cut at a header": member.offset, "cut in a file": member.offset_data + 10, "no end": end}[damage] :
        ]
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(DgmrError, match=r"cannot read the shard .*0\.tar: .*fetch it again"):
        Images.find(tmp_path / "0.tar")
    assert len(Images.find(tmp_path / "whole")) == 20


def test_no_contrastive_batch_has_an_image_twice():
    drawn = [distinct_global_batch(50, 16, seed=3, step=step) for step in range(9)]
    for batch in drawn:
        assert len({index for _, index in batch}) == 16 and len({epoch for epoch, _ in batch}) == 1
    for epoch in range(3):
        indices = [index for batch in drawn for e, index in batch if e == epoch]
        assert len(indices) == len(set(indices)) == 48
    assert drawn[0] != [(0, index) for _, index in drawn[3]]
    assert any(len({index for _, index in global_batch(50, 16, seed=3, step=step)}) < 16 for step in range(50))


@pytest.mark.parametrize("count", [7, 16, 50])
def test_global_batches_are_epochs_of_shuffled_samples(count):
    drawn = [place for step in range(20) for place in global_batch(count, 16, seed=3, step=step)]
    for epoch in range(320 // count):
        part = [index for e, index in drawn if e == epoch]
        assert sorted(part) == list(range(count))
    first = [index for epoch, index in drawn if epoch == 0]
    assert first != [index for epoch, index in drawn if epoch == 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_global_batch_and_a_resumed_run_sees_what_it_would_have_seen(folder, workers):
    crops = Crops(Images.find(folder), training_transform(PREPROCESS, 16, 0.3, True), seed=1)

    def drawn(first=0, rank=0, world=1, micro=8):
        options = {"batch": 8, "seed": 1, "steps": 6, "workers": workers}
        return [
            sample.images for sample in batches(crops, first_step=first, rank=rank, world=world, micro=micro, **options)
        ]

    full, halves, resumed = drawn(), [drawn(rank=rank, world=2, micro=4) for rank in (0, 1)], drawn(first=4)
    for step in range(6):
        assert torch.equal(full[step][0::2], halves[0][step]) and torch.equal(full[step][1::2], halves[1][step])
    assert torch.equal(full[4], resumed[0]) and torch.equal(full[5], resumed[1])
    assert not torch.equal(full[4], full[5])
    pieces = drawn(micro=3)
    assert len(pieces) == 18 and torch.equal(torch.cat(pieces), torch.cat(full))


def test_broken_images_are_named_by_every_process_that_meets_them(folder):
    crops = Crops(Images.find(folder), training_transform(PREPROCESS, 16, 0.3, True), seed=1)
    options = {"batch": 12, "micro": 3, "seed": 1, "first_step": 0, "steps": 1, "rank": 0, "world": 1}
    for workers in (0, 2):
        met = [name for sample in batches(crops, workers=workers, **options) for name in sample.broken]
        assert {name.rsplit("/", 1)[1] for name in met} == {"broken.png", "cut.png"}


def test_crops_differ_between_epochs_and_respect_the_smallest_area(folder):
    crops = Crops(Images.find(folder), training_transform(PREPROCESS, 16, 0.3, True), seed=1)
    assert not torch.equal(crops[0, 2][0], crops[1, 2][0])
    assert torch.equal(crops[0, 2][0], crops[0, 2][0])
    uncropped = Crops(Images.find(folder), training_transform(PREPROCESS, 16, 1.0, False), seed=1)
    assert torch.equal(uncropped[0, 2][0], uncropped[1, 2][0])


def test_dinov2_changes_the_colors_of_most_crops(folder):
    image = Images.find(folder).read(0)
    plain, color_changed = (training_transform(PREPROCESS, 16, 1.0, False, augment) for augment in ("clip", "dinov2"))
    crops = torch.stack([color_changed(image) for _ in range(40)])
    changed = (crops - plain(image)).abs().amax((1, 2, 3)) > 0.05
    assert torch.equal(plain(image), plain(image)) and changed.sum() >= 30
    gray = ((crops[:, 0] - crops[:, 1]).abs().amax((1, 2)) < 1e-6).sum()
    assert 1 <= gray <= 20  # a fifth is expected


@pytest.fixture
def shards(tmp_path):
    """Four shards of five images behind a URL. The red channel identifies an image."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(5):
                data = io.BytesIO()
                Image.new("RGB", (16, 16), (10 * (5 * shard + i), 0, 0)).save(data, "png")
                info = tarfile.TarInfo(f"{i}.png")
                info.size = data.tell()
                tar.addfile(info, io.BytesIO(data.getvalue()))
    return f"pipe:cat {tmp_path}/{{0..3}}.tar"


def test_shards_behind_a_url_are_read_whole_in_an_order_of_their_own_for_every_seed(shards):
    def red(seed, count=100):
        images = torch.cat(list(find_images(shards).sample(count, seed, to_tensor)))
        return [round(float(value) / 10) for value in images[:, 0, 0, 0]]

    assert sorted(red(0)) == list(range(20)) and red(0) == red(0) != red(1)
    assert red(0, 7) == red(0)[:7]
    stream = find_images(shards)
    for epoch in range(3):
        assert sorted(stream.shard(4 * epoch + i, 5) for i in range(4)) == stream.shards
    assert len({tuple(stream.shard(4 * epoch + i, 5) for i in range(4)) for epoch in range(9)}) > 1


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2)])
def test_readers_share_the_shards_of_a_url_and_a_resumed_run_goes_on_at_one(shards, world, workers):
    transform = training_transform({"mean": [0.0] * 3, "std": [1.0] * 3}, 16, 1.0, False)

    def drawn(first, rank, pieces):
        crops = StreamCrops(find_images(shards), transform, 3, first, rank, world)
        return list(islice(stream_batches(crops, micro=5, workers=workers), pieces))

    epoch = [sample for rank in range(world) for sample in drawn(0, rank, 4 // world)]
    assert len({name for sample in epoch for name in sample.names}) == 20
    stream = find_images(shards)
    for sample in [sample for rank in range(world) for sample in drawn(2, rank, 4)]:
        _, position = sample.shard
        assert position >= 2 and {name.rpartition(":")[0] for name in sample.names} == {stream.shard(position, 3)}


def test_a_shard_that_cannot_be_read_is_named(shards, tmp_path):
    (tmp_path / "2.tar").unlink()
    with pytest.raises(DgmrError, match=r"cannot read the shard pipe:cat .*2\.tar"):
        list(find_images(shards).sample(100, 0, to_tensor))


def test_classes_of_folders_are_those_of_torchvision_and_side_files_are_not_listed(tmp_path):
    for name in ("cat/images/0.png", "cat/1.png", "dog/a/b/2.png", "horse/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(Scene.draw(0, 1).image()).save(tmp_path / name)
    reference = ImageFolder(str(tmp_path))
    for name in (
        "cat/._1.png",
        "__MACOSX/cat/0.png",
        ".ipynb_checkpoints/1-checkpoint.png",
        "cat/@eaDir/1.png/THUMB.jpg",
        ".DS_Store",
        "Thumbs.db",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    images = Images.find(tmp_path)
    assert images.other_files == 0 and images.deepest == "cat/images"
    assert [(record.name, record.label) for record in images.records] == [
        (name, reference.classes[label]) for name, label in reference.samples
    ]


@pytest.mark.parametrize(
    ("name", "file_format"),
    [("a.gif", "GIF"), ("a.avif", "AVIF"), ("a.jfif", "JPEG"), ("a", "JPEG"), ("b", "WEBP"), ("c", "PNG")],
)
def test_formats_are_read_and_their_content_decides_without_an_extension(tmp_path, name, file_format):
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / name, file_format)
    (tmp_path / "Makefile").write_text("all:")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / name, name)
    images = Images.find(tmp_path)
    assert [record.name for record in images.records] == [str(tmp_path / name), f"{tmp_path / 'images.tar'}:{name}"]
    assert images.others == {"no extension": 1}
    for index in range(2):
        assert np.abs(np.asarray(images.read(index)).astype(int) - ramp).mean() < 2


def test_photos_are_turned_if_the_source_says_so(tmp_path):
    scene = Scene.draw(0, 1).image()[:, :40]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(scene).save(tmp_path / "a.png", exif=exif)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    for name in ("a.png", "a.tar"):
        assert (np.asarray(Images.find(tmp_path / name).read(0)) == scene).all()
        assert (np.asarray(Images.find(f"exif:{tmp_path / name}").read(0)) == np.rot90(scene, -1)).all()
    stream = find_images(f"exif:pipe:cat {tmp_path / 'a.tar'}")
    [(_, image)] = stream.read(stream.shard(0, 0), 0)
    assert (np.asarray(image) == np.rot90(scene, -1)).all()


def test_the_home_directory_is_expanded_in_paths_and_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pics").mkdir()
    for index in range(2):
        Image.fromarray(Scene.draw(0, index).image()).save(tmp_path / "pics" / f"{index}.png")
    assert len(Images.find("~/pics")) == len(Images.find("~/pics/{0..1}.png")) == 2
    data = {"name": "r", "model": "demo", "images": "~/pics", "prune": {"mlp_ratio": 1}}
    assert parse_recipe(data, tmp_path).paths == {"images": str(tmp_path / "pics")}


def test_a_folder_that_cannot_be_listed_is_refused_by_name(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(DgmrError, match=r"cannot list the folder .*sub: Permission denied\. Change its permissions"):
        Images.find(folder)


def test_members_of_tars_have_the_classes_of_their_folders_unless_there_are_labels(tmp_path):
    def write(name, members, links=()):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            for member, target in links:
                entry = tarfile.TarInfo(member)
                entry.type, entry.linkname = tarfile.LNKTYPE, target
                tar.addfile(entry)
        return [
            (record.name.rpartition(":")[2], record.class_name()) for record in Images.find(tmp_path / name).records
        ]

    data = io.BytesIO()
    Image.fromarray(Scene.draw(0, 1).image()).save(data, "png")
    png = data.getvalue()
    folders = write(
        "a.tar", {"./train/cat/x/0.png": png, "./train/dog/1.png": png}, [("./train/dog/2.png", "./train/cat/x/0.png")]
    )
    assert folders == [("./train/cat/x/0.png", "cat"), ("./train/dog/1.png", "dog"), ("./train/dog/2.png", "dog")]
    assert (np.asarray(Images.find(tmp_path / "a.tar").read(2)) == Scene.draw(0, 1).image()).all()
    assert write("b.tar", {"k/0.png": png, "k/1.png": png}) == [("k/0.png", None), ("k/1.png", None)]
    labeled = write("c.tar", {"x/0.png": png, "x/0.cls": b"7\n", "y/1.png": png})
    assert labeled == [("x/0.png", "7"), ("y/1.png", None)]
    sample = write("d.tar", {"0.jpg": png, "0.seg.png": png, "0.cls": b"1", "22.05.jpg": png, "22.05.cls": b"2"})
    assert sample == [("0.jpg", "1"), ("22.05.jpg", "2")]


def test_webdatasets_are_read_as_webdataset_reads_them(tmp_path):
    scenes.write_classification(tmp_path / "set", 25, seed=4)
    dataset = Shards(tmp_path / "set", "test", to_tensor)
    reference = list(build_wds_dataset("x", to_tensor, "test", str(tmp_path / "set")))
    assert len(dataset) == len(reference) == 25 and dataset.classes == list(CLASSNAMES)
    for (image, label), (expected_image, expected_label) in zip(dataset, reference, strict=True):
        assert torch.equal(image, expected_image) and label == expected_label
    batches = [dataset.batched(10)[index] for index in range(3)]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([image for image, _ in reference]))
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in reference]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_class_names([], "x"), "x names 0 classes"),
        (lambda: check_class_names(["a", " "], "x"), "the name of class 1 in x is empty"),
        (lambda: check_prompts([], ["a", "b"], "x"), "x has no prompts"),
        (lambda: check_prompts(["a {}."], ["a", "b"], "x"), r"'a {}\.' of x does not contain {c}"),
        (lambda: check_prompts(["a {c", "{c}"], ["a", "b"], "x"), "'a {c' of x does not contain {c}"),
        (lambda: check_prompts({"a": ["an a"], "b": []}, ["a", "b"], "x"), "for 1 of 2 classes; the first: 'b'"),
        (lambda: check_label_range([-1, 1], 2, "x"), "are -1 to 1, but there are 2 classes, 0 to 1. Give"),
        (lambda: check_label_range([1, 2], 2, "x"), "are 1 to 2, but there are 2 classes, 0 to 1. Labels count from 0"),
    ],
)
def test_names_prompts_and_labels_that_do_not_match_are_refused(check, message):
    with pytest.raises(DgmrError, match=message):
        check()
    check_class_names(["a", "b"], "x")
    check_prompts(["{c}", "a {c}."], ["a", "b"], "x")
    check_prompts({"a": ["an a"], "b": ["a b"]}, ["a", "b"], "x")
    check_label_range([0, 1], 2, "x")


@pytest.mark.parametrize(
    ("source", "runs_command"),
    [
        ("pipe:cat a.tar", True),
        ("a.tar::pipe:cat b.tar", True),
        ("exif:pipe:cat a.tar", True),
        ("{a,pipe:b}", True),
        ("https://host/a.tar'; touch b; '", True),
        ("https://host/{000..002}.tar?key=a&expires=1", False),
        ("photos of a pipe: one", False),
    ],
)
def test_sources_that_run_a_shell_command_are_known(source, runs_command):
    assert Source.parse(source).runs_command == runs_command


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": [1.5, -float("inf")], "c": (1, "x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, None], "c": [1, "x"]}


def test_the_hash_of_a_source_follows_its_files_and_not_those_of_tools(folder):
    source = f"{folder}/{{0,1,sub}}.png::{folder}/sub"
    assert fingerprint(source) is None  # sub.png does not exist
    source = f"{folder}/{{0,1}}.png::{folder}/sub"
    before = fingerprint(source), fingerprint(str(folder))
    (folder / "sub" / ".DS_Store").write_bytes(b"x")
    assert (fingerprint(source), fingerprint(str(folder))) == before and before[0] != before[1]
    (folder / "1.png").write_bytes(b"x")
    assert fingerprint(source) != before[0] and fingerprint(str(folder)) != before[1]


@pytest.mark.parametrize("maximum", [65535, 4095])
def test_gray_images_of_16_bits_keep_their_range(maximum):
    values = np.array([[0, maximum // 2], [maximum, maximum // 4]], dtype=">u2")
    image = decode_image(b"P5 2 2 %d\n" % maximum + values.tobytes())
    assert np.asarray(image)[..., 0].tolist() == (values.astype(float) / maximum * 255).astype(int).tolist()
