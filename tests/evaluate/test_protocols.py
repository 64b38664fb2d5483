"""The rules that the protocols of the rivals' authors have of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from clip_sets import make_clip_set, random_clips, random_video

from pipeline.artifacts.manifests import Rules
from pipeline.clips.schema import stack_masks
from pipeline.config import Config, Evaluate
from pipeline.config.protocols import PRESETS, choose_protocol
from pipeline.evaluate.scoring import (
    SCORES,
    mean_scores,
    recorded_protocol,
    score_table,
    score_video,
    score_videos,
)
from pipeline.evaluate.table import plain_text
from pipeline.metrics import count_overlaps, fg_ari, matched_scores, mean_best_overlap
from pipeline.report.gallery import video_panel

SIZE = (24, 32)


def quarters(seen=None):
    """A predictor of four slots, which tells what it sees and at which size it is asked for labels."""

    def predict(chunks, size):
        rows, columns = (np.arange(side) * 2 // side for side in size)
        for frames in chunks:
            if seen is not None:
                seen.append((frames, size))
            yield np.broadcast_to(2 * rows[:, None] + columns, (len(frames), *size)).astype(np.uint8)

    return predict


def labels_of(frames, size):
    return np.concatenate(list(quarters()([np.zeros((frames, 1, 1, 3), np.uint8)], size)))


def true_masks(masks, ids, size=SIZE):
    """Those of these objects `(1, T, C, H, W)`."""
    kept = [{i: mask for i, mask in frame.items() if i in ids} for frame in masks]
    return torch.from_numpy(stack_masks(kept, ids, size))[None]


@pytest.fixture
def video():
    return random_video(np.random.default_rng(3), frames=9)


def test_solv_matches_slots_to_objects_of_the_first_frame(tmp_path, video):
    """Over all frames of a video, wherever its clips end, and whichever objects a clip has."""
    masks = video[1]
    masks[0].pop(1, None)
    ids = sorted(masks[0])
    assert ids
    assert any(1 in frame for frame in masks[1:])
    clips = make_clip_set(tmp_path, {"v": video})
    score = score_video(clips, clips.videos[0], quarters(), PRESETS["solv"])

    true, predicted = true_masks(masks, ids), torch.from_numpy(labels_of(9, SIZE))[None]
    expected = matched_scores(count_overlaps(true, predicted))
    assert score.objects == len(ids)
    assert score.matched_miou == pytest.approx(expected.ious.mean().item())
    assert score.matched_fg_ari == pytest.approx(expected.fg_ari[expected.valid].mean().item())
    assert score.video_mbo == pytest.approx(mean_best_overlap(true, predicted, level="video"))
    assert score.image_fg_ari == pytest.approx(fg_ari(true, predicted, level="image"))


def test_matched_scores_are_means_over_videos_and_over_objects(tmp_path):
    rng = np.random.default_rng(0)
    one, three = (random_video(rng, frames=5, objects=n) for n in (1, 3))
    clips = make_clip_set(tmp_path, {"1": one, "3": three, "none": (one[0], [{}] * 5)})
    protocol = replace(PRESETS["solv"], objects="all")
    scores = score_videos(clips, clips.videos, lambda _: quarters(), protocol)
    assert [score.objects for score in scores] == [1, 3, 0]
    assert np.isnan([scores[2].matched_miou, scores[2].matched_fg_ari]).all()
    means = mean_scores(scores)
    assert means["matched_miou"] == pytest.approx((scores[0].matched_miou + 3 * scores[1].matched_miou) / 4)
    assert means["matched_fg_ari"] == pytest.approx((scores[0].matched_fg_ari + scores[1].matched_fg_ari) / 2)

    title, _ = plain_text(score_table([("grid", means)])).splitlines()
    assert title.split("video mBO")[1].split() == [
        "matched",
        "FG-ARI",
        "matched",
        "mIoU",
        "slots",
        "in",
        "use",
    ]
    plain = mean_scores(score_videos(clips, clips.videos, lambda _: quarters(), PRESETS["slotcontrast"]))
    assert list(plain) == [*SCORES, "slots_in_use"]
    assert "matched" not in plain_text(score_table([("grid", plain)]))


def test_black_borders_are_cut_off_of_frames_and_masks(tmp_path):
    """One box for all frames: a row that is lit in one of them stays, as does a dark row between lit ones."""
    frames, masks = random_video(np.random.default_rng(5), frames=6, size=(30, 40))
    masks = [{i: m & (np.arange(40) > 8) for i, m in frame.items()} for frame in masks]
    frames[:, :4], frames[:, 25:], frames[:, :, :3], frames[:, :, 36:], frames[:, 12] = 0, 0, 0, 0, 0
    frames[:, 0, ::2] = 1  # a mean of a half
    frames[4, 3, 10:30] = 90
    clips = make_clip_set(tmp_path, {"v": (frames, masks)})
    seen = []
    score = score_video(clips, clips.videos[0], quarters(seen), PRESETS["solv"])
    box = (slice(3, 25), slice(3, 36))
    np.testing.assert_array_equal(np.concatenate([f for f, _ in seen]), frames[:, box[0], box[1]])
    assert {size for _, size in seen} == {(22, 33)}
    cut = [{i: m[box] for i, m in frame.items()} for frame in masks]
    true = true_masks(cut, sorted(i for i, m in cut[0].items() if m.any()), (22, 33))
    expected = mean_best_overlap(true, torch.from_numpy(labels_of(6, (22, 33)))[None], level="video")
    assert score.video_mbo == pytest.approx(expected)
    panel = video_panel(clips, clips.videos[0], {"truth": None}, "", PRESETS["solv"])
    assert panel.frames.shape == (6, 22, 33, 3)


def test_nothing_is_cut_off_of_a_black_video(tmp_path, video):
    clips = make_clip_set(tmp_path, {"v": (0 * video[0], video[1])})
    seen = []
    score_video(clips, clips.videos[0], quarters(seen), PRESETS["solv"])
    assert {size for _, size in seen} == {SIZE}


def test_diod_leaves_out_small_objects_and_clips_of_fewer_than_two(tmp_path):
    """In clips of five whole frames, with masks of a quarter; the tail of two frames is left out."""

    def frame(**sides):
        masks = {}
        for i, side in sides.items():
            masks[int(i[1:])] = np.zeros((42, 64), bool)
            masks[int(i[1:])][:side, 20 * int(i[1:]) :][:, :20] = True
        return masks

    # 26 rows of 20 pixels are more than 500, 25 are not.
    two, one, small = frame(o0=26, o1=30), frame(o0=26), frame(o0=26, o1=25)
    masks = [*[two] * 3, small, small, *[small] * 5, *[one] * 5, two, two]
    clips = make_clip_set(tmp_path, {"v": (np.full((17, 42, 64, 3), 9, np.uint8), masks)})
    seen = []
    score = score_video(clips, clips.videos[0], quarters(seen), PRESETS["diod"])
    assert {size for _, size in seen} == {(11, 16)}
    assert [sum(len(f) for f, _ in seen), seen[0][0].shape[1:3]] == [15, (42, 64)]
    assert (score.video_samples, score.image_samples) == (1, 5)
    # Rows and columns of the clips under the centres of the quarter's pixels.
    rows, columns = (np.arange(11) + 0.5) * 42 / 11, (np.arange(16) + 0.5) * 64 / 16
    shrunk = [{i: m[rows.astype(int)[:, None], columns.astype(int)] for i, m in f.items()} for f in masks[:5]]
    shrunk[3:] = [{0: f[0]} for f in shrunk[3:]]
    true, predicted = true_masks(shrunk, [0, 1], (11, 16)), torch.from_numpy(labels_of(5, (11, 16)))[None]
    assert score.video_fg_ari == pytest.approx(fg_ari(true, predicted, level="video"))
    only_small = score_video(
        clips, clips.videos[0], quarters(), replace(PRESETS["diod"], min_object_area=9999)
    )
    with pytest.raises(ValueError, match="not one video has an annotated object"):
        mean_scores([only_small])


@pytest.mark.parametrize(("name", "frames"), [("savi", [9]), ("steve", [6])])
def test_savi_and_steve_score_at_128_pixels(name, frames, tmp_path):
    clips = random_clips(tmp_path, {"v": 9})
    seen = []
    score = score_video(clips, clips.videos[0], quarters(seen), PRESETS[name])
    assert {size for _, size in seen} == {(128, 128)}
    assert sum(len(f) for f, _ in seen) == sum(frames)
    assert score.video_samples == 1


@pytest.mark.parametrize("name", PRESETS)
def test_a_protocol_is_read_from_its_record_again(name):
    protocol = choose_protocol(Evaluate(protocol=name))
    assert protocol == PRESETS[name]
    rules = Rules(**vars(protocol), fingerprint="f00", in_words=protocol.in_words())
    assert recorded_protocol(Rules.model_validate_json(rules.model_dump_json())) == protocol


def test_what_a_protocol_says_of_itself():
    said = {name: protocol.in_words() for name, protocol in PRESETS.items()}
    assert said["slotcontrast"] == (
        "whole videos, central square, masks as large as the clips, background ignored, overlaps kept, "
        "forward roll-out, masks from the decoder"
    )
    assert said["solv"].endswith("objects of the first frame alone, slots also matched one to one to objects")
    assert "masks at 1/4 of the size of the clips" in said["diod"]
    assert said["diod"].endswith("objects of at least 501 pixels, samples of at least 2 objects")
    changed = choose_protocol(Config(evaluate=Evaluate(protocol="diod", min_objects=0)).evaluate)
    assert changed.name == "diod, min_objects=0"
