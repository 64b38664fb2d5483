"""Splits of a config's own, made of a listed one by the hashes of names."""

import hashlib

import pytest
from layout_sets import find
from layouts import WRITERS, of_split

from pipeline import storage
from pipeline.clips.library import artifacts_of, check_disjoint, check_held_out
from pipeline.config import ConfigError, load_config, resolve_config

SPLITS = {"validation": {"of": "val", "take": 4}, "test": {"of": "val", "skip": 4}}


def by_hash(names):
    return sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).hexdigest())


def ids(*arguments, **settings):
    return [video.video_id for video in find(*arguments, **settings)]


@pytest.mark.parametrize("kind", ["davis", "movi"])
def test_a_listed_split_is_split_by_the_hashes_of_its_names(kind, tmp_path):
    listed = "val" if kind == "davis" else "validation"
    names = list(of_split(WRITERS[kind](tmp_path, videos=12, frames=2), listed))
    assert len(names) == 11
    ordered, of = by_hash(names), {"of": listed}
    splits = {"a": {**of, "take": 3}, "b": {**of, "skip": 3, "take": 2}, "rest": {**of, "skip": 5}}
    found = {split: ids(kind, tmp_path, split, splits=splits) for split in splits}
    expected = {"a": set(ordered[:3]), "b": set(ordered[3:5]), "rest": set(ordered[5:])}
    # In the order of the list, as any split.
    assert found == {split: [n for n in names if n in expected[split]] for split in splits}
    assert found["a"] != names[:3], "the first names are not by chance those with the first hashes"
    assert ids(kind, tmp_path, "rest[1:3]", splits=splits) == found["rest"][1:3]
    assert ids(kind, tmp_path, listed, splits=splits) == names


def test_one_folder_of_videos_is_enough(tmp_path):
    names = [f"{letter}.mp4" for letter in "abcdefg"]
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"x")
    splits = {"train": {"of": "", "skip": 2}, "val": {"of": "", "take": 2}}
    parts = [ids("videos", tmp_path, split, splits=splits) for split in splits]
    assert set(parts[1]) == set(by_hash([name.removesuffix(".mp4") for name in names])[:2])
    assert sorted(parts[0] + parts[1]) == sorted(name.removesuffix(".mp4") for name in names)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"of": "val", "take": 12}, r"mine\.take: there are 11 videos of 'val', not 12 .*nearest valid: 11"),
        ({"of": "val", "skip": 9, "take": 3}, r"not 3 after 9; nearest valid: 2"),
        ({"of": "val", "skip": 11}, r"mine\.skip: 11 leaves none of the 11 videos .*nearest valid: 10"),
    ],
)
def test_videos_that_are_not_there(split, message, tmp_path):
    WRITERS["davis"](tmp_path, videos=12, frames=2)
    with pytest.raises(ConfigError, match=message):
        find("davis", tmp_path, "mine", splits={"mine": split})


def test_an_unknown_split_is_named_with_those_that_are_listed(tmp_path):
    WRITERS["davis"](tmp_path, frames=2)
    with pytest.raises(FileNotFoundError, match=r"split 'valid': .*; splits: test-dev, train, val"):
        find("davis", tmp_path, "mine", splits={"mine": {"of": "valid", "take": 1}})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"a": {"of": "val", "take": 8}, "b": {"of": "val", "skip": 7}},
            "dataset.splits.b.skip: 7 makes 'a' and 'b' share videos of 'val'; nearest valid: skip: 8",
        ),
        ({"a": {"of": "val"}, "b": {"of": "val"}}, "share videos of 'val'"),
        ({"val": {"of": "val", "take": 8}}, "dataset.splits.val.of: 'val' must be a split that the data set"),
        (
            {"a": {"of": "val[:8]"}},
            "dataset.splits.a.of: 'val[:8]' must be a whole split; nearest valid: val",
        ),
        ({"a": {"of": "val", "take": 0}}, "dataset.splits.a.take: 0 must be at least 1; nearest valid: 1"),
        ({"a": {"of": "val", "tale": 2}}, "dataset.splits.a.tale: unknown key (value 2); did you mean"),
        ({"a": {"take": 2}}, "dataset.splits.a.of: is missing"),
        ({"": {"of": "val"}}, "dataset.splits: '' is no name of a split"),
    ],
)
def test_splits_that_can_not_be(splits, message):
    with pytest.raises(ConfigError) as error:
        resolve_config({"dataset": {"kind": "davis", "splits": splits}})
    assert message in str(error.value)


def test_generated_videos_have_splits_of_their_own():
    with pytest.raises(ConfigError, match=r"dataset\.splits: generated videos have the splits train, valid"):
        resolve_config({"dataset": {"kind": "synthetic", "splits": {"mine": {"of": "train"}}}})


def davis(tmp_path, **settings):
    dataset = {"kind": "davis", "path": str(tmp_path / "DAVIS"), "splits": SPLITS, "split": "train"}
    return {"dataset": dataset, "storage": {"root": str(tmp_path / "runs")}, **settings}


def test_nothing_is_trained_on_and_scored(tmp_path):
    """A part of a split, and the whole of it or a slice."""
    WRITERS["davis"](tmp_path / "DAVIS", videos=12, frames=2)
    for training in ("val", "val[:6]", "validation[:1]"):
        values = davis(tmp_path, evaluate={"split": "validation"})
        values["dataset"]["split"] = training
        with pytest.raises(ConfigError, match="they would be trained on and scored"):
            check_disjoint(artifacts_of(resolve_config(values)))
    check_disjoint(artifacts_of(resolve_config(davis(tmp_path, evaluate={"split": "test"}))))


def test_nothing_is_chosen_on_what_is_held_out(tmp_path):
    WRITERS["davis"](tmp_path / "DAVIS", videos=12, frames=2)
    chosen = {"evaluate": {"split": "validation"}}
    check_held_out(artifacts_of(resolve_config(davis(tmp_path, **chosen, evidence={"split": "test"}))))
    whole = resolve_config(davis(tmp_path, **chosen, evidence={"split": "val"}))
    with pytest.raises(ConfigError, match=r"'val' and evaluate\.split 'validation' share 4"):
        check_held_out(artifacts_of(whole))


def test_the_clips_of_a_split_are_known_by_their_videos(tmp_path):
    """A setting that only chooses makes no other clip set of videos that were there before."""
    WRITERS["davis"](tmp_path / "DAVIS", videos=12, frames=2)
    config = resolve_config(davis(tmp_path))
    plain = resolve_config(davis(tmp_path), ["dataset.splits={}"])
    assert artifacts_of(config).clips.uri == artifacts_of(plain).clips.uri
    all_of_it = resolve_config(davis(tmp_path), ["dataset.splits={all: {of: val}}"])
    assert artifacts_of(all_of_it).clips_of("all").uri == artifacts_of(plain).clips_of("val").uri
    uris = {artifacts_of(config).clips_of(split).uri for split in ("val", "validation", "test")}
    assert len(uris) == 3


def test_the_shipped_davis_setting_splits_val_by_hash():
    dataset = load_config("configs/davis_small.yaml").dataset
    assert dataset.split == "train"
    assert {name: split.of for name, split in dataset.splits.items()} == {"validation": "val", "test": "val"}
    names = by_hash(f"video {i}" for i in range(20))
    assert names[dataset.splits["validation"].part] == names[:8]
    assert names[dataset.splits["test"].part] == names[8:]


@pytest.mark.parametrize(
    ("chosen", "shared"),
    [
        ({"split": ""}, "'test' and dataset.split '' share 3"),
        (
            {"split": "some", "splits": {"some": {"of": "", "skip": 1}}},
            "'test' and dataset.split 'some' share",
        ),
    ],
)
def test_a_folder_within_the_one_that_is_trained_on_is_not_held_out(chosen, shared, tmp_path):
    for folder in ("train", "val", "test"):
        for letter in "abc":
            storage.write_bytes(str(tmp_path / "videos" / folder / f"{letter}.mp4"), b"x")
    config = resolve_config(
        {
            "dataset": {"kind": "videos", "path": str(tmp_path / "videos"), **chosen},
            "evaluate": {"split": "val"},
            "evidence": {"split": "test"},
            "storage": {"root": str(tmp_path / "runs")},
        }
    )
    check_disjoint(artifacts_of(config))  # the folder for evaluation is left out of what is trained on
    with pytest.raises(ConfigError, match=shared):
        check_held_out(artifacts_of(config))
    apart = config.model_copy(update={"dataset": config.dataset.model_copy(update={"split": "train"})})
    check_held_out(artifacts_of(apart))
