"""Scores of a streamed video are those of the metrics on the whole of it, under every rule of a protocol."""

import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_sets import make_clip_set, random_clips, random_video
from tiny_models import tiny_model

from pipeline.clips.library import artifacts_of
from pipeline.clips.schema import stack_masks
from pipeline.config import Config, Evaluate
from pipeline.config.protocols import PRESETS
from pipeline.evaluate.baselines import grid
from pipeline.evaluate.scoring import mean_scores, model_predictor, score_video, score_videos
from pipeline.metrics import fg_ari, mean_best_overlap

WHOLE = PRESETS["slotcontrast"]
METRICS = {"fg_ari": fg_ari, "mbo": mean_best_overlap}


@pytest.fixture
def video():
    return random_video(np.random.default_rng(0), frames=11)


@pytest.fixture
def clips(video, tmp_path):
    return make_clip_set(tmp_path, {"v": video})


def noisy_labels(predictions):
    """A predictor that gives these labels, whatever it sees."""

    def predict(chunks, size):
        start = 0
        for frames in chunks:
            yield predictions[start : start + len(frames)]
            start += len(frames)

    return predict


def expected(masks, labels, **flags):
    """All four scores straight from the metrics, on bool arrays (T, C, H, W) of all objects."""
    ids = sorted({i for frame in masks for i in frame})
    true = torch.from_numpy(stack_masks(masks, ids, labels.shape[1:]))[None]
    return {
        f"{level}_{name}": metric(true, torch.from_numpy(labels)[None], level=level, **flags)
        for name, metric in METRICS.items()
        for level in ("image", "video")
    }


def crop(masks, box):
    return [{i: m[box] for i, m in frame.items() if m[box].any()} for frame in masks]


SQUARE = (slice(0, 24), slice(4, 28))


def random_labels(*size):
    return np.random.default_rng(1).integers(0, 4, (11, *size), dtype=np.uint8)


@pytest.mark.parametrize(("part", "box"), [("central", SQUARE), ("full", (slice(None), slice(None)))])
def test_a_whole_video_in_one_sample(clips, video, part, box):
    masks = crop(video[1], box)
    labels = random_labels(24, 24 if part == "central" else 32)
    score = score_video(clips, clips.videos[0], noisy_labels(labels), replace(WHOLE, crop=part))
    for name, value in expected(masks, labels).items():
        assert getattr(score, name) == pytest.approx(value, abs=1e-12)
    assert score.video_samples == 1
    assert score.image_samples == sum(bool(f) for f in masks) < 11


@pytest.mark.parametrize("frames", [3, 4, 6])
def test_clips_start_anew_and_a_tail_is_left_out(clips, video, frames):
    """Also where they are not cut as the clips on disk are (4 frames)."""
    started = []

    def predict(chunks, size):
        started.append(0)
        for chunk in chunks:
            started[-1] += len(chunk)
            yield np.full((len(chunk), *size), len(started), np.uint8) * (np.arange(size[1]) > 9)

    score = score_video(clips, clips.videos[0], predict, replace(WHOLE, clip_frames=frames))
    assert started == [frames] * (11 // frames)
    masks = crop(video[1], SQUARE)
    samples = []
    for n in range(11 // frames):
        labels = np.broadcast_to((n + 1) * (np.arange(24) > 9), (frames, 24, 24)).astype(np.uint8)
        samples.append(expected(masks[n * frames : (n + 1) * frames], labels))
    assert score.video_samples == len(samples)
    assert score.video_mbo == pytest.approx(np.mean([s["video_mbo"] for s in samples]))
    assert score.video_fg_ari == pytest.approx(np.mean([s["video_fg_ari"] for s in samples]))


def test_masks_of_another_size(clips, video):
    labels = random_labels(10, 10)
    score = score_video(clips, clips.videos[0], noisy_labels(labels), replace(WHOLE, mask_size=10))

    def resized(mask):
        image = torch.from_numpy(mask).float()[None, None]
        return F.interpolate(image, (10, 10), mode="nearest-exact")[0, 0].bool().numpy()

    masks = [{i: resized(m) for i, m in frame.items()} for frame in crop(video[1], SQUARE)]
    masks = [{i: m for i, m in frame.items() if m.any()} for frame in masks]
    for name, value in expected(masks, labels).items():
        assert getattr(score, name) == pytest.approx(value, abs=1e-12)


def test_overlaps_left_out_and_background_as_an_object(clips, video):
    labels = random_labels(24, 24)
    masks = crop(video[1], SQUARE)

    def scored(**rules):
        return score_video(clips, clips.videos[0], noisy_labels(labels), replace(WHOLE, **rules))

    overlaps = expected(masks, labels, ignore_overlaps=True)
    assert overlaps["video_mbo"] != pytest.approx(expected(masks, labels)["video_mbo"])
    assert scored(ignore_overlaps=True).video_mbo == pytest.approx(overlaps["video_mbo"])
    empty = np.zeros((24, 24), bool)
    with_background = [{**frame, 99: ~np.logical_or.reduce([*frame.values(), empty])} for frame in masks]
    background = scored(background="object")
    assert background.video_mbo == pytest.approx(expected(with_background, labels)["video_mbo"])
    assert background.image_samples == 11, "a frame of background alone is scored"


@pytest.fixture(scope="module")
def model():
    return tiny_model(4, 16)


@pytest.mark.parametrize("rollout", ["forward", "cyclic"])
@pytest.mark.parametrize("masks", ["decoder", "attention"])
def test_a_model_is_scored_by_its_own_masks(clips, video, model, rollout, masks):
    """Streamed clip by clip, the labels are those of one pass over the whole video."""
    protocol = replace(WHOLE, rollout=rollout, masks=masks)
    frames = video[0][:, :, 4:28]
    with torch.no_grad():
        output = model(model.prepare([frames]), rollout=rollout)
    soft = output.masks if masks == "decoder" else output.attention
    labels = model.label_maps(soft[0], (24, 24)).numpy()
    predict = model_predictor(model, "v", protocol)
    streamed = list(predict(iter([frames[:4], frames[4:8], frames[8:]]), (24, 24)))
    np.testing.assert_array_equal(np.concatenate(streamed), labels)
    score = score_video(clips, clips.videos[0], predict, protocol)
    assert score.video_mbo == pytest.approx(expected(crop(video[1], SQUARE), labels)["video_mbo"])


def test_the_mean_weighs_image_scores_by_frames_and_skips_videos_without_objects(tmp_path):
    rng = np.random.default_rng(0)
    long, short = random_video(rng, frames=9), random_video(rng, frames=2)
    empty = (short[0], [{}, {}])
    clips = make_clip_set(tmp_path, {"long": long, "short": short, "empty": empty})
    scores = [score_video(clips, video, grid(4), WHOLE) for video in clips.videos]
    means = mean_scores(scores)
    assert means["video_mbo"] == pytest.approx((scores[0].video_mbo + scores[1].video_mbo) / 2)
    weights = [s.image_samples for s in scores[:2]]
    assert weights[0] > weights[1] > 0
    assert means["image_mbo"] == pytest.approx(np.average([s.image_mbo for s in scores[:2]], weights=weights))
    assert np.isnan(scores[2].video_mbo)
    with pytest.raises(ValueError, match="not one video has an annotated object"):
        mean_scores(scores[2:])


def test_a_changed_rule_changes_the_name_and_the_fingerprint(clips):
    def described(**settings):
        return artifacts_of(Config(evaluate=Evaluate(**settings))).rules_on(clips.uri)

    plain = described(protocol="slotcontrast")
    assert plain.name == "slotcontrast"
    assert described(protocol="slotcontrast", crop="central") == plain, "a rule that is the preset's own"
    changed = described(protocol="slotcontrast", ignore_overlaps=True, masks="attention")
    assert changed.name == "slotcontrast, ignore_overlaps=True, masks=attention"
    assert changed.fingerprint != plain.fingerprint
    assert "overlaps left out" in changed.in_words
    in_clips = described(protocol="slotcontrast", clip_frames=4)
    assert in_clips.fingerprint == described(protocol="paper").fingerprint
    assert described(protocol="videosaur").mask_size == 224
    assert described(protocol="paper", clip_frames=0).fingerprint == plain.fingerprint


def test_memory_does_not_grow_with_the_video(tmp_path):
    """Of each further frame two numbers are kept, and not its pixels (12 kB), masks or labels (4 kB each)."""
    peaks = []
    for frames in (32, 320):
        clips = random_clips(tmp_path / str(frames), {"v": frames}, size=(64, 64))
        score_video(clips, clips.videos[0], grid(4), WHOLE)  # what is kept for ever is there now
        tracemalloc.start()
        score_video(clips, clips.videos[0], grid(4), WHOLE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < (320 - 32) * 1000


def test_videos_in_one_pass_score_as_one_by_one(tmp_path, monkeypatch):
    """Also where samples end in the middle of a stored clip, and a tail is left over; a model never runs in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    clips = random_clips(tmp_path, {"a": 9, "b": 2, "c": 11})
    seen, allowed = [], []

    def predictor(video):
        def predict(chunks, size):
            for frames in chunks:
                seen.append((video.video_id, len(frames)))
                allowed.append(torch.backends.cudnn.allow_tf32)
                yield np.random.default_rng(len(seen)).integers(0, 4, (len(frames), *size), dtype=np.uint8)

        return predict

    for protocol in (WHOLE, replace(WHOLE, clip_frames=3)):
        together = score_videos(clips, clips.videos, predictor, protocol)
        del seen[:]
        alone = [
            score for video in clips.videos for score in score_videos(clips, [video], predictor, protocol)
        ]
        del seen[:]
        assert [score.video_id for score in together] == ["a", "b", "c"]
        np.testing.assert_equal([asdict(score) for score in together], [asdict(score) for score in alone])
    assert not any(allowed)
    assert torch.backends.cudnn.allow_tf32


def test_a_damaged_shard_is_named(tmp_path):
    clips = random_clips(tmp_path, {"a": 9, "b": 9})
    path = tmp_path / "data" / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    content[start : start + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00000.parquet: row group \d is damaged"):
        score_videos(clips, clips.videos, lambda _: grid(4), WHOLE)


def test_what_a_model_and_the_counting_raise_is_raised(clips):
    def fails(chunks, size):
        next(chunks)
        raise MemoryError("of the model")
        yield

    def of_another_size(chunks, size):
        for frames in chunks:
            yield np.zeros((len(frames) - 1, *size), np.uint8)

    with pytest.raises(MemoryError, match="of the model"):
        score_video(clips, clips.videos[0], fails, WHOLE)
    with pytest.raises(ValueError, match=r"predicted \(1, 3, 24, 24\)"):
        score_video(clips, clips.videos[0], of_another_size, WHOLE)
