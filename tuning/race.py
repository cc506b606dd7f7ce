"""The race over seeds: every trial has few seeds, the better ones more, and the winner the best mean over most.

No run is cut short: the best drop-path rate moves with the length of training, and short runs favour low rates (the more is
dropped, the slower the start), so that pruning over epochs would prefer what is not wanted. Seeds are the same for all
trials, so that they are compared in pairs. All is a pure function of the scores: a study that goes on decides again what it
decided before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from files.words import counted

Scores = Mapping[int, Mapping[int, float]]
"""Of each trial by its number: the score of each seed that is done."""


@dataclass(frozen=True)
class Decision:
    """Something that was decided, and the reason."""

    what: str
    why: str


@dataclass
class Standing:
    """Where a race stands.

    Attributes:
        needed: Seeds to be run now, by trial; empty at the end.
        dropped: Trials that are out and why, the first ones first.
        winner: The trial; None while the race goes on, or where nobody takes part.
        decisions: All that was decided so far, in order.
    """

    needed: dict[int, list[int]] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    winner: int | None = None
    decisions: list[Decision] = field(default_factory=list)


def race(scores: Scores, seeds: Sequence[int], keep: Sequence[int], *, sign: int = 1) -> Standing:
    """Where the race stands after these scores.

    Args:
        scores: Of all trials that take part; one that failed does not.
        seeds: Seeds that a trial has at the end of each round; they are 0, 1, 2, ...
        keep: How many go on after each round but the last.
        sign: 1 where more is better, -1 where less is.
    """
    standing = Standing()
    alive = sorted(scores)
    for round_number, count in enumerate(seeds):
        if len(alive) == 1 and round_number > 0:
            break  # nobody is left to compare it with
        standing.needed = {
            trial: missing for trial in alive if (missing := [s for s in range(count) if s not in scores[trial]])
        }
        if standing.needed or not alive:
            return standing
        means = {trial: sum(scores[trial][seed] for seed in range(count)) / count for trial in alive}
        ranked = sorted(alive, key=lambda trial: (-sign * means[trial], trial))  # of equals the one proposed first
        over = f"over {counted(count, 'seed')}"
        if round_number == len(seeds) - 1:
            alive = ranked[:1]
            rest = ", ".join(f"trial {trial} {means[trial]:.4g}" for trial in ranked[1:4])
            why = f"the best mean {over}, {means[ranked[0]]:.4g}" + (f"; then {rest}" if rest else "")
            for trial in ranked[1:]:
                standing.dropped[trial] = (
                    f"mean {means[trial]:.4g} {over}, the winner, trial {ranked[0]}, has {means[ranked[0]]:.4g}"
                )
            standing.decisions.append(Decision(f"trial {ranked[0]} wins the race", why))
            break
        kept = ranked[: max(1, keep[round_number])]
        last = means[kept[-1]]
        if len(kept) < len(ranked):
            standing.decisions.append(
                Decision(
                    f"{len(kept)} of {len(ranked)} trials go on to {seeds[round_number + 1]} seeds: "
                    f"{', '.join(map(str, sorted(kept)))}",
                    f"the best means {over}, {means[kept[0]]:.4g} to {last:.4g}",
                )
            )
        for trial in ranked[len(kept) :]:
            why = f"mean {means[trial]:.4g} {over}; the {len(kept)} that go on have at least {last:.4g}"
            if sign < 0:
                why = f"mean {means[trial]:.4g} {over}; the {len(kept)} that go on have at most {last:.4g}"
            standing.dropped[trial] = why
            standing.decisions.append(Decision(f"trial {trial} is dropped", why))
        alive = sorted(kept)
    if alive:
        standing.winner = alive[0]
        if not any("wins" in decision.what for decision in standing.decisions):
            standing.decisions.append(Decision(f"trial {alive[0]} wins the race", "nobody else is left"))
    return standing
