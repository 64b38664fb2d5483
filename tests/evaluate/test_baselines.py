import numpy as np
import pytest

from pipeline.evaluate.baselines import BASELINES, colour_kmeans, grid, one_slot


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
