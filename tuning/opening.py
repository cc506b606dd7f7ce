"""A study before it begins: its folder, what it starts with, and all that can be found wrong before anything is trained."""

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from files.durable import save_text
from files.errors import ConfigError
from files.lock import LOCK, locked
from files.outputs import may_write
from files.strict_yaml import load_yaml, validate
from files.words import counted
from training.config import TrainConfig, dump_config
from training.distributed import init_world
from training.setup import Setup, build
from tuning.config import FREE_TO_CHANGE, StudyConfig, TuneConfig, dump_study, first_difference
from tuning.facts import count_training_images, steps_of
from tuning.links import Advice, Finalist, Links
from tuning.plan import Plan, finalist, in_words, outside_drop_path
from tuning.race import Decision
from tuning.search import Search, Start, sampler_name
from tuning.space import Space, Values, digest_of, value_at
from tuning.study import StudyFolder

DECIDE_STEPS = {"optim", "optim.epochs", "optim.accumulate", "data.batch_size"}
"""Keys of the training config that decide how many steps a run takes, beside the number of its training images."""

_OF_DATA = ["dataset", "root", "config_name", "classes", "val_fraction", "folds", "fold", "train_samples"]
DECIDE_IMAGES = {"data", *(f"data.{key}" for key in [*_OF_DATA, "train_file", "train_split", "train_shards"])}
"""Those that decide the number of training images."""

WAIT = 600.0
"""Seconds that a process waits for the study's lock, which the others hold for moments, and for a report at the end."""


@dataclass
class Opened:
    """A study that is ready to be worked on.

    Attributes:
        study: As read.
        folder: Where it is.
        plan: What is next.
        links: Its neighbours.
    """

    study: StudyConfig
    folder: StudyFolder
    plan: Plan
    links: Links

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The study's lock: while one process decides, the others wait."""
        with locked(self.folder.path, wait=WAIT):
            yield


def default_folder(study: StudyConfig) -> Path:
    """Where a study goes without --output, and where the same command finds it again."""
    return Path("runs") / f"tune-{study.name}"


def check_base(study: StudyConfig) -> Setup:
    """Builds the training config that is tuned, as a run would: its model, weights and data must be there.

    Raises:
        ConfigError: Whatever cannot work; or the data lack the part that the verdict is to be scored on.
    """
    setup = build(study.base, init_world(study.base.runtime.device))
    verdict = study.tune.verdict
    if verdict is not None and verdict.split == "test" and not setup.data.test:
        what = "no test part" if setup.data.test is None else "an empty test part"
        raise study.refuse(
            "verdict.split",
            f"'test', but dataset {study.base.data.dataset!r} has {what}: a verdict needs data that no search saw\n"
            "give the data one (a folder 'test', data.test_file), or set verdict=null, or verdict.split=val as a hint",
        )
    return setup


def find_starts(study: StudyConfig, space: Space, links: Links) -> tuple[list[Start], list[Finalist], list[Decision]]:
    """What is tried first, what the winner is compared with in the end, and what was left out and why."""
    left_out: list[Decision] = []
    known: dict[str, Values] = {"zero": {"drop_path.rate": 0.0}}
    if isinstance(study.base.drop_path.profile, list):
        known["zero"]["drop_path.profile"] = "linear"
    try:
        advice = links.advise(_first_tried(study, space))
        if advice is not None:
            known["advice"] = _strength(advice.rate, advice.profile)
        if published := _published(advice):
            known["published"] = published
    except ConfigError as error:
        left_out.append(Decision("no advice", str(error)))
    starts = []
    for origin in study.tune.search.start or ():
        if origin not in known:
            left_out.append(Decision(f"nothing to start with from: {origin}", "no such rate is known for this model"))
            continue
        inside = {key: value for key, value in known[origin].items() if key in space.parameters}
        outside = [key for key, value in inside.items() if not space.holds(key, value)]
        if "drop_path.rate" not in inside or outside:
            why = f"the space does not hold {', '.join(outside) or 'drop_path.rate'} of {in_words(known[origin])}"
            left_out.append(Decision(f"not tried first: {origin}", why))
            continue
        starts.append(Start(origin, space.completed(inside)))
    starts += [Start("given", space.completed(values)) for values in study.tune.search.enqueue]
    starts = _each_once(starts, space, left_out)
    finalists = []
    if study.tune.verdict is not None:
        finalists.append(finalist(study, "zero", known["zero"]))
        if published := known.get("published") or _published_for_any(space, links):
            finalists.append(finalist(study, "published", _finalist_s(published, space)))
    return starts, finalists, left_out


def _first_tried(study: StudyConfig, space: Space) -> TrainConfig:
    """The training config that what is known is tried with: its own, but for what the space does not hold of it."""
    base = study.base.model_dump()
    others = outside_drop_path(space.completed({}))
    changed = {key: value for key, value in others.items() if value != value_at(base, key)}
    return space.candidate(changed) if changed else study.base


def _published(advice: Advice | None) -> Values | None:
    """What is published for a config's purpose: training, or fine-tuning."""
    if advice is None or advice.published is None:
        return None
    return _strength(advice.published, advice.published_profile or "linear")


def _published_for_any(space: Space, links: Links) -> Values | None:
    """What is published for one of the models that are varied, whichever wins: there may be such a finalist."""
    keys = [key for key in ("model", "model.name") if key in space.parameters]
    for config in space.corners(keys) if keys else ():
        with contextlib.suppress(ConfigError):
            if found := _published(links.advise(config)):
                return found
    return None


def _finalist_s(published: Values, space: Space) -> Values:
    """What of a published strength a finalist has of its own; the rest is the winner's.

    A rate says nothing without its profile and its meaning, whether they are varied or not.
    """
    own = ("drop_path.rate", "drop_path.profile", "drop_path.rate_is")
    return {key: value for key, value in published.items() if key in own or key in space.parameters}


def published_beside(study: StudyConfig, space: Space, links: Links, others: Values) -> Values | None:
    """What a published finalist has of its own beside a winner.

    Args:
        study: As read.
        space: Its space.
        links: Whom to ask.
        others: The winner's values outside drop_path; its model may be another than the training config's.

    Returns:
        None: nothing is published.

    Raises:
        ConfigError: No advice can be had.
    """
    found = _published(links.advise(space.candidate(others) if others else study.base))
    return None if found is None else _finalist_s(found, space)


def _each_once(starts: list[Start], space: Space, left_out: list[Decision]) -> list[Start]:
    """Those that are not the configuration of an earlier one, which would be a trial that tells nothing."""
    kept: dict[str, Start] = {}
    for i, start in enumerate(starts):
        try:
            digest = digest_of(space.candidate(start.values))
        except ConfigError:
            digest = f"refused {i}"  # as the study will say when it tries it
        if digest in kept:
            why = f"the same configuration as {kept[digest].origin}: {in_words(kept[digest].values)}"
            left_out.append(Decision(f"not tried again: {start.origin}", why))
        else:
            kept[digest] = start
    return list(kept.values())


def _strength(rate: float, profile: str) -> Values:
    """A rate as it is published: the largest over blocks, through all of training."""
    return {
        "drop_path.rate": rate,
        "drop_path.profile": profile,
        "drop_path.rate_is": "max",
        "drop_path.schedule": {"kind": "constant"},
    }


def open_study(study: StudyConfig, path: Path, links: Links | None = None) -> Opened:
    """Makes the folder of a study, or goes on with the one there.

    Args:
        study: As read.
        path: The folder.
        links: The neighbours.

    Raises:
        ConfigError: The folder holds a study of another config, or something else, or cannot be written; or the storage
            cannot be used.
    """
    links = links or Links()
    space = Space(study)
    folder = StudyFolder(path)
    _make(folder)
    with locked(path, wait=WAIT):
        changed = _check_same(study, folder)
        starts, finalists, left_out = find_starts(study, space, links)
        fingerprint = _fingerprint(study)
        sign = study.tune.objective.sign
        search = Search(path, space, fingerprint=fingerprint, sign=sign, starts=starts)
        save_text(folder.train, dump_config(study.base))
        # beside each other the two are the whole study, wherever the folder is copied to
        own = study.tune.model_copy(update={"train": folder.train.name, "overrides": {}})
        save_text(folder.config, dump_study(own))
        plan = Plan(study, folder, search, finalists, partial(published_beside, study, space, links))
        plan.note([*left_out, *([Decision("the study goes on with another config", changed)] if changed else [])])
    return Opened(study, folder, plan, links)


def check_folder(study: StudyConfig, path: Path) -> None:
    """Refuses a folder that this study cannot go to; writes nothing.

    Raises:
        ConfigError: It holds a study of another config, or something else, or is no folder, or cannot be written.
    """
    folder = StudyFolder(path)
    try:
        _refuse_other(folder)
        _refuse_unwritable(path)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; choose another --output") from None
    _check_same(study, folder)


def _refuse_other(folder: StudyFolder) -> None:
    if folder.path.exists() and not folder.config.exists():
        held = [entry.name for entry in folder.path.iterdir() if entry.name != LOCK]
        # what a process leaves that was killed while it made the study is nobody else's
        own = (folder.journal.name, folder.train.name, folder.decisions.name, ".tmp-")
        if not all(name.startswith(own) for name in held):
            raise ConfigError(f"{folder.path} is not empty and holds no study; choose another --output")


def _refuse_unwritable(path: Path) -> None:
    """Raises what making the folder and writing to it would; makes nothing, since others may be at work there."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if not os.path.isdir(there):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not may_write(there):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _make(folder: StudyFolder) -> None:
    path = folder.path
    try:
        _refuse_other(folder)
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}; choose another --output") from None


def _check_same(study: StudyConfig, folder: StudyFolder) -> str:
    """Refuses a study of another config; says what changed that may."""
    if not folder.config.exists():
        return ""
    before = validate(TuneConfig, load_yaml(folder.config)).model_dump()
    after = study.tune.model_dump()
    trained = validate(TrainConfig, load_yaml(folder.train)).model_dump()
    # how the training config was given does not matter, it is compared itself
    for config in (before, after):
        del config["train"], config["overrides"]
    other = first_difference(trained, study.base.model_dump())
    found = f"the training config: {other}" if other else first_difference(before, after, FREE_TO_CHANGE)
    if found:
        found = f"{found.replace(' here and ', ' in what was given and ', 1).removesuffix(' there')} in the folder"
        raise ConfigError(
            f"{folder.path} holds a study of another config; {found}\n"
            "choose another --output, or give it as it was (only "
            f"{', '.join(FREE_TO_CHANGE)} may change)"
        )
    return first_difference(before, after, ("jobs",)) or ""


def _fingerprint(study: StudyConfig) -> str:
    """Of what must not change while a study goes on."""
    tune = study.tune.model_dump(
        mode="json", exclude_defaults=True, exclude={"train", "overrides", "jobs", "race", "verdict"}
    )
    tune.get("search", {}).pop("trials", None)
    tune.pop("storage", None)
    text = json.dumps([tune, study.base.model_dump(mode="json", exclude_defaults=True)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_study(study: StudyConfig, path: Path, setup: Setup, links: Links | None = None) -> str:
    """The plan of a study in a few lines, before it is made."""
    space = Space(study)
    starts, finalists, left_out = find_starts(study, space, links or Links())
    tune = study.tune
    grid = tune.search.sampler == "grid"
    trials = len(space.grid()) if grid else tune.search.trials or 12
    rounds = tune.race.seeds
    kept = tune.race.kept(trials)
    runs = rounds[0] * trials + sum(
        min(k, trials) * (b - a) for k, a, b in zip(kept, rounds[:-1], rounds[1:], strict=True)
    )
    fresh = (len({f.digest for f in finalists}) + 1) * tune.verdict.seeds if tune.verdict else 0
    epochs, steps = _length(space, setup)
    lines = [
        f"study     {path}: {study.base.model.name} on {study.base.data.dataset}, "
        f"{_span(epochs, 'epoch')}, {_span(steps, 'step')} a run",
        *(f"varied    {key}: {_varied(values)}" for key, values in tune.space.items()),
        f"search    {counted(trials, 'trial')}, sampler {sampler_name(tune.search, len(space.parameters))}, "
        f"seed {tune.search.seed}; {tune.objective.metric} of the last epoch",
        *(f"first     {start.origin}: {in_words(start.values)}" for start in starts),
        *(f"note      {decision.what}: {decision.why}" for decision in left_out),
        f"race      {' -> '.join([*map(str, rounds[:-1]), counted(rounds[-1], 'seed')])}; {_going_on(kept)}",
        f"verdict   {_verdict(tune, finalists)}",
        f"runs      at most {runs} of search and race and {fresh} of the verdict: "
        f"{_span([(runs + fresh) * count for count in steps], 'step')}",
    ]
    if setup.too_much_accumulated:
        lines.append(f"warning   {setup.too_much_accumulated}")
    return "\n".join(lines)


def _length(space: Space, setup: Setup) -> tuple[list[int], list[int]]:
    """Epochs and optimizer steps of a run, as the corners of the space have them: what is varied may decide them."""
    keys = [key for key in space.parameters if key in DECIDE_STEPS or key in DECIDE_IMAGES]
    configs = space.corners(keys) if keys else []
    if not configs:
        return [space.study.base.optim.epochs], [setup.total_steps]
    at_hand = len(setup.data.train)
    recount = not DECIDE_IMAGES.isdisjoint(keys)
    images = [(count_training_images(config)[0] if recount else None) or at_hand for config in configs]
    return [c.optim.epochs for c in configs], [steps_of(c, n) for c, n in zip(configs, images, strict=True)]


def _span(counts: list[int], noun: str) -> str:
    """'10 steps', or '10 to 50 steps'."""
    low, high = min(counts), max(counts)
    return counted(high, noun) if low == high else f"{low:,} to {counted(high, noun)}"


def _going_on(kept: list[int]) -> str:
    """How many trials go on after each round."""
    if not kept:
        return "no trials go on"
    last = counted(kept[-1], "trial")
    return f"{', '.join([*map(str, kept[:-1]), last])} {'goes' if kept[-1] == 1 else 'go'} on"


def _varied(values: Any) -> str:
    if isinstance(values, list):
        return ", ".join(json.dumps(value) if not isinstance(value, str) else value for value in values)
    step = f" in steps of {values.step:g}" if values.step is not None else ""
    return f"{values.low:g} to {values.high:g}{step}{', evenly over the logarithm' if values.log else ''}"


def _verdict(tune: TuneConfig, finalists: list[Finalist]) -> str:
    if tune.verdict is None:
        return "none"
    roles = " and ".join(["the winner", *(f"{f.role}" for f in finalists)])
    fresh = counted(tune.verdict.seeds, "fresh seed")
    few = "; below 6 seeds no significance can be claimed" if tune.verdict.seeds < 6 else ""
    return f"{roles} on {fresh}, scored on {tune.verdict.split}{few}"


def warn(message: str) -> None:
    """Says something that stops nothing."""
    print(f"warning: {message}", file=sys.stderr)
