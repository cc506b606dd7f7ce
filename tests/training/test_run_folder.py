"""The run folder: what may be written where, what metrics.csv and the JSON files hold, which run is the newest."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from files.errors import ConfigError
from layers.cpu_compiler import describe_compiler
from training import run_folder
from training.distributed import World
from training.run_folder import COLUMNS, RunFolder, changed_environment, describe_environment, latest_run, new_run_path

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def row(epoch: int, **values: float) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, 0.5), "epoch": epoch, "step": 10 * epoch, **values}


def read(folder: RunFolder) -> list[dict[str, str]]:
    with folder.metrics.open() as file:
        return list(csv.DictReader(file))


def started(path: Path) -> Path:
    """A folder that holds a run."""
    path.mkdir(parents=True)
    RunFolder(path).config.write_text("seed: 0\n")
    return path


@contextmanager
def nobody() -> Iterator[None]:
    """Root may write anywhere, so those tests run as somebody else."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs permissions of POSIX")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


# ---- the folder -----------------------------------------------------------------------------------------------------


ATTEMPTS = pytest.mark.parametrize("attempt", [RunFolder.make, RunFolder.probe], ids=["make", "probe"])


def test_a_fresh_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "b")
    assert not folder.holds_run()
    folder.make(fresh=True)
    assert folder.path.is_dir() and not list(folder.path.iterdir()), "nothing is left of the attempt to write"
    folder.make(fresh=True)  # an empty folder is as good as none


def test_a_folder_with_a_run_is_for_going_on_only(tmp_path: Path) -> None:
    folder = RunFolder(started(tmp_path / "run"))
    assert folder.holds_run()
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume auto"):
        folder.make(fresh=True)
    folder.make(fresh=False)
    assert folder.config.read_text() == "seed: 0\n"


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b").probe(fresh=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    RunFolder(tmp_path / "a" / "b" / "c").probe(fresh=True)
    assert not list((tmp_path / "a").iterdir()), "what was there before stays"
    folder = RunFolder(started(tmp_path / "run"))
    folder.probe(fresh=False)
    assert [p.name for p in folder.path.iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match="already holds a run"):
        folder.probe(fresh=True)


@ATTEMPTS
def test_a_folder_with_something_else_is_refused(tmp_path: Path, attempt) -> None:
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        attempt(RunFolder(tmp_path), fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@ATTEMPTS
@pytest.mark.parametrize("below", ["", "run", "runs/run"])
def test_a_file_in_the_way(tmp_path: Path, below: str, attempt) -> None:
    (tmp_path / "file").write_text("words")
    with pytest.raises(ConfigError, match="cannot write to"):
        attempt(RunFolder(tmp_path / "file" / below), fresh=True)
    assert (tmp_path / "file").read_text() == "words"


@ATTEMPTS
@pytest.mark.parametrize("name", ["x" * 300, "link", "\udcff"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str, attempt) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot write to"):
        attempt(RunFolder(tmp_path / name), fresh=True)
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


@ATTEMPTS
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_folder_without_permission(tmp_path: Path, monkeypatch, mode: int, fresh: bool, attempt) -> None:
    """Not writable, and not even to be entered: a message at once instead of a traceback or a lost epoch."""
    (tmp_path / "locked").mkdir()
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").chmod(mode)
    try:
        with nobody():
            for path in (Path("locked"), Path("locked/run")):
                with pytest.raises(ConfigError, match=f"cannot write to {path}: .*denied; choose another --output"):
                    attempt(RunFolder(path), fresh=fresh)
    finally:
        (tmp_path / "locked").chmod(0o755)


@ATTEMPTS
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("best", "folder"),
        ("checkpoints", "folder"),
        ("tensorboard", "folder"),
        ("metrics.csv", "file"),
        ("skipped.csv", "file"),
    ],
)
def test_a_file_for_a_folder_or_a_folder_for_a_file(tmp_path: Path, name: str, told: str, attempt) -> None:
    path = started(tmp_path / "run") / name
    path.write_text("x") if told == "folder" else path.mkdir()
    with pytest.raises(ConfigError, match=f"{path} is no {told}, as a run needs it"):
        attempt(RunFolder(tmp_path / "run"), fresh=False)
    path.unlink() if told == "folder" else path.rmdir()
    path.mkdir() if told == "folder" else path.write_text("x")
    attempt(RunFolder(tmp_path / "run"), fresh=False)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(["config.yaml", name])


@ATTEMPTS
def test_checkpoints_that_could_not_be_written_are_told_at_once(tmp_path: Path, monkeypatch, attempt) -> None:
    folder = started(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints").chmod(0o555)
    for each in (tmp_path, folder):
        each.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    with nobody(), pytest.raises(ConfigError, match=r"cannot write to run/checkpoints; choose another --output"):
        attempt(RunFolder(Path("run")), fresh=False)


# ---- data.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '"text"'])
def test_a_run_whose_data_is_not_told(tmp_path: Path, content: str | None) -> None:
    folder = RunFolder(tmp_path)
    if content is not None:
        folder.data.write_text(content)
    assert folder.read_data() is None
    folder.write_json(folder.data, {"dataset": "digits"})
    assert folder.read_data() == {"dataset": "digits"}


# ---- metrics.csv and JSON -------------------------------------------------------------------------------------------


def test_metrics_have_one_header_and_plain_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(row(1, train_loss=1 / 3, lr=1e-6))
    folder.append_metrics(row(2) | {"more": 1.0})
    lines = folder.metrics.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 3
    first = read(folder)[0]
    assert (first["epoch"], first["step"], first["train_loss"], first["lr"]) == ("1", "10", "0.33333333", "1e-06")


@pytest.mark.parametrize("torn", ["", "3,3", "3,30,0.5,0.5,0.5,0.5,0.5,0.5,0.5"])
def test_cutting_keeps_the_epochs_done(tmp_path: Path, torn: str) -> None:
    """Also behind a line that a kill cut short; what is appended then starts on a line of its own."""
    folder = RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        folder.append_metrics(row(epoch))
    with folder.metrics.open("a") as file:
        file.write(torn)
    assert [folder.count_metrics(epochs) for epochs in range(5)] == [0, 1, 2, 3, 3]
    folder.cut_metrics(2)
    assert [r["epoch"] for r in read(folder)] == ["1", "2"]
    folder.append_metrics(row(3))
    assert [r["epoch"] for r in read(folder)] == ["1", "2", "3"]
    assert all(None not in r and None not in r.values() for r in read(folder)), "as many columns as the header"


def test_cutting_cuts_the_rates_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rates = {"nominal_rate": 0.05, "drawn": 100, "dropped": 5, "computed": 97}
    for epoch in (1, 2, 3):
        folder.append_rates({"epoch": epoch, **rates})
    with folder.rates.open("a") as file:
        file.write("4,0.0")
    folder.cut_metrics(1)
    folder.append_rates({"epoch": 2, **rates})
    assert folder.rates.read_text() == "epoch,nominal_rate,drawn,dropped,computed\n1,0.05,100,5,97\n2,0.05,100,5,97\n"
    assert not folder.metrics.exists()


def test_a_column_is_empty_in_the_rows_from_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("epoch,val_top1,step\n1,50.5,10\n2,60,20\n\0\n")
    folder.check_metrics()
    folder.cut_metrics(1)
    folder.append_metrics(row(2))
    first, second = read(folder)
    assert {k: v for k, v in first.items() if v} == {"epoch": "1", "step": "10", "val_top1": "50.5"}
    assert list(first) == list(COLUMNS) and second["val_top5"] == "0.5"


def test_a_column_that_no_metric_gives_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.check_metrics()  # nothing there yet
    folder.metrics.write_text("epoch,val_topp1\n1,50.5\n")
    with pytest.raises(ConfigError, match=r"unknown column 'val_topp1'; did you mean 'val_top1'\?; known: epoch, ste"):
        folder.check_metrics()


def test_cutting_what_is_empty_or_not_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.cut_metrics(3)
    assert not folder.metrics.exists()
    folder.metrics.touch()  # killed before the header was on disk
    folder.cut_metrics(3)
    folder.append_metrics(row(4))
    assert [r["epoch"] for r in read(folder)] == ["4"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.summary, {"steps": 1, "final_top1": float("nan"), "rows": [float("inf")]})
    read = json.loads(folder.summary.read_text(), parse_constant=pytest.fail)
    assert read == {"steps": 1, "final_top1": None, "rows": [None]}


def test_a_kill_leaves_the_old_json(tmp_path: Path, monkeypatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(folder.summary, {"steps": 1})

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        folder.write_json(folder.summary, {"steps": 2})
    assert json.loads(folder.summary.read_text()) == {"steps": 1}
    folder.write_json(folder.summary, {"steps": 3})
    assert json.loads(folder.summary.read_text()) == {"steps": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# ---- naming and finding runs ----------------------------------------------------------------------------------------


def test_new_runs_in_one_second_get_different_folders(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "time", lambda: 1_700_000_000.0)
    paths = []
    for _ in range(3):
        paths.append(new_run_path("digits", WORLD))
        RunFolder(paths[-1]).make(fresh=True)
    stem = paths[0].name
    assert paths[0].parent == Path("runs") and stem.startswith("digits-202311")
    assert [p.name for p in paths[1:]] == [f"{stem}-2", f"{stem}-3"]


def test_the_newest_run_of_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert latest_run("digits") is None
    ages = {"digits-20260102-000000": 30, "digits-20260101-000000": 20, "digits-20260101-000000-2": 25,
            "digits-large-20260103-000000": 10, "other-20260103-000000": 5}  # fmt: skip
    for name, age in ages.items():
        started(Path("runs", name))
        os.utime(RunFolder(Path("runs", name)).config, (10**9 - age, 10**9 - age))
    Path("runs/digits-20260104-000000").mkdir()  # made, but never started
    assert latest_run("digits") == Path("runs/digits-20260101-000000"), "started or resumed last"
    assert latest_run("digits-large") == Path("runs/digits-large-20260103-000000")
    assert latest_run("digit") is None
    assert latest_run("digits*") is None


def test_resume_finds_what_new_run_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "time", lambda: 1_700_000_000.0)
    for age in (20, 10):
        path = started(new_run_path("fine.tune[1]", WORLD))
        os.utime(RunFolder(path).config, (10**9 - age, 10**9 - age))
        assert latest_run("fine.tune[1]") == path


# ---- environment ----------------------------------------------------------------------------------------------------


def test_the_environment_says_what_ran_where() -> None:
    told = json.loads(json.dumps(describe_environment(WORLD)))
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert told["processor"].endswith(torch.backends.cpu.get_cpu_capability()) and len(told["processor"]) > 12
    assert told["compiler"] == describe_compiler()
    assert told["device"] == "cpu" and told["processes"] == 1 and told["cuda"] is None
    assert told["command"] and told["started"].endswith("+00:00")
    assert told["commit"] is None or len(told["commit"].rstrip("+")) == 40


def test_a_checkout_without_git_has_no_commit(monkeypatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_folder.subprocess, "run", no_git)
    assert describe_environment(WORLD)["commit"] is None


def test_what_changed_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert changed_environment(folder, WORLD) == [], "nothing is known of the start"
    now = describe_environment(WORLD)
    folder.write_json(folder.environment, now | {"command": "another", "started": "earlier", "commit": "f00"})
    assert changed_environment(folder, WORLD) == [], "these do not change rounding"
    folder.write_json(
        folder.environment, now | {"threads": 64, "torch": "1.0", "processor": "Z80", "compiler": "cc 1.0"}
    )
    assert changed_environment(folder, WORLD) == [
        f"processor was Z80, is now {now['processor']}",
        f"compiler was cc 1.0, is now {now['compiler']}",
        f"threads was 64, is now {torch.get_num_threads()}",
        f"torch was 1.0, is now {torch.__version__}",
    ]
    folder.write_json(folder.environment, now | {"decoder": "pillow 13.0"})
    assert changed_environment(folder, WORLD, decoder="pillow 13.0") == []
    changed = changed_environment(folder, WORLD, decoder="torchcodec 0.17, pillow 13.0")
    assert changed == ["decoder was pillow 13.0, is now torchcodec 0.17, pillow 13.0"]
    folder.environment.write_text('{"threads": 6')  # cut short
    assert changed_environment(folder, WORLD) == []
