import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from pipeline.evaluate.baselines import BASELINES, colour_kmeans, feature_kmeans, grid, one_slot
from pipeline.models.pixels import label_maps


def run(predictor, *chunks, size=None):
    size = size or chunks[0].shape[1:3]
    predictions = list(predictor(iter(chunks), size))
    for labels, chunk in zip(predictions, chunks, strict=True):
        assert labels.shape == (len(chunk), *size)
    return predictions


@pytest.mark.parametrize("num_slots", [1, 3, 7, 15])
@pytest.mark.parametrize("name", list(BASELINES))
def test_labels_are_slots(name, num_slots):
    rng = np.random.default_rng(0)
    labels = run(BASELINES[name](num_slots), *rng.integers(0, 256, (2, 3, 20, 30, 3), np.uint8))
    used = np.unique(labels)
    assert used.max() < num_slots
    assert len(used) == (1 if name == "one slot" else num_slots)


def test_one_slot():
    (labels,) = run(one_slot(5), np.zeros((2, 4, 6, 3), np.uint8))
    assert (labels == 0).all()


def test_grid_is_blocks_of_equal_size():
    (labels,) = run(grid(6), np.zeros((2, 20, 30, 3), np.uint8))  # two rows of three
    np.testing.assert_array_equal(labels[0], labels[1])
    np.testing.assert_array_equal(labels[0, ::10, ::10], [[0, 1, 2], [3, 4, 5]])
    assert np.bincount(labels[0].ravel()).tolist() == [100] * 6


def test_colour_kmeans_keeps_a_colours_label_through_the_video():
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    truth = np.random.default_rng(0).integers(0, 3, (2, 4, 12, 10))
    first, second = run(colour_kmeans(3), *colours[truth])
    names = [first[truth[0] == i][0] for i in range(3)]
    assert sorted(names) == [0, 1, 2]
    np.testing.assert_array_equal(first, np.array(names)[truth[0]])
    np.testing.assert_array_equal(second, np.array(names)[truth[1]])


@pytest.mark.parametrize("name", list(BASELINES))
def test_labels_of_another_size_than_the_frames(name):
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    run(BASELINES[name](4), frames, size=(7, 9))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:One of the clusters is empty")
def test_colour_kmeans_of_a_grey_video():
    """Fewer colours than slots is no error."""
    (labels,) = run(colour_kmeans(5), np.full((2, 8, 8, 3), 128, np.uint8))
    assert len(np.unique(labels)) == 1


class FeaturesAreColours:
    """Stands in for a model whose backbone gives the mean colour of each of 4 x 4 patches."""

    def prepare(self, clips):
        return torch.stack([torch.from_numpy(frames).float() / 255 for frames in clips])

    def backbone_features(self, video_BTHWC):
        patches = video_BTHWC.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5))
        return patches.flatten(2, 3)

    def label_maps(self, masks_TNP, size):
        return label_maps(masks_TNP, (4, 4), size)


def patchwork(clusters, rng, *, between=60):
    """Frames of 16 x 16 in 4 x 4 patches, whose colours are near to those of their clusters `(T, 4, 4)`."""
    centres = between * np.stack([np.arange(8), (np.arange(8) * 3) % 8, (np.arange(8) * 5) % 8], 1) // 2
    frames = np.kron(centres[clusters], np.ones((4, 4, 1)))
    return (frames + rng.integers(0, 4, frames.shape)).astype(np.uint8)


def test_feature_kmeans_finds_clusters_that_the_first_chunk_does_not_have():
    """All frames are clustered together, and a patch of a cluster is the same slot in each of them."""
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 2, (6, 4, 4))
    clusters[3:] = rng.integers(1, 3, (3, 4, 4))
    frames = patchwork(clusters, rng)
    model = FeaturesAreColours()
    parts = run(feature_kmeans(model, 3), frames[:3], frames[3:5], frames[5:])
    labels = np.concatenate(parts)
    inside = labels[:, 1::4, 1::4], labels[:, 2::4, 2::4]  # where enlarged masks are their own patch's
    names = {cluster: {int(x) for part in inside for x in part[clusters == cluster]} for cluster in range(3)}
    assert sorted(map(len, names.values())) == [1, 1, 1]
    assert set.union(*names.values()) == {0, 1, 2}
    again = run(feature_kmeans(model, 3), frames[:1], frames[1:])
    np.testing.assert_array_equal(np.concatenate(again), labels)


def test_feature_kmeans_of_a_models_own_features_is_the_nearest_centre():
    """Every patch is in the cluster whose mean is nearest, which ends Lloyd's algorithm."""
    model = tiny_model(3)
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    (labels,) = run(feature_kmeans(model, 3), frames, size=model.grid)
    with torch.no_grad():
        features = model.backbone_features(model.prepare([frames]))[0].flatten(0, 1)
    flat = torch.from_numpy(labels).flatten()
    means = torch.stack([features[flat == n].mean(0) for n in range(3)])
    assert torch.equal(torch.cdist(features, means).argmin(1), flat.long())
