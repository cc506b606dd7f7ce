"""Optuna proposes what a study tries: ask and tell, with rate 0 and what is published or advised first.

Each question is put to a fresh sampler whose seed follows from the study's and the number of the trial: what is proposed
depends on the trials before it alone, not on how often the study was stopped. In one process a study so repeats itself;
several processes tell their results in the order in which they come.

Optuna is told the score of the first seeds (`race.seeds`), and that it is noisy; of a configuration that it proposes again
the score of the next ones. The caller holds the study's lock.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.errors import ConfigError, Failure
from tuning.config import DEFAULT_TRIALS, SearchSection
from tuning.space import Space, Values, digest_of

if TYPE_CHECKING:
    import optuna

MOST_FOR_GP = 4
"""Parameters up to which `auto` takes the Gaussian process."""


@dataclass(frozen=True)
class Start:
    """A configuration to try first, and who proposed it: "zero", "published", "advice" or "given"."""

    origin: str
    values: Values


@dataclass(frozen=True)
class Proposal:
    """A trial as the storage holds it.

    Attributes:
        number: Optuna's.
        values: Of the parameters.
        origin: Who proposed it.
        digest: Of its config; empty where the config was refused.
        told: Whether Optuna knows the result.
        refused: Why the training config refused it; empty else.
    """

    number: int
    values: Values
    origin: str
    digest: str
    told: bool
    refused: str = ""


class Search:
    """The trials of one study.

    Args:
        folder: Of the study, which holds the journal.
        space: What is varied.
        fingerprint: Of the study's config.
        sign: 1 where more is better.
        starts: Tried first. Of a study that is there already, its own are taken, so that it goes on as it began.

    Raises:
        ConfigError: The storage cannot be reached, is damaged, or holds a study of another config.
        Failure: The journal cannot be written: a disk that is full, or the right is missing.
    """

    def __init__(self, folder: Path, space: Space, *, fingerprint: str, sign: int, starts: Sequence[Start]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space, self.section = space, space.study.tune.search
        self.url = space.study.tune.storage
        self.journal = folder / "journal.log"
        name = "study" if self.url is None else folder.resolve().name  # a folder with its journal may be moved
        with self._reached(ConfigError):
            storage = self._open()
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize" if sign > 0 else "minimize",
                load_if_exists=True,
            )
            attributes = self.study.user_attrs
            if "fingerprint" not in attributes:
                self.study.set_user_attr("starts", json.dumps([[s.origin, s.values] for s in starts]))
                self.study.set_user_attr("fingerprint", fingerprint)
                attributes = self.study.user_attrs
        if attributes["fingerprint"] != fingerprint:
            raise ConfigError(
                f"storage: {self._where} holds a study {name!r} of another config; choose another --output"
            )
        own = [Start(origin, values) for origin, values in json.loads(attributes["starts"])]
        grid = [Start("grid", values) for values in space.grid()] if self.section.sampler == "grid" else []
        self.starts = [*own, *grid]

    @property
    def target(self) -> int:
        """How many trials the study has in the end."""
        return len(self.starts) if self.section.sampler == "grid" else self.section.trials or DEFAULT_TRIALS

    @property
    def sampler_name(self) -> str:
        """The sampler that `auto` stands for, or the one named."""
        return sampler_name(self.section, len(self.space.parameters))

    def proposals(self) -> list[Proposal]:
        """All trials, without those whose process died while it proposed them."""
        found = []
        with self._reached(Failure):
            if self.url is None:
                _mend(self.journal)
            for trial in self.study.get_trials(deepcopy=False):
                if "digest" not in trial.user_attrs:
                    continue
                found.append(
                    Proposal(
                        trial.number,
                        self.space.decode(trial.params),
                        trial.user_attrs["origin"],
                        trial.user_attrs["digest"],
                        trial.state.is_finished(),
                        trial.user_attrs.get("refused", ""),
                    )
                )
        return found

    def ask(self) -> None:
        """Adds a trial; one that the training config refuses fails at once.

        Raises:
            Failure: The storage cannot be reached any more.
        """
        import optuna

        with self._reached(Failure):
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:  # left by a process that died while it asked: nobody else asks now
                if trial.state == optuna.trial.TrialState.RUNNING and "digest" not in trial.user_attrs:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            number = sum("digest" in trial.user_attrs for trial in trials)
            start = self.starts[number] if number < len(self.starts) else None
            waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in trials)
            if start is not None and not waiting:
                self.study.enqueue_trial(self.space.encode(self.space.completed(start.values)))
            self.study.sampler = self._sampler(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked = self.study.ask(self.space.distributions)
            asked.set_user_attr("origin", self.sampler_name if start is None else start.origin)
            values = self.space.decode(asked.params)
            try:
                digest = digest_of(self.space.candidate(values))
            except ConfigError as error:
                digest = ""
                asked.set_user_attr("refused", str(error))
            asked.set_user_attr("digest", digest)
            if not digest:
                self.study.tell(asked.number, state=optuna.trial.TrialState.FAIL)

    def tell(self, number: int, value: float | None) -> None:
        """Tells Optuna the score of a trial; None: its run failed."""
        import optuna

        with self._reached(Failure):
            if value is None:
                self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(number, value)

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """A sampler for this trial alone."""
        from optuna import samplers

        text = hashlib.sha256(f"{self.section.seed} {number}".encode()).hexdigest()
        seed = int(text[:8], 16)
        # some trials at random before anything is modelled; those the study starts with count as such
        first = max(4, self.target // 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are called experimental
            if self.sampler_name == "gp":
                return samplers.GPSampler(seed=seed, n_startup_trials=first, deterministic_objective=False)
            if self.sampler_name == "tpe":
                return samplers.TPESampler(seed=seed, n_startup_trials=first, multivariate=True, constant_liar=True)
            return samplers.RandomSampler(seed=seed)

    def _open(self) -> Any:
        """The storage that the config names."""
        from optuna import storages
        from optuna.storages.journal import JournalFileBackend

        if self.url is not None:
            return storages.RDBStorage(self.url)
        _mend(self.journal)
        return storages.JournalStorage(JournalFileBackend(str(self.journal)))

    @property
    def _where(self) -> str:
        """The storage as messages name it, without a password."""
        return str(self.journal) if self.url is None else re.sub(r"(?<=://)[^/@]*@", "...@", self.url)

    @contextlib.contextmanager
    def _reached(self, kind: type[Exception]) -> Iterator[None]:
        """Says in words that the storage cannot be used; each database has errors of its own."""
        try:
            yield
        except (ConfigError, Failure):
            raise
        except Exception as error:
            told = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:200]
            what = f"{type(error).__name__}: {told}" if told else type(error).__name__
            if self.url is not None:
                advice = "see that it runs and that this machine reaches it; the study's units are kept"
                raise kind(f"storage: {self._where} cannot be used ({what})\n{advice}") from error
            if (disk := _refusal_of_disk(error)) is not None:
                advice = "make room or give the right to write there; the same command goes on"
                raise Failure(f"{self.journal} cannot be written: {disk}\n{advice}") from error
            raise kind(
                f"{self.journal} is damaged or cannot be read ({what})\n"
                "move it away and start the study again: what it asks for anew has its units already"
            ) from error


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
"""What is wrong with a disk or with rights to it, not with what lies on it."""


def _refusal_of_disk(error: BaseException) -> str | None:
    """The system's words where a disk could not be written; None where an error has another cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            return cause.strerror or os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return None


def sampler_name(section: SearchSection, parameters: int) -> str:
    """The sampler that is used for so many parameters."""
    if section.sampler != "auto":
        return section.sampler
    return "gp" if parameters <= MOST_FOR_GP else "tpe"


def _mend(journal: Path) -> None:
    """Cuts off a last line that a kill left incomplete: what is appended to it would be lost, and with it the file."""
    try:
        with journal.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
                file.flush()
                os.fsync(file.fileno())
    except FileNotFoundError:
        return
