"""What a study has done, and what is next: a function of Optuna's trials and of the units' folders.

Any process may ask, as often as it likes, under the study's lock. It is the same answer whoever asks: nothing is kept in
memory that a kill could lose.
"""

import datetime
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from files.errors import ConfigError, Failure
from files.words import counted
from training.config import TrainConfig
from tuning.config import StudyConfig
from tuning.links import Finalist
from tuning.race import Decision, Scores, Standing, race
from tuning.search import Proposal, Search
from tuning.space import Values, candidate, digest_of
from tuning.study import StudyFolder, Trial, TrialState
from tuning.units import Unit, read_failure


@dataclass
class Next:
    """Where a study stands.

    Attributes:
        trials: All of them.
        now: Units to be run, the first ones first.
        spare: Units that will be needed, for a process that has nothing else to do.
        running: Units that other processes run at present.
        may_ask: Optuna may be asked for another trial.
        winner: Number of the trial that won; None while that is open.
        finalists: Configurations of the final, as far as they are known.
        left: About how many units are left to be run, those that run at present included.
    """

    trials: list[Trial] = field(default_factory=list)
    now: list[Unit] = field(default_factory=list)
    spare: list[Unit] = field(default_factory=list)
    running: int = 0
    may_ask: bool = False
    winner: int | None = None
    finalists: list[Finalist] = field(default_factory=list)
    left: int = 0


@dataclass
class _Entry:
    """A trial while it is looked at; `own` are the seeds whose score Optuna is told."""

    proposal: Proposal
    config: TrainConfig | None
    scores: dict[int, float] = field(default_factory=dict)
    open: dict[int, str] = field(default_factory=dict)
    failure: str = ""
    same_as: int | None = None
    own: range = range(0)
    steps: int = 0
    seconds: float = 0.0


class Plan:
    """Of one study.

    Args:
        study: As read.
        folder: Where it is.
        search: Its trials.
        finalists: Rate 0 and the published one, which take the winner's other values; empty where there is no final.
        published: What is published for the training config with these other values, as the winner's model may be another
            than the config's; None: nothing. Default: what the finalist says.
    """

    def __init__(
        self, study: StudyConfig, folder: StudyFolder, search: Search, finalists: Sequence[Finalist],
        published: Callable[[Values], Values | None] | None = None,
    ) -> None:  # fmt: skip
        self.study, self.folder, self.search = study, folder, search
        self.finalists = finalists
        self.published = None if published is None else cache_by_values(published)
        self._configs: dict[int, TrainConfig] = {}
        self._logged: set[tuple[str, str]] | None = None

    def unit(self, config: TrainConfig, digest: str, seed: int) -> Unit:
        """The unit of a config and a seed."""
        return Unit(config, seed, self.folder.unit(digest, seed))

    @property
    def verdict_seeds(self) -> list[int]:
        """The fresh seeds; none where there is no final."""
        verdict = self.study.tune.verdict
        return [] if verdict is None else [verdict.first_seed + i for i in range(verdict.seeds)]

    def update(self) -> Next:
        """Looks at all units, tells Optuna what is new, decides, notes decisions and trials; says what is next.

        Raises:
            Failure: All trials failed; or the storage cannot be reached any more.
        """
        tune = self.study.tune
        rounds = tune.race.seeds
        entries = self._entries()
        after = Next()
        asked = len(entries)
        live = [e for e in entries if not e.failure and e.same_as is None]
        opened = [(e, seed) for e in entries if not e.failure for seed in e.open if seed in e.own]
        standing = Standing()
        if opened:
            self._want(after, opened)
            after.may_ask = not after.now and asked < self.search.target
        elif asked < self.search.target:
            after.may_ask = True
        else:
            self._check_any(entries, live)
            scores = {e.proposal.number: e.scores for e in live}
            standing = race(scores, rounds, tune.race.kept(asked), sign=tune.objective.sign)
            needed = [(e, seed) for e in live for seed in standing.needed.get(e.proposal.number, ())]
            self._want(after, needed)
            after.winner = standing.winner
        self._want_final(after, live)
        after.trials = [self._trial(e, standing) for e in entries]
        after.left += self._left(entries, standing)
        self.note([*self._about(entries), *standing.decisions])
        self.folder.write_trials(after.trials)
        return after

    def _entries(self) -> list[_Entry]:
        """Every trial with what its units scored; Optuna is told what it does not know yet."""
        tune = self.study.tune
        entries: list[_Entry] = []
        by_digest: dict[str, list[int]] = {}
        first, most = tune.race.seeds[0], tune.race.seeds[-1]
        for proposal in self.search.proposals():
            entry = _Entry(proposal, None, failure=proposal.refused)
            entries.append(entry)
            if entry.failure:
                continue
            entry.config = self.config_of(proposal)
            before = by_digest.setdefault(proposal.digest, [])
            entry.same_as = before[0] if before else None
            # what is proposed again is measured again, on the next seeds, while there are some: the same score once more
            # would tell the sampler that there is no noise
            again = first * len(before)
            entry.own = range(again, again + first) if again + first <= most else range(first)
            before.append(proposal.number)
            for seed in range(most):
                self._look(entry, self.unit(entry.config, proposal.digest, seed))
            if proposal.told:
                continue
            scores = [entry.scores[seed] for seed in entry.own if seed in entry.scores]
            if entry.failure:
                self.search.tell(proposal.number, None)
            elif len(scores) == first:
                self.search.tell(proposal.number, sum(scores) / first)
        return entries

    def _look(self, entry: _Entry, unit: Unit) -> None:
        state = unit.state
        if state == "done":
            try:
                score = unit.score(self.study.tune.objective.metric)
            except Failure as failure:
                entry.failure = entry.failure or str(failure)
                return
            entry.scores[unit.seed] = score.value
            entry.steps += score.steps
            entry.seconds += score.seconds
        elif state == "failed":
            entry.failure = entry.failure or read_failure(unit.folder) or "unknown"
        else:
            entry.open[unit.seed] = state

    def config_of(self, proposal: Proposal) -> TrainConfig:
        """The training config of a trial."""
        if proposal.number not in self._configs:
            self._configs[proposal.number] = self.search.space.candidate(proposal.values)
        return self._configs[proposal.number]

    def _want(self, after: Next, wanted: Sequence[tuple[_Entry, int]]) -> None:
        """Sorts units into those to be run and those that run; what was begun goes first."""
        for entry, seed in sorted(wanted, key=lambda pair: pair[0].open[pair[1]] != "interrupted"):
            if entry.open[seed] == "running":
                after.running += 1
            elif entry.config is not None:
                after.now.append(self.unit(entry.config, entry.proposal.digest, seed))
        after.left += len(wanted)

    def finalists_of(self, winner: Proposal, scores: Scores) -> list[Finalist]:
        """The winner, and those it is compared with: where it is all of them itself, the next best of the race.

        Args:
            winner: Of the race.
            scores: Of all trials that did not fail, by seed.
        """
        first = Finalist("winner", winner.values, winner.digest, self.config_of(winner), {})
        found = [first, *filter(None, (self._beside(one, first) for one in self.finalists))]
        if all(one.digest == winner.digest for one in found):
            sign = self.study.tune.objective.sign
            others = [p for p in self.search.proposals() if scores.get(p.number) and p.digest != winner.digest]
            ranked = [(len(s), sign * sum(s) / len(s), -p.number, p) for p in others
                      if (s := list(scores[p.number].values()))]  # fmt: skip
            if ranked:
                *_, second = max(ranked)
                found.append(Finalist("runner-up", second.values, second.digest, self.config_of(second), {}))
        return found

    def _beside(self, one: Finalist, winner: Finalist) -> Finalist | None:
        """The finalist with all values of the winner that are not its own, so that they differ in drop path alone.

        None where the training config refuses that, or nothing is published for the winner's model.
        """
        own = one.values
        if one.role == "published" and self.published is not None:
            published = self._published_beside(winner)
            if published is None:
                return None
            own = published
        values = {key: value for key, value in winner.values.items() if key != "drop_path"} | own
        if one.role == "zero" and isinstance(values.get("drop_path.profile"), list):
            values["drop_path.profile"] = "linear"  # a list has no rate
        try:
            return finalist(self.study, one.role, values)
        except ConfigError as error:
            self.note([Decision(f"not in the final: {one.role}", f"with the winner's other values: {error}")])
            return None

    def _published_beside(self, winner: Finalist) -> Values | None:
        """What is published for the winner's model, data and length; None, and a note, where nothing is."""
        assert self.published is not None
        others = outside_drop_path(winner.values)
        try:
            found = self.published(others)
        except ConfigError as error:
            found, why = None, str(error)
        else:
            why = f"no rate is published for {winner.config.model.name} and its purpose"
        if found is None:
            self.note([Decision("not in the final: published", why)])
        return found

    def _is_open(self, one: Finalist) -> bool:
        """Whether the winner decides what else is in it."""
        silent = ("drop_path.profile", "drop_path.rate_is", "drop_path.schedule") if one.role == "zero" else ()
        others = self.search.space.parameters.keys() - one.values.keys() - {"drop_path"}
        return not all(key.startswith(silent) for key in others)

    def _want_final(self, after: Next, live: Sequence[_Entry]) -> None:
        """Adds the units of the final: to do now where the winner is known, else for who has nothing else to do."""
        seeds = self.verdict_seeds
        if not seeds:
            return
        won = next((e.proposal for e in live if e.proposal.number == after.winner), None)
        scores = {e.proposal.number: e.scores for e in live}
        known = [one for one in self.finalists if not self._is_open(one)]
        finalists = after.finalists = known if won is None else self.finalists_of(won, scores)
        units = {(f.digest, seed): self.unit(f.config, f.digest, seed) for seed in seeds for f in finalists}
        for unit in units.values():
            state = unit.state
            if state in ("missing", "interrupted"):
                (after.spare if won is None else after.now).append(unit)
            if state == "running" and won is not None:
                after.running += 1
            after.left += state in ("missing", "interrupted", "running")
        if won is None:
            after.left += len(seeds) * (1 + len(self.finalists) - len(known))

    def _left(self, entries: Sequence[_Entry], standing: Standing) -> int:
        """About how many units of the search and the race are still to come, beside those wanted now."""
        if standing.winner is not None:
            return 0
        rounds = self.study.tune.race.seeds
        kept = self.study.tune.race.kept(self.search.target)
        left = rounds[0] * (self.search.target - len(entries))
        steps = zip(kept, rounds[:-1], rounds[1:], strict=True)
        if not standing.needed:
            return left + sum(count * (b - a) for count, a, b in steps)
        # the rounds behind the one that is run now
        reached = max(seed for seeds in standing.needed.values() for seed in seeds)
        return sum(count * (b - a) for count, a, b in steps if a > reached)

    @staticmethod
    def _check_any(entries: Sequence[_Entry], live: Sequence[_Entry]) -> None:
        if live:
            return
        reasons = [e.failure for e in entries if e.failure]
        most = max(reasons, key=reasons.count)
        raise Failure(
            f"all {counted(len(reasons), 'trial')} failed; {reasons.count(most)} of them: {most}\n"
            "mend what is wrong and start the study again: it goes on with what it has"
        )

    @staticmethod
    def _trial(entry: _Entry, standing: Standing) -> Trial:
        proposal = entry.proposal
        number = proposal.number
        state: TrialState = "racing" if entry.scores or "running" in entry.open.values() else "waiting"
        reason = ""
        if entry.failure:
            state, reason = "failed", entry.failure
        elif entry.same_as is not None:
            state, reason = "dropped", f"the same configuration as trial {entry.same_as}"
        elif number == standing.winner:
            state = "winner"
        elif number in standing.dropped:
            state, reason = "dropped", standing.dropped[number]
        return Trial(
            number,
            proposal.digest,
            proposal.values,
            proposal.origin,
            dict(sorted(entry.scores.items())),
            state,
            reason,
            entry.steps,
            round(entry.seconds, 3),
        )

    @staticmethod
    def _about(entries: Sequence[_Entry]) -> list[Decision]:
        """What was decided about single trials."""
        told = []
        for entry in entries:
            number = entry.proposal.number
            what = f"trial {number} tries {in_words(entry.proposal.values)}"
            told.append(Decision(what, f"proposed by: {entry.proposal.origin}"))
            if entry.failure:
                told.append(Decision(f"trial {number} failed", entry.failure))
            elif entry.same_as is not None:
                why = f"the same configuration as trial {entry.same_as}, measured on seed {entry.own[0]}"
                told.append(Decision(f"trial {number} is no trial of its own", why))
        return told

    def note(self, decisions: Sequence[Decision]) -> None:
        """Adds decisions to decisions.jsonl, each once."""
        known = {(d.get("what", ""), d.get("why", "")) for d in self.folder.read_decisions()}
        new = [d for d in decisions if (d.what, d.why) not in known]
        if not new:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path = self.folder.decisions
        cut_short = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        lines = [json.dumps({"time": now, "what": d.what, "why": d.why}) + "\n" for d in new]
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + "".join(lines))
            file.flush()
            os.fsync(file.fileno())


def outside_drop_path(values: Values) -> Values:
    """Those of other sections of the training config."""
    return {key: value for key, value in values.items() if key.partition(".")[0] != "drop_path"}


def cache_by_values(find: Callable[[Values], Values | None]) -> Callable[[Values], Values | None]:
    """The function, which is not asked the same again: it may build a model to answer."""
    known: dict[str, Values | None] = {}

    def found(values: Values) -> Values | None:
        key = json.dumps(values, sort_keys=True)
        if key not in known:
            known[key] = find(values)
        return known[key]

    return found


def in_words(values: Values) -> str:
    """'drop_path.rate 0.123, drop_path.profile linear'."""
    return ", ".join(f"{key} {value_in_words(value)}" for key, value in values.items())


def value_in_words(value: object) -> str:
    """Numbers to three digits, the rest as JSON."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def finalist(study: StudyConfig, role: str, values: Values) -> Finalist:
    """A configuration for the final, without scores.

    Raises:
        ConfigError: The training config refuses it.
    """
    config = candidate(study.document, values)
    return Finalist(role, values, digest_of(config), config, {})
