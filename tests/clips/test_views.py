import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import python

from pipeline.clips.views import View, apply_view, make_view
from pipeline.config import Targets

RANDOM = Targets(views=4, crop="random", min_scale=0.5, flip=0.5)
sizes = st.integers(1, 400)
seeds = st.integers(0, 2**31)
names = st.text(max_size=20)
recipes = st.builds(
    Targets, crop=st.sampled_from(["center", "random"]), min_scale=st.floats(0.01, 1), flip=st.floats(0, 1)
)


@given(recipes, seeds, names, st.integers(0, 1000), sizes, sizes)
def test_view_0_is_the_centre_square_without_a_flip(recipe, seed, video_id, clip, height, width):
    view = make_view(recipe, seed, video_id, clip, 0, height, width)
    short = min(height, width)
    assert (view.height, view.width, view.flip) == (short, short, False)
    assert abs((height - short) - 2 * view.top) <= 1
    assert abs((width - short) - 2 * view.left) <= 1


@given(recipes, seeds, names, st.integers(0, 1000), st.integers(0, 9), sizes, sizes)
def test_views_are_squares_inside_the_frame(recipe, seed, video_id, clip, k, height, width):
    view = make_view(recipe, seed, video_id, clip, k, height, width)
    assert view.height == view.width >= 1
    assert 0 <= view.top <= height - view.height
    assert 0 <= view.left <= width - view.width
    if k:
        assert view.height >= recipe.min_scale * min(height, width) - 0.5
    assert 0 <= view.noise_seed < 2**63
    pixels = apply_view(np.zeros((2, height, width, 3), np.uint8), view)
    assert pixels.shape == (2, view.height, view.width, 3)


def test_views_depend_on_seed_video_clip_and_number_alone():
    view = make_view(RANDOM, 1, "video", 2, 3, 120, 160)
    assert view == make_view(RANDOM, 1, "video", 2, 3, 120, 160)
    others = [(2, "video", 2, 3), (1, "video_", 2, 3), (1, "video", 3, 3), (1, "video", 2, 1)]
    assert all(make_view(RANDOM, *other, 120, 160) != view for other in others)
    # Nor may two of the parts run into each other.
    assert make_view(RANDOM, 1, "v", 11, 1, 120, 160) != make_view(RANDOM, 1, "v1", 1, 1, 120, 160)


def test_views_are_the_same_in_another_process():
    """Teacher and student run in processes, often on machines, of their own."""
    made = f"make_view(Targets(**{RANDOM.model_dump()!r}), 1, 'vidéo', 2, 3, 120, 160)"
    code = f"from pipeline.clips.views import make_view; from pipeline.config import Targets; print({made})"
    out, _ = python("-c", code, PYTHONHASHSEED="7")
    assert out.strip() == str(make_view(RANDOM, 1, "vidéo", 2, 3, 120, 160))


def test_views_vary():
    views = [make_view(RANDOM, 0, f"v{i}", 0, 1, 120, 160) for i in range(400)]
    assert 0.4 < np.mean([v.flip for v in views]) < 0.6
    assert len({(v.top, v.left, v.height) for v in views}) > 300
    assert min(v.height for v in views) < 65
    assert max(v.height for v in views) > 115
    assert len({v.noise_seed for v in views}) == 400


@pytest.mark.parametrize(("probability", "expected"), [(0.0, {False}), (1.0, {True})])
def test_flip_probability(probability, expected):
    recipe = Targets(flip=probability)
    assert {make_view(recipe, 0, f"v{i}", 0, 1, 8, 8).flip for i in range(50)} == expected


def test_centre_recipe_crops_the_centre_in_every_view():
    view = make_view(Targets(crop="center"), 0, "v", 0, 3, 100, 160)
    assert (view.top, view.left, view.height, view.width) == (0, 30, 100, 100)


def test_pixels_are_what_the_numbers_say():
    frames = np.random.default_rng(0).integers(0, 256, (2, 10, 12, 3), np.uint8)
    view = View(top=3, left=2, height=5, width=6, flip=False, noise_seed=0)
    np.testing.assert_array_equal(apply_view(frames, view), frames[:, 3:8, 2:8])
    flipped = apply_view(frames, View(3, 2, 5, 6, True, 0))
    for column in range(6):
        np.testing.assert_array_equal(flipped[:, :, column], frames[:, 3:8, 7 - column])
    assert View(**view.to_dict()) == view
