"""The counts of every photo, and what is made of two of them: a difference and how sure it is."""

import numpy as np
import pytest
import torch

from model import UserError
from model.comparison import (
    Counts,
    Difference,
    between_seeds,
    check_same_photos,
    class_IoU,
    compare,
    mIoU,
    photo_mIoU,
    read_counts,
    resample,
    verdicts,
    write_counts,
)
from model.metrics import ConfusionMatrix, sparse

NAMES = ["sky", "sea", "boat", "gull"]


def photos(count: int, *, seed: int, wrong: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels with void, never the last class, and predictions of which a share is wrong: (N, 6, 8)."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count, 6, 8), generator=rng)
    other = torch.randint(4, labels.shape, generator=rng)
    predictions = torch.where(torch.rand(labels.shape, generator=rng) < wrong, other, labels)
    return predictions, torch.where(torch.rand(labels.shape, generator=rng) < 0.1, 255, labels)


def written(folder, predictions, labels, *, ids=None, names=NAMES, file="counts.npz"):
    counts = [sparse(each) for each in ConfusionMatrix(len(names)).update(predictions, labels)]
    ids = ids or [f"photo{number}" for number in range(len(labels))]
    write_counts(folder / file, ids, names, counts)
    return folder / file


def simulated(rng: np.random.Generator, photos: int, *, quality: float, shared: np.ndarray | None = None) -> Counts:
    """Counts of photos of some classes of some sizes, of which a share that differs from photo to photo is hit."""
    labelled = rng.integers(0, 100, (photos, 4)) * (rng.random((photos, 4)) < 0.6) if shared is None else shared
    share = np.clip(rng.normal(quality, 0.25, (photos, 4)), 0, 1)
    hits = (labelled * share).astype(np.int64)
    missed = labelled - hits
    return Counts([str(n) for n in range(photos)], NAMES, labelled, hits + np.roll(missed, 1, 1), hits)


# ---------------------------------------------------------------------------------------- counts of every photo


def test_the_counts_of_the_photos_add_up_to_the_confusion_matrix(tmp_path):
    predictions, labels = photos(10, seed=0)
    matrix = ConfusionMatrix(4)
    matrix.update(predictions, labels)
    counts = read_counts(written(tmp_path, predictions, labels))
    assert counts.ids[3] == "photo3" and counts.class_names == NAMES
    for part, expected in (
        (counts.labelled, matrix.matrix.sum(1)),
        (counts.predicted, matrix.matrix.sum(0)),
        (counts.hits, matrix.matrix.diag()),
    ):
        assert part.sum(0).tolist() == expected.tolist()
    assert counts.are_of(matrix.compute()["pixel_accuracy"]) and not counts.are_of(0.5) and not counts.are_of(None)
    for index, value in enumerate(photo_mIoU(counts)):
        alone = read_counts(written(tmp_path, predictions[index : index + 1], labels[index : index + 1]))
        assert value == pytest.approx(mIoU(alone))


def test_the_same_counts_are_the_same_bytes(tmp_path):
    files = [written(tmp_path, *photos(5, seed=1), file=f"{name}.npz") for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_photos_of_nothing_but_void_have_no_counts(tmp_path):
    predictions, labels = photos(3, seed=2)
    labels[1] = 255
    counts = read_counts(written(tmp_path, predictions, labels))
    assert counts.labelled[1].sum() == 0 and np.isnan(photo_mIoU(counts)).tolist() == [False, True, False]


@pytest.mark.parametrize("damage", ["absent", "junk", "cut", "no ids", "negative", "beyond", "objects"])
def test_damaged_counts_are_named(tmp_path, damage):
    file = written(tmp_path, *photos(4, seed=3))
    content = file.read_bytes()
    fields = dict(np.load(file))
    if damage == "absent":
        file.unlink()
    elif damage == "junk":
        file.write_bytes(b"junk")
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        changed = {"no ids": {}, "negative": {"count": -fields["count"]}, "beyond": {"cell": fields["cell"] + 16}}
        changed["objects"] = {"ids": np.array([{}], dtype=object)}
        fields.pop("ids")
        ids = {} if damage in ("no ids", "objects") else {"ids": np.array(list("abcd"))}
        np.savez(file, **fields | ids | changed[damage])
    with pytest.raises(UserError, match=r"no .*counts\.npz; evaluate|counts\.npz is damaged .*; write it anew"):
        read_counts(file)


def test_flipped_bytes_are_named_or_change_nothing(tmp_path):
    file = written(tmp_path, *photos(4, seed=3))
    content, sound, rng = file.read_bytes(), read_counts(file), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            damaged[place] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            assert read_counts(file).hits.tolist() == sound.hits.tolist()
        except UserError as error:
            assert f"{file} is damaged (" in str(error) and "\n" not in str(error)


# ---------------------------------------------------------------------------------------- one definition of mIoU


def test_the_classes_that_count_are_those_in_the_labels(tmp_path):
    predictions, labels = photos(6, seed=4)
    assert (predictions == 3).any() and not (labels == 3).any()
    counts = read_counts(written(tmp_path, predictions, labels))
    valid = labels != 255
    pairs = [((predictions == c) & valid, labels == c) for c in range(3)]
    expected = [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]
    assert mIoU(counts) == pytest.approx(np.mean(expected))
    assert np.isnan(class_IoU(counts, np.ones((1, 6)))[0]).tolist() == [False, False, False, True]
    weights = np.array([[2, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 6]])
    drawn = [[photo for photo, times in enumerate(row) for _ in range(times)] for row in weights]
    for row, places in zip(class_IoU(counts, weights), drawn, strict=True):
        sample = read_counts(written(tmp_path, predictions[places], labels[places]))
        np.testing.assert_allclose(row, class_IoU(sample, np.ones((1, len(places))))[0])


# ---------------------------------------------------------------------------------------- differences


def compared(ours: list[Counts], baseline: list[Counts], **options) -> tuple[Difference, list[Difference | None]]:
    drawn = resample([*ours, *baseline], **options)
    return compare(drawn[: len(ours)], drawn[len(ours) :])


def test_the_same_run_does_not_differ_from_itself():
    run = simulated(np.random.default_rng(0), 40, quality=0.5)
    whole, by_class = compared([run], [run], resamples=200)
    assert (whole.value, whole.low, whole.high, whole.p) == (0, 0, 0, 1)
    assert verdicts([whole]) == ["open"] and all(each.value == 0 for each in by_class)


def test_a_better_run_is_better_and_the_other_way_round_worse():
    rng = np.random.default_rng(1)
    good = simulated(rng, 80, quality=0.7)
    poor = simulated(rng, 80, quality=0.4, shared=good.labelled)
    up, classes = compared([good], [poor], resamples=500)
    down, _ = compared([poor], [good], resamples=500)
    assert up.value == pytest.approx(mIoU(good) - mIoU(poor)) and up.value == -down.value
    assert 0 < up.low < up.value < up.high and (up.low, up.high) == pytest.approx((-down.high, -down.low), abs=0.02)
    assert verdicts([up]) == ["better"] and verdicts([down]) == ["worse"]
    assert [each is not None and each.value > 0 for each in classes] == [True] * 4
    assert compared([good], [poor], resamples=500)[0] == up, "the same seed, the same interval"


def test_a_class_that_is_nowhere_has_no_difference():
    run = simulated(np.random.default_rng(2), 30, quality=0.5)
    without = [part.copy() for part in (run.labelled, run.predicted, run.hits)]
    for part in without:
        part[:, 2] = 0
    run = Counts(run.ids, NAMES, *without)
    assert [each is None for each in compared([run], [run], resamples=50)[1]] == [False, False, True, False]


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(3)
    first = simulated(rng, 300, quality=0.5)
    runs = [simulated(rng, 300, quality=q, shared=first.labelled) for q in (0.4, 0.5, 0.6, 0.45, 0.5, 0.55)]
    alone, _ = compared(runs[4:5], runs[1:2], resamples=500)
    together, _ = compared(runs[3:], runs[:3], resamples=500)
    assert together.high - together.low > 2 * (alone.high - alone.low)
    drawn = resample(runs, resamples=500)
    borrowed, _ = compare(drawn[4:5], drawn[1:2], others=between_seeds([drawn[:3], drawn[3:]]))
    assert borrowed.high - borrowed.low > 2 * (alone.high - alone.low)
    assert between_seeds([drawn[:1], drawn[3:4]]) is None


def test_what_runs_make_of_a_photo_by_chance_is_not_taken_for_what_seeds_change():
    """It is in the resamples of the photos already."""
    rng, changes = np.random.default_rng(6), {}
    for name, spread in (("nothing", 0.0), ("much", 0.1)):
        first = simulated(rng, 80, quality=0.5)
        qualities = rng.normal(0.5, spread, 20)
        runs = resample([simulated(rng, 80, quality=q, shared=first.labelled) for q in qualities], resamples=300)
        changes[name] = between_seeds([runs]).variance[0] / np.var([run.observed[0] for run in runs], ddof=1)
    assert changes["nothing"] < 0.5 and changes["much"] > 0.9


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("difference", "least", "most"), [(0.0, 0.0, 0.11), (0.1, 0.6, 1.0)], ids=["none", "some"])
def test_how_often_an_interval_misses_0_is_what_it_says(seeds, difference, least, most):
    """One time in twenty where there is no difference; loosely, with 150 experiments."""
    rng, missed = np.random.default_rng(4), 0
    for _ in range(150):
        shared = simulated(rng, 60, quality=0.5).labelled
        of_runs = rng.normal([[difference], [0]], 0.02 if seeds > 1 else 0, (2, seeds))
        sides = [[simulated(rng, 60, quality=0.5 + off, shared=shared) for off in side] for side in of_runs]
        found, _ = compared(*sides, resamples=300)
        missed += not found.low <= 0 <= found.high
    assert least <= missed / 150 <= most


def test_several_comparisons_at_once_ask_for_more():
    """Holm: the smallest p is held against 5 % / n, the next against 5 % / (n - 1), until one is too large."""

    def with_p(p: float, value: float = 0.1) -> Difference:
        return Difference(value, value - 0.05, value + 0.05, p)

    assert verdicts([with_p(0.03)]) == ["better"]
    assert verdicts([with_p(0.03), with_p(0.04)]) == ["open", "open"]
    assert verdicts([with_p(0.04, -0.1), with_p(0.02), with_p(0.001)]) == ["worse", "better", "better"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_names": ["sky", "sea", "boat", "tern"]}, "a and b have different classes"),
        ({"ids": ["0", "1", "x"]}, r"different photos \(2 of a alone, and 1 more\)"),
        ({"ids": ["1", "0", "2"]}, "the same photos in another order"),
        ({"labelled": 1}, "different masks of 0"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_said_by_name(change, said):
    run = simulated(np.random.default_rng(5), 3, quality=0.5)
    parts = {"ids": run.ids, "class_names": run.class_names, "labelled": run.labelled}
    if "labelled" in change:
        change = {"labelled": run.labelled + 1}
    other = Counts(**parts | change, predicted=run.predicted, hits=run.hits)
    with pytest.raises(UserError, match=said):
        check_same_photos(run, other, ("a", "b"))
