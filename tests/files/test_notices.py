"""The project's own warnings: a line in a command, Python's own warnings for who imports the packages."""

import warnings
from pathlib import Path

import pytest

from files.durable import remove
from files.errors import run_command

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


def test_without_a_command_they_are_python_s_warnings(tmp_path: Path) -> None:
    run_command(lambda: 0)
    with pytest.warns(UserWarning, match="cannot be removed: No such file"):
        remove(tmp_path / "gone")
