"""Video files that are made here, with PyAV."""

import os

import av
import numpy as np

RED, BLUE, WHITE = (200, 20, 20), (20, 20, 200), (250, 250, 250)


def picture(height=64, width=96, shade=0):
    """Red on the left, blue on the right, a white square in the top left corner."""
    image = np.empty((height, width, 3), np.uint8)
    image[:, : width // 2], image[:, width // 2 :] = RED, BLUE
    image[: height // 4, : height // 4] = WHITE
    return np.clip(image.astype(int) + shade, 0, 255).astype(np.uint8)


def write_video(
    path, frames, codec="libx264", pix_fmt="yuv420p", rate=10, pts=None, rotation=None, **options
):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = pts[index] if pts else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # SVT-AV1 makes a process of root's a real-time one, which starves all others from then on.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_noise(path, count, size=(48, 64), **options):
    """A video with enough bytes in it to be cut."""
    frames = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    return write_video(path, list(frames), **options)
