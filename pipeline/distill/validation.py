"""Scores of a model while it trains, on a few fixed videos, by the code and the protocol of `evaluate`."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from pipeline.clips.table import ClipSet
from pipeline.config import Evaluate
from pipeline.models import SlotModel
from pipeline.protocols import choose_protocol
from pipeline.scoring import SCORES, VideoScore, mean_scores, model_predictor, score_video


class Validation:
    """`evaluate.validation_videos` annotated videos, evenly spaced over the evaluation split.

    Raises ValueError where the split has no masks.
    """

    def __init__(self, clips_uri: str, settings: Evaluate) -> None:
        self.clips = ClipSet(clips_uri)
        self.protocol = choose_protocol(settings)
        annotated = [v for v in self.clips.videos if v.annotated]
        if not annotated:
            raise ValueError(f"{clips_uri} has no masks to validate on; use validate_every=0")
        count = min(settings.validation_videos, len(annotated))
        self.videos = [annotated[i] for i in np.linspace(0, len(annotated) - 1, count).round().astype(int)]

    def scores(self, model: SlotModel, rank: int, world_size: int) -> dict[str, float]:
        """Mean scores by name; every worker must call this, and each looks at its share of the videos."""
        own = [
            score_video(
                self.clips, video, model_predictor(model, video.video_id, self.protocol), self.protocol
            )
            for video in self.videos[rank::world_size]
        ]
        if world_size > 1:
            shares: list[list[VideoScore] | None] = [None] * world_size
            dist.all_gather_object(shares, own)
            own = [score for share in shares if share for score in share]
        means = mean_scores(own)
        return {f"validation_{name}": means[name] for name in SCORES}
