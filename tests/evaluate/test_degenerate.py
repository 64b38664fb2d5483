"""Which scores are said to say nothing, held against what one slot over everything really scores."""

import numpy as np
import pytest
from clip_sets import make_clip_set

from pipeline.config.protocols import Protocol
from pipeline.evaluate.baselines import one_slot
from pipeline.evaluate.degenerate import score_warnings
from pipeline.evaluate.scoring import mean_scores, score_videos

SHAPE = (16, 16)
WHOLE, IN_CLIPS = Protocol("whole"), Protocol("clips", clip_frames=2)
WITH_BACKGROUND = Protocol("background", background="object")


def block(top, left, size=4):
    mask = np.zeros(SHAPE, bool)
    mask[top : top + size, left : left + size] = True
    return mask


ONE = [{1: block(0, 0)}, {1: block(2, 0)}, {}, {1: block(4, 4)}]
ANOTHER = [{7: block(8, 8)}] * 4
IN_TURN = [{1: block(0, 0)}, {1: block(0, 0)}, {2: block(8, 8)}, {2: block(8, 8)}]
TWO = [{1: block(0, 0), 2: block(8, 8)}] * 4
MANY = [{i: block(4 * (i // 4), 4 * (i % 4)) for i in range(9)}] * 4


def one_slots_scores(folder, videos, protocol):
    """Scores of one slot, and what is said of them."""
    frames = np.zeros((4, *SHAPE, 3), np.uint8)
    videos = {f"video {i}": (frames, masks) for i, masks in enumerate(videos)}
    clips = make_clip_set(folder, videos, clip_frames=2)
    annotated = [video for video in clips.videos if video.annotated]
    scores = mean_scores(score_videos(clips, annotated, lambda _: one_slot(1), protocol))
    return scores, score_warnings(clips, protocol)


@pytest.mark.parametrize("protocol", [WHOLE, IN_CLIPS])
def test_one_object_a_video_makes_fg_ari_perfect_for_one_slot(protocol, tmp_path):
    scores, (warning,) = one_slots_scores(tmp_path, [ONE, None, ANOTHER], protocol)
    assert scores["image_fg_ari"] == scores["video_fg_ari"] == 1
    assert warning == (
        "No video has more than one object, so FG-ARI says nothing here: one slot over everything scores 100."
    )


def test_one_object_at_a_time_does_so_for_frames_alone(tmp_path):
    scores, (warning,) = one_slots_scores(tmp_path, [ONE, IN_TURN], WHOLE)
    assert scores["image_fg_ari"] == 1 > scores["video_fg_ari"]
    assert warning.startswith("No frame has more than one object, so image FG-ARI says nothing here")


def test_one_video_with_two_objects_is_something_to_tell_slots_by(tmp_path):
    scores, warnings = one_slots_scores(tmp_path, [ONE, TWO, ONE], WHOLE)
    assert scores["image_fg_ari"] < 1
    assert warnings == ()


def test_the_background_as_an_object_is_half_the_mbo(tmp_path):
    scores, (warning,) = one_slots_scores(tmp_path, [ANOTHER, ANOTHER], WITH_BACKGROUND)
    assert scores["image_mbo"] == scores["video_mbo"] == pytest.approx(0.5)
    assert warning == (
        "The background counts as an object beside few others: one slot over everything already scores about 50.0 mBO."
    )


def test_the_background_is_one_of_many_objects(tmp_path):
    scores, warnings = one_slots_scores(tmp_path, [MANY, MANY], WITH_BACKGROUND)
    assert scores["image_mbo"] == pytest.approx(0.1)
    assert warnings == ()
