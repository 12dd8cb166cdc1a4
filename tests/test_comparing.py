"""The counts of every photo, and what is made of two of them: a difference and how sure it is."""

import numpy as np
import pytest
import torch

from comparing import (
    METRICS,
    Counts,
    Difference,
    between_seeds,
    check_same_photos,
    difference,
    intervals,
    mIoU,
    read_counts,
    resample,
    values,
    verdicts,
    write_counts,
)
from model import UserError
from model.metrics import ConfusionMatrix, sparse

NAMES = ["sky", "sea", "boat", "gull"]


def photos(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and labels (N, 6, 8) with void; the last class is predicted, but in no label."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count, 6, 8), generator=rng)
    other = torch.randint(4, labels.shape, generator=rng)
    predictions = torch.where(torch.rand(labels.shape, generator=rng) < 0.3, other, labels)
    return predictions, torch.where(torch.rand(labels.shape, generator=rng) < 0.1, 255, labels)


def written(file, predictions, labels):
    counts = [sparse(each) for each in ConfusionMatrix(len(NAMES)).update(predictions, labels)]
    write_counts(file, [f"photo{number}" for number in range(len(labels))], NAMES, counts)
    return file


def simulated(rng: np.random.Generator, photos: int, *, quality: float, shared: np.ndarray | None = None) -> Counts:
    """Counts of photos of some classes of some sizes, of which a share that differs from photo to photo is hit."""
    labelled = rng.integers(0, 100, (photos, 4)) * (rng.random((photos, 4)) < 0.6) if shared is None else shared
    hits = (labelled * np.clip(rng.normal(quality, 0.25, (photos, 4)), 0, 1)).astype(np.int64)
    pixels, classes = np.zeros((photos, 4, 4), np.int64), np.arange(4)
    pixels[:, classes, classes] = hits
    pixels[:, classes, (classes + 1) % 4] = labelled - hits
    return Counts([str(n) for n in range(photos)], NAMES, pixels)


# ---------------------------------------------------------------------------------------- counts of every photo


def test_the_counts_of_the_photos_add_up_to_the_confusion_matrix(tmp_path):
    predictions, labels = photos(10, seed=0)
    labels[1] = 255
    matrix = ConfusionMatrix(4)
    matrix.update(predictions, labels)
    file = written(tmp_path / "counts.npz", predictions, labels)
    assert file.read_bytes() == written(tmp_path / "again.npz", predictions, labels).read_bytes()
    counts = read_counts(file)
    assert counts.ids[3] == "photo3" and counts.class_names == NAMES
    assert counts.pixels.sum(0).tolist() == matrix.matrix.tolist()
    assert counts.are_of(matrix.compute()["pixel_accuracy"]) and not counts.are_of(0.5) and not counts.are_of(None)
    assert np.isnan(mIoU(counts.pixels)).tolist() == [index == 1 for index in range(10)]


def test_damaged_counts_are_named(tmp_path):
    file = written(tmp_path / "counts.npz", *photos(4, seed=3))
    content, sound, rng = file.read_bytes(), read_counts(file), np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", ids=np.array(["a"]))
    broken = [b"junk", content[: len(content) // 2], (tmp_path / "other.npz").read_bytes()]
    for _ in range(100):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        broken.append(flipped)
    for number, damaged in enumerate(broken):
        file.write_bytes(damaged)
        try:
            assert read_counts(file).pixels.tolist() == sound.pixels.tolist() and number > 2
        except UserError as error:
            assert f"{file} is damaged (" in str(error) and "\n" not in str(error)
    file.unlink()
    with pytest.raises(UserError, match=r"no .*counts\.npz; evaluate"):
        read_counts(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_names": ["sky", "sea", "boat", "tern"]}, "a and b have different classes"),
        ({"ids": ["0", "1", "x"]}, "a and b were scored on different photos, or in another order"),
        ({"pixels": 1}, "different masks of 0"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said_by_name(change, said):
    run = simulated(np.random.default_rng(5), 3, quality=0.5)
    if "pixels" in change:
        change = {"pixels": run.pixels + 1}
    with pytest.raises(UserError, match=said):
        check_same_photos(run, Counts(**vars(run) | change), ("a", "b"))


# ---------------------------------------------------------------------------------------- metrics


def test_the_classes_that_count_are_those_in_the_labels(tmp_path):
    predictions, labels = photos(6, seed=4)
    assert (predictions == 3).any() and not (labels == 3).any()
    pixels = read_counts(written(tmp_path / "counts.npz", predictions, labels)).pixels
    valid = labels != 255
    pairs = [((predictions == c) & valid, labels == c) for c in range(3)]
    expected = [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]
    assert values(pixels.sum(0))[1:].tolist() == pytest.approx([*expected, np.nan], nan_ok=True)
    assert mIoU(pixels.sum(0)) == pytest.approx(np.mean(expected))


def test_mIoU_takes_counts_of_one_and_of_many_alike():
    pixels = simulated(np.random.default_rng(7), 12, quality=0.5).pixels.reshape(3, 4, 4, 4)
    pixels[1, 2] = 0
    values = mIoU(pixels)
    assert values.shape == (3, 4) and np.isnan(values[1, 2]) and np.nanmax(values) <= 1
    np.testing.assert_array_equal(values, [[mIoU(each) for each in row] for row in pixels])


# ---------------------------------------------------------------------------------------- differences


def compared(ours: list[Counts], baseline: list[Counts], **options) -> tuple[Difference, list[Difference | None]]:
    drawn = resample([*ours, *baseline], **options)
    whole, *classes = difference(drawn[: len(ours)], drawn[len(ours) :])
    return whole, classes


def test_a_better_run_is_better_and_the_other_way_round_worse():
    rng = np.random.default_rng(1)
    good = simulated(rng, 80, quality=0.7)
    poor = simulated(rng, 80, quality=0.4, shared=good.labelled)
    up, classes = compared([good], [poor], resamples=500)
    down, _ = compared([poor], [good], resamples=500)
    assert up.value == pytest.approx(mIoU(good.pixels.sum(0)) - mIoU(poor.pixels.sum(0))) and up.value == -down.value
    assert 0 < up.low < up.value < up.high and (up.low, up.high) == pytest.approx((-down.high, -down.low), abs=0.02)
    assert verdicts({"up": up}) == {"up": "better"} and verdicts({"down": down}) == {"down": "worse"}
    assert [each is not None and each.value > 0 for each in classes] == [True] * 4
    assert compared([good], [poor], resamples=500)[0] == up, "the same seed, the same interval"


def test_the_same_run_does_not_differ_from_itself_and_a_class_that_is_nowhere_has_no_difference():
    run = simulated(np.random.default_rng(2), 30, quality=0.5)
    run.pixels[:, 2] = run.pixels[:, :, 2] = 0
    whole, classes = compared([run], [run], resamples=50)
    assert whole == (0, 0, 0, 1) and verdicts({"it": whole}) == {"it": "open"}
    assert [each is None for each in classes] == [False, False, True, False]


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    shared = simulated(rng, 300, quality=0.5).labelled
    runs = [simulated(rng, 300, quality=q, shared=shared) for q in (0.4, 0.5, 0.6, 0.45, 0.5, 0.55)]
    drawn = resample(runs, resamples=500)
    alone, *_ = difference(drawn[4:5], drawn[1:2])
    together, *_ = difference(drawn[3:], drawn[:3])
    borrowed, *_ = difference(drawn[4:5], drawn[1:2], others=between_seeds([drawn[:3], drawn[3:]]))
    for wider in (together, borrowed):
        assert wider.high - wider.low > 2 * (alone.high - alone.low)
    assert between_seeds([drawn[:1], drawn[3:4]]) is None


def test_what_runs_make_of_a_photo_by_chance_is_not_taken_for_what_seeds_change():
    """It is in the resamples of the photos already."""
    rng, changes = np.random.default_rng(6), {}
    for name, spread in (("nothing", 0.0), ("much", 0.1)):
        shared = simulated(rng, 80, quality=0.5).labelled
        runs = [simulated(rng, 80, quality=q, shared=shared) for q in rng.normal(0.5, spread, 20)]
        drawn = resample(runs, resamples=300)
        changes[name] = between_seeds([drawn])[0][0] / np.var([run.observed[0] for run in drawn], ddof=1)
    assert changes["nothing"] < 0.5 and changes["much"] > 0.9


@pytest.mark.parametrize("seeds", [1, 3])
def test_how_often_an_interval_misses_0_is_what_it_says(seeds):
    """One time in twenty where there is no difference; loosely, with 100 experiments."""
    rng, missed = np.random.default_rng(4), {0.0: 0, 0.1: 0}
    for gain in missed:
        for _ in range(100):
            shared = simulated(rng, 60, quality=0.5).labelled
            of_runs = rng.normal([[gain], [0]], 0.02 if seeds > 1 else 0, (2, seeds))
            sides = [[simulated(rng, 60, quality=0.5 + off, shared=shared) for off in side] for side in of_runs]
            found, _ = compared(*sides, resamples=200)
            missed[gain] += not found.low <= 0 <= found.high
    assert missed[0.0] <= 11 and missed[0.1] >= 60


def test_several_differences_at_once_ask_for_more():
    """Holm: the smallest p is held against 5 % / n, the next against 5 % / (n - 1), until one is too large."""

    def words(*values: tuple[float, float]) -> list[str]:
        return list(verdicts({n: Difference(v, v - 0.05, v + 0.05, p) for n, (v, p) in enumerate(values)}).values())

    assert words((0.1, 0.03)) == ["better"]
    assert words((0.1, 0.03), (0.1, 0.04)) == ["open", "open"]
    assert words((-0.1, 0.04), (0.1, 0.02), (0.1, 0.001)) == ["worse", "better", "better"]


# ---------------------------------------------------------------------------------------- other metrics, groups


def test_every_metric_of_the_confusion_matrix_is_compared_as_evaluation_defines_it():
    run = simulated(np.random.default_rng(8), 20, quality=0.5)
    run.pixels[:, 2] = 0  # a class that is predicted, but in no label
    matrix = ConfusionMatrix(4)
    matrix.matrix.copy_(torch.from_numpy(run.pixels.sum(0)))
    expected = matrix.compute()
    found = values(run.pixels.sum(0), METRICS)
    assert METRICS == ["mIoU", "pixel_accuracy", "mean_accuracy", "frequency_weighted_IoU", "mean_dice"]
    assert found[: len(METRICS)].tolist() == pytest.approx([expected[name] for name in METRICS])
    known = [place in (0, 1, 3) for place in range(4)]
    assert np.isfinite(found[len(METRICS) :]).tolist() == known and expected["IoU"][2] == 0
    (drawn,) = resample([run], METRICS, resamples=50)
    assert drawn.observed.tolist() == pytest.approx(found.tolist(), nan_ok=True) and drawn.drawn.shape == (50, 9)
    assert [each is None for each in difference([drawn], [drawn])] == [False] * 7 + [True, False]


def test_a_group_is_drawn_as_a_whole():
    """Ten videos of six frames that are all alike say as much as ten photos."""
    rng = np.random.default_rng(9)
    photos = simulated(rng, 10, quality=0.5)
    other = simulated(rng, 10, quality=0.6, shared=photos.labelled)
    ids = [f"video{number % 10}_{number // 10}" for number in range(60)]
    videos = [Counts(ids, NAMES, np.tile(run.pixels, (6, 1, 1))) for run in (other, photos)]
    pattern, width = r"(video\d)_", {}
    for name, sides in {
        "frames": videos,
        "videos": [run.of_groups(pattern) for run in videos],
        "photos": [other, photos],
    }.items():
        ours, baseline = resample(sides, resamples=2000)
        whole, *_ = difference([ours], [baseline])
        width[name] = whole.high - whole.low
    assert width["videos"] == pytest.approx(width["photos"]) and width["frames"] < 0.6 * width["videos"]
    grouped = videos[0].of_groups(pattern)
    assert len(grouped.ids) == 10 and (grouped.pixels.sum(0) == videos[0].pixels.sum(0)).all()


def test_the_interval_of_a_level_holds_it():
    run = simulated(np.random.default_rng(10), 40, quality=0.5)
    (drawn,) = resample([run], resamples=500)
    (value, low, high), *classes = intervals([drawn])
    assert value == pytest.approx(mIoU(run.pixels.sum(0))) and low < value < high and len(classes) == 4
