"""Who goes on is decided by the means over the same seeds, and by nothing else."""

import pytest

from tuning.race import race


def flat(values: dict[int, float], seeds: int) -> dict[int, dict[int, float]]:
    return {trial: {seed: value for seed in range(seeds)} for trial, value in values.items()}


def test_every_trial_has_the_first_seed_before_any_is_dropped() -> None:
    standing = race({0: {0: 90.0}, 1: {}, 2: {}}, [1, 2], [1])
    assert standing.needed == {1: [0], 2: [0]}
    assert standing.winner is None and not standing.dropped and not standing.decisions


def test_the_better_go_on_and_losers_are_dropped_with_a_reason() -> None:
    scores = {0: {0: 90.0}, 1: {0: 92.0}, 2: {0: 91.0}, 3: {0: 80.0}}
    standing = race(scores, [1, 2, 4], [2, 1])
    assert standing.needed == {1: [1], 2: [1]}
    assert standing.dropped == {
        0: "mean 90 over 1 seed; the 2 that go on have at least 91",
        3: "mean 80 over 1 seed; the 2 that go on have at least 91",
    }
    assert [d.what for d in standing.decisions] == [
        "2 of 4 trials go on to 2 seeds: 1, 2",
        "trial 0 is dropped",
        "trial 3 is dropped",
    ]


def test_the_winner_has_the_best_mean_not_the_best_seed() -> None:
    scores = {0: {0: 99.0, 1: 80.0}, 1: {0: 90.0, 1: 91.0}}
    standing = race(scores, [1, 2], [2])
    assert standing.winner == 1 and not standing.needed
    assert standing.decisions[-1].what == "trial 1 wins the race"
    assert standing.decisions[-1].why == "the best mean over 2 seeds, 90.5; then trial 0 89.5"


def test_seeds_that_a_trial_has_beyond_the_round_do_not_count() -> None:
    """All are compared on the same seeds."""
    scores = {0: {0: 90.0, 1: 100.0, 2: 100.0}, 1: {0: 91.0}, 2: {0: 80.0}}
    standing = race(scores, [1, 2], [1])
    assert standing.winner == 1


def test_of_equals_the_one_proposed_first_goes_on() -> None:
    assert race(flat({3: 90.0, 0: 90.0, 5: 90.0}, 2), [1, 2], [2]).winner == 0


def test_less_may_be_better() -> None:
    standing = race(flat({0: 0.5, 1: 0.3, 2: 0.4}, 2), [1, 2], [2], sign=-1)
    assert standing.winner == 1
    assert standing.dropped[0] == "mean 0.5 over 1 seed; the 2 that go on have at most 0.4"


def test_one_that_is_alone_wins_without_further_seeds() -> None:
    standing = race({4: {0: 50.0}}, [1, 2, 4], [1, 1])
    assert standing.winner == 4 and not standing.needed
    assert standing.decisions[-1].why == "nobody else is left"


def test_a_race_of_one_round() -> None:
    assert race(flat({0: 1.0, 1: 2.0}, 3), [3], []).winner == 1


def test_nobody_takes_part() -> None:
    assert race({}, [1, 2], [1]).winner is None


@pytest.mark.parametrize("trials", [1, 2, 5])
def test_more_may_go_on_than_there_are(trials: int) -> None:
    scores = {trial: {0: float(trial)} for trial in range(trials)}
    standing = race(scores, [1, 2], [9])
    assert not standing.dropped
    assert (standing.winner == 0) == (trials == 1)


def test_a_trial_that_failed_makes_room_for_the_next() -> None:
    scores = {0: {0: 90.0, 1: 90.0}, 1: {0: 89.0}, 2: {0: 88.0}}
    assert race(scores, [1, 2], [2]).needed == {1: [1]}
    del scores[1]
    assert race(scores, [1, 2], [2]).needed == {2: [1]}
