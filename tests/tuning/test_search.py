"""What is proposed depends on the trials before it alone, and the storage's faults are named."""

import errno
import os
from pathlib import Path

import optuna
import pytest

from files.errors import ConfigError, Failure
from tests.tuning.parts import study
from tuning.search import Search, Start, sampler_name
from tuning.space import Space

TWO = "space.drop_path.profile=[linear, constant]"


def search(tmp_path: Path, *overrides: str, starts: tuple[Start, ...] = (), fingerprint: str = "a") -> Search:
    tmp_path.mkdir(exist_ok=True)
    space = Space(study(tmp_path, *overrides))
    return Search(tmp_path, space, fingerprint=fingerprint, sign=1, starts=starts)


def play(one: Search, trials: int) -> None:
    """Asks and tells, better the nearer to rate 0.2."""
    for _ in range(trials):
        one.ask()
        last = one.proposals()[-1]
        if not last.told:
            one.tell(last.number, 90 - 100 * (last.values["drop_path.rate"] - 0.2) ** 2)


def test_what_it_starts_with_comes_first(tmp_path: Path) -> None:
    starts = (Start("zero", {"drop_path.rate": 0.0}), Start("given", {"drop_path.rate": 0.3}))
    one = search(tmp_path, starts=starts)
    play(one, 3)
    first, second, third = one.proposals()
    assert (first.origin, first.values) == ("zero", {"drop_path.rate": 0.0})
    assert (second.origin, second.values) == ("given", {"drop_path.rate": 0.3})
    assert third.origin == "random" and third.values["drop_path.rate"] not in (0.0, 0.3)
    again = search(tmp_path, starts=(Start("advice", {"drop_path.rate": 0.4}),))
    assert again.starts == list(starts), "a study goes on as it began"


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_a_study_repeats_itself_and_another_seed_does_not(tmp_path: Path, sampler: str) -> None:
    words = [TWO, f"search={{sampler: {sampler}, trials: 7}}"]
    whole = search(tmp_path / "a", *words)
    play(whole, 7)
    for _ in range(7):  # every trial by another process
        play(search(tmp_path / "b", *words), 1)
    values = [proposal.values for proposal in whole.proposals()]
    assert [proposal.values for proposal in search(tmp_path / "b", *words).proposals()] == values
    other = search(tmp_path / "c", *words, "search.seed=1")
    play(other, 7)
    assert [proposal.values for proposal in other.proposals()] != values
    assert {proposal.origin for proposal in whole.proposals()} == {sampler}


def test_the_gaussian_process_finds_the_top(tmp_path: Path) -> None:
    one = search(tmp_path, "search={sampler: gp, trials: 12}")
    play(one, 12)
    rates = [proposal.values["drop_path.rate"] for proposal in one.proposals()]
    assert sum(abs(rate - 0.2) < 0.05 for rate in rates[4:]) >= 5, rates


def test_a_grid_is_tried_once_from_end_to_end(tmp_path: Path) -> None:
    one = search(tmp_path, "search={sampler: grid}", TWO, "space.drop_path.rate=[0.0, 0.1, 0.2]")
    assert one.target == 6
    play(one, 6)
    assert [proposal.values for proposal in one.proposals()] == one.space.grid()


def test_auto_is_by_the_number_of_parameters(tmp_path: Path) -> None:
    section = search(tmp_path, "search={}").section
    assert [sampler_name(section, n) for n in (1, 4, 5)] == ["gp", "gp", "tpe"]
    assert search(tmp_path / "b", "search={}").target == 12


def test_a_candidate_that_the_config_refuses_fails_at_once(tmp_path: Path) -> None:
    """Each value is possible, but not every pair."""
    one = search(
        tmp_path, "search={sampler: grid}", "space={data.sampler: [balanced, shuffle], data.balance_power: [0.5]}"
    )
    one.ask()
    one.ask()
    good, bad = one.proposals()
    assert not good.refused and good.digest and not good.told
    assert "has no effect with sampler 'shuffle'" in bad.refused and bad.told and not bad.digest


def test_what_a_dead_process_was_asking_for_does_not_count(tmp_path: Path) -> None:
    starts = (Start("zero", {"drop_path.rate": 0.0}), Start("given", {"drop_path.rate": 0.3}))
    one = search(tmp_path, starts=starts)
    play(one, 1)
    one.study.enqueue_trial({"drop_path.rate": 0.3})  # killed before it asked
    play(search(tmp_path), 1)
    assert [proposal.origin for proposal in one.proposals()] == ["zero", "given"]
    one.study.ask(one.space.distributions)  # killed before it noted who asked
    play(search(tmp_path), 1)
    assert [proposal.origin for proposal in one.proposals()] == ["zero", "given", "random"]
    states = [trial.state.name for trial in one.study.get_trials()]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_a_journal_that_a_kill_cut_short_is_mended(tmp_path: Path) -> None:
    one = search(tmp_path)
    play(one, 2)
    whole = one.proposals()
    with one.journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","st')
    assert one.proposals() == whole, "also while it is open"
    with one.journal.open("ab") as file:
        file.write(b'{"op_code":4,')
    again = search(tmp_path)
    assert again.proposals() == whole
    play(again, 1)
    assert len(search(tmp_path).proposals()) == 3


@pytest.mark.parametrize("damage", [b"rubbish\n", b"{}\n", b"\x00\xff\n", b"[1]\n"])
def test_a_damaged_journal_is_named(tmp_path: Path, damage: bytes) -> None:
    one = search(tmp_path)
    play(one, 2)
    lines = one.journal.read_bytes().splitlines(keepends=True)
    one.journal.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
    with pytest.raises(ConfigError, match=r"journal\.log is damaged or cannot be read .*\nmove it away") as caught:
        search(tmp_path).proposals()
    assert len(str(caught.value).splitlines()) == 2
    one.journal.rename(tmp_path / "old")
    assert search(tmp_path).proposals() == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_is_no_damage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    one = search(tmp_path / "a")
    play(one, 1)
    with monkeypatch.context() as patch:
        patch.setattr("optuna.storages.journal._file.os.fsync", refuse)
        for fail in (one.ask, lambda: search(tmp_path / "b")):
            with pytest.raises(
                Failure, match=rf"journal\.log cannot be written: {os.strerror(number)}\nmake room"
            ) as told:
                fail()
            assert len(str(told.value).splitlines()) == 2 and "damaged" not in str(told.value)
    play(search(tmp_path / "a"), 1)


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all.db", "nonsense", "postgresql://me:secret@localhost:1/x", "mysql://a/b"]
)
def test_a_storage_that_cannot_be_reached_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"storage: .* cannot be used \(.*\)\nsee that it runs") as caught:
        search(tmp_path, f"storage={url}")
    assert "secret" not in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_a_database_holds_a_study_like_a_journal_does(tmp_path: Path) -> None:
    url = f"storage=sqlite:///{tmp_path}/x.db"
    one = search(tmp_path / "a", url)
    play(one, 2)
    assert search(tmp_path / "a", url).proposals() == one.proposals()
    with pytest.raises(ConfigError, match=r"holds a study 'a' of another config; choose another --output"):
        search(tmp_path / "a", url, fingerprint="b")
    assert search(tmp_path / "b", url, fingerprint="b").proposals() == []
    assert not (tmp_path / "a" / "journal.log").exists()


def test_a_storage_that_is_lost_later_is_a_failure(tmp_path: Path, monkeypatch) -> None:
    one = search(tmp_path)

    def lost(**_: object) -> None:
        raise ConnectionError("connection refused\nand more")

    monkeypatch.setattr(one.study, "get_trials", lost)
    with pytest.raises(Failure, match=r"cannot be read \(ConnectionError: connection refused\)"):
        one.ask()


def test_optuna_knows_which_way_is_better(tmp_path: Path) -> None:
    assert search(tmp_path).study.direction == optuna.study.StudyDirection.MAXIMIZE
    space = Space(study(tmp_path))
    (tmp_path / "b").mkdir()
    one = Search(tmp_path / "b", space, fingerprint="", sign=-1, starts=[])
    assert one.study.direction == optuna.study.StudyDirection.MINIMIZE
