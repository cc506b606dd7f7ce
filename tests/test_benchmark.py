"""benchmark.py as a user runs it: its command line, what it writes, and what mistakes cost."""

import json
from pathlib import Path

import pytest

from benchmark import main, parse_args
from benchmarks import (
    any_model,
    busy,
    digits,
    drop_path,
    finetune,
    finetune_imagenet,
    fold,
    foreign_off,
    gpu,
    precision,
    profiles,
    saving,
    scale,
    startup,
    step,
    tuning,
)
from benchmarks.measure import ROOT, facts
from files.errors import Failure


def test_an_output_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(SystemExit) as caught:
            main(["busy", "--output", str(output)])
        assert caught.value.code == 2 and f"--output {output}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (["drop-path"], drop_path.drop_path_benchmark),
        (["limits"], drop_path.limits_benchmark),
        (["any-model"], any_model.any_model_table),
        (["fold"], fold.fold_benchmark),
        (["digits", "optim.epochs=1"], digits.digits_seeds),
        (["busy", "optim.epochs=1"], busy.busy_benchmark),
        (["saving"], saving.saving_benchmark),
        (["profiles", "optim.epochs=1"], profiles.profiles_benchmark),
        (["finetune", "optim.epochs=1"], finetune.finetune_benchmark),
        (["finetune-imagenet", "optim.epochs=1"], finetune_imagenet.finetune_imagenet_benchmark),
        (["tuning", "optim.epochs=1"], tuning.tuning_benchmark),
        (["startup"], startup.startup_benchmark),
        (["foreign-off"], foreign_off.foreign_off_benchmark),
        (["scale"], scale.scale_benchmark),
        (["step", "--quick"], step.step_benchmark),
        (["gpu"], gpu.gpu_benchmark),
        (["precision", "optim.epochs=1"], precision.precision_benchmark),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_benchmark_has_a_command(arguments: list[str], runs: object, tmp_path: Path) -> None:
    args = parse_args([arguments[0], "--output", str(tmp_path / "new" / "a.json"), *arguments[1:]])
    assert args.run is runs and args.output.exists()
    assert ("threads" in args) == (
        arguments[0] in ("drop-path", "limits", "fold", "saving", "step", "foreign-off", "gpu")
    )


def test_what_is_written_names_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(fold, "fold_benchmark", lambda args: {"rows": args.models})
    output = tmp_path / "fold.json"
    command = ["fold", "--models", "a", "b", "--threads", "1", "--output", str(output)]
    assert main(command) == 0
    told = json.loads(output.read_text())
    assert told == {"command": f"python benchmark.py {' '.join(command)}", **facts(), "rows": ["a", "b"]}
    assert ", 1 thread, " in told["machine"] and capsys.readouterr().out == f"written {output}\n"


def test_a_failure_is_a_line_and_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(args: object) -> None:
        raise Failure("the run stopped")

    monkeypatch.setattr(fold, "fold_benchmark", fail)
    assert main(["fold", "--output", str(tmp_path / "a.json")]) == 1
    assert capsys.readouterr().err == "error: the run stopped\n"


def test_waiting_threads_sleep_before_torch_loads() -> None:
    source = (ROOT / "benchmark.py").read_text()
    assert source.index("\nwait_passively()") < source.index("import torch")


def test_architectures_are_where_the_table_reads_them() -> None:
    names = any_model.ARCHITECTURES.read_text().split()
    assert len(names) == len(set(names)) > 90
