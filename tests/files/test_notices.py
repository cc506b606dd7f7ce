"""The project's own warnings: a line in a command, Python's own warnings for who imports the packages."""

import warnings
from pathlib import Path

import pytest

from files.durable import RubbishWarning, remove
from files.errors import run_command
from layers.cpu_compiler import CompilerWarning
from layers.fast_cuda import DeviceWarning

OTHERS = compile(
    "import warnings\ndef complain():\n    warnings.warn('of theirs')\n", "/lib/site-packages/theirs/code.py", "exec"
)


def test_a_command_prints_its_own_warnings_as_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = tmp_path / "a\x1bb"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_command(lambda: remove(gone) or 0) == 0
    shown = str(gone).replace("\x1b", "\\x1b")
    assert not caught
    assert tuple(capsys.readouterr()) == ("", f"warning: {shown}: cannot be removed: No such file or directory\n")


def test_what_others_warn_of_is_python_s_to_show() -> None:
    code: dict = {}
    exec(OTHERS, code)
    with pytest.warns(UserWarning, match="of theirs"):
        run_command(lambda: code["complain"]() or 0)


def test_what_others_warn_of_in_compiled_code_is_theirs_though_ours_called_it() -> None:
    from files import durable  # a module of ours whose frame calls no `warn`

    code: dict = {"warn_explicitly": warnings.warn, "__name__": "files.durable"}
    exec(compile("def call():\n    warn_explicitly('from C')\n", durable.__file__, "exec"), code)
    with pytest.warns(UserWarning, match="from C"):
        run_command(lambda: code["call"]() or 0)


OF_A_PROCESS = ["DeviceWarning", "RubbishWarning"]
ALL = ["UserWarning", "CompilerWarning", *OF_A_PROCESS]


def warn_of_all() -> int:
    for category in (UserWarning, CompilerWarning, DeviceWarning, RubbishWarning):
        warnings.warn(category.__name__, category, stacklevel=1)
    return 0


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, ALL),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ALL),
        ({"RANK": "1"}, ALL),  # somebody else's: there is one process
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, ALL),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, OF_A_PROCESS),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, ["CompilerWarning", *OF_A_PROCESS]),  # another machine
    ],
)
def test_of_several_processes_the_main_one_says_what_all_would(
    environment: dict[str, str], said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_command(warn_of_all) == 0
    assert capsys.readouterr().err.splitlines() == [f"warning: {word}" for word in said]


def test_what_others_warn_of_every_process_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code: dict = {}
    exec(OTHERS, code)
    with pytest.warns(UserWarning, match="of theirs"):
        run_command(lambda: code["complain"]() or 0)


def test_without_a_command_they_are_python_s_warnings(tmp_path: Path) -> None:
    run_command(lambda: 0)
    with pytest.warns(UserWarning, match="cannot be removed: No such file"):
        remove(tmp_path / "gone")
