"""Scores of a model while it trains, on a few fixed videos, by the code and the protocol of `evaluate`."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from pipeline.clips.table import ClipSet, VideoEntry
from pipeline.config import ConfigError, Evaluate
from pipeline.config.protocols import choose_protocol
from pipeline.evaluate.backbones import VALIDATION_LIMIT, FeatureMemory, remembering
from pipeline.evaluate.baselines import Predictor
from pipeline.evaluate.scoring import (
    SCORES,
    VideoScore,
    boxes_of_samples,
    mean_scores,
    model_predictor,
    score_video,
)
from pipeline.models import VideoSegmenter


class Validation:
    """`evaluate.validation_videos` annotated videos, evenly spaced over those that are long enough for a sample.

    Raises ConfigError where there is none.
    """

    def __init__(self, clips_uri: str, settings: Evaluate) -> None:
        self.clips = ClipSet(clips_uri)
        self.protocol = choose_protocol(settings)
        usable = [v for v in self.clips.videos if v.annotated and v.frames >= self.protocol.clip_frames]
        if not usable:
            raise ConfigError(
                f"validate_every: evaluate.split = {settings.split!r} has no video with masks of at least "
                f"{max(1, self.protocol.clip_frames)} frames to score; use validate_every=0"
            )
        count = min(settings.validation_videos, len(usable))
        self.memory = FeatureMemory(VALIDATION_LIMIT)
        self.videos = [usable[i] for i in np.linspace(0, len(usable) - 1, count).round().astype(int)]

    def scores(self, model: VideoSegmenter, rank: int, world_size: int) -> dict[str, float]:
        """Mean scores by name, none where no object is in sight.

        Every worker must call this; each looks at its share of the videos.
        """
        with remembering(model, self.memory):
            own = [
                score_video(self.clips, video, self._predictor(model, video), self.protocol)
                for video in self.videos[rank::world_size]
            ]
        if world_size > 1:
            shares: list[list[VideoScore] | None] = [None] * world_size
            dist.all_gather_object(shares, own)
            own = [score for share in shares if share for score in share]
        if not any(score.image_samples for score in own):
            return {}
        means = mean_scores(own)
        return {f"validation_{name}": means[name] for name in SCORES}

    def _predictor(self, model: VideoSegmenter, video: VideoEntry) -> Predictor:
        given = boxes_of_samples(model, self.clips, video, self.protocol)
        return model_predictor(model, video.video_id, self.protocol, given)
