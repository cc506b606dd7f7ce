"""Kernels for CPUs are compiled by the compiler at hand, or torch's forms run."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layers import cpu_compiler, fast_cpu

pytestmark = pytest.mark.skipif(fast_cpu.library() is None, reason="no kernels for this CPU, or no C compiler")


def in_a_new_process(code: str, **environment: str) -> str:
    """What Python code prints, with warnings beside it."""
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(fast_cpu.__file__).parents[1])} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


STEP = """
import torch
from layers import cpu_compiler, fast_cpu
from layers.mlp import Mlp
fast_cpu.FEWEST = 1
mlp = Mlp(16)
for _ in range(2):
    mlp(torch.ones(4, 16)).sum().backward()
print("sum", mlp.fc2.bias.grad.sum().item(), fast_cpu.library() is not None, cpu_compiler.describe_compiler())
"""


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda folder: {"PATH": str(folder)}, "no C compiler: cc, gcc or clang"),
        (lambda folder: {"CC": str(folder / "broken")}, "error: this is no compiler"),
        (lambda folder: {"CC": str(folder / "lazy")}, "cannot open shared object file"),
        (lambda folder: {"TMPDIR": str(folder / "missing"), "TEMP": "", "TMP": ""}, None),
        (lambda folder: {"ATEN_CPU_CAPABILITY": "default"}, ""),
    ],
    ids=["no compiler", "broken compiler", "no result", "no folder for temporary files", "no AVX2"],
)
def test_without_a_compiler_torchs_forms_run(
    change: Callable[[Path], dict[str, str]], reason: str | None, tmp_path: Path
) -> None:
    for name, line in {"broken": "echo error: this is no compiler >&2; exit 1", "lazy": "exit 0"}.items():
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
    said = in_a_new_process(STEP, **change(tmp_path))
    assert "sum 128.0" in said
    assert ("sum 128.0 False" in said) == (reason is not None), "another folder is found for temporary files"
    assert said.count("training is slower") == bool(reason) and (reason or "") in said


def test_kernels_run_on_torchs_own_threads() -> None:
    counting = "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}))"
    said = in_a_new_process(f"{STEP}\n{counting}")
    assert "sum 128.0 True" in said and said.splitlines()[-1] == "1", said


def test_no_library_of_a_compilers_own_is_wanted(tmp_path: Path) -> None:
    compiler = cpu_compiler.find_compiler()
    assert compiler
    subprocess.run(
        [*compiler, *cpu_compiler.FLAGS, "-c", cpu_compiler.SOURCE, "-o", tmp_path / "kernels.o"], check=True
    )
    names = subprocess.run(["nm", "-u", tmp_path / "kernels.o"], capture_output=True, text=True, check=True).stdout
    wanted = {name for name in names.split() if len(name) > 1}
    assert "GOMP_parallel" in wanted
    assert wanted <= {
        "GOMP_parallel",
        "omp_get_thread_num",
        "omp_get_num_threads",
        "memset",
        "memcpy",
        *("log2f", "exp", "erfc"),
        "syscall",
    }, wanted


@pytest.mark.parametrize(
    "given, command",
    [("env LANG=C gcc", ["env", "LANG=C", "gcc"]), ("no-such-compiler -m64", ["cc"]), ('gcc "', ["cc"]), (" ", ["cc"])],
)
def test_the_environments_compiler(given: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "no-such-compiler" else f"/bin/{name}")
    monkeypatch.setenv("CC", given)
    assert cpu_compiler.find_compiler() == [f"/bin/{command[0]}", *command[1:]]


def test_a_compiler_with_arguments_compiles() -> None:
    said = in_a_new_process(STEP, CC=f"env LANG=C '{shutil.which('cc')}' -pipe")
    assert "sum 128.0 True" in said and "training is slower" not in said


def test_a_compilers_arguments_change_neither_results_nor_the_process() -> None:
    smallest = "print('smallest', (torch.tensor([1e-40]) * 1).item() > 0)"
    for arguments in ("-ffast-math -fvisibility=hidden", "-Ofast -fsanitize=address,undefined"):
        said = in_a_new_process(f"{STEP}\n{smallest}", CC=f"{shutil.which('cc')} {arguments}")
        assert "sum 128.0 True" in said and "smallest True" in said, arguments


def test_a_compiler_that_leaves_the_kernels_out(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("")
    (tmp_path / "empty").write_text(
        f"#!/bin/sh\nfor last; do :; done\n{shutil.which('cc')} -shared -x c {tmp_path / 'empty.c'} -o $last\n"
    )
    (tmp_path / "empty").chmod(0o755)
    said = in_a_new_process(STEP, CC=str(tmp_path / "empty"))
    assert "sum 128.0 False" in said and said.count("training is slower") == 1 and "left the kernels out" in said


def script(file: Path, lines: str) -> str:
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)
    return str(file)


THREADS = """
import os, threading
from layers import cpu_compiler
found, ready = [], threading.Barrier(4)
def want():
    ready.wait()
    found.append(cpu_compiler.library())
threads = [threading.Thread(target=want) for _ in range(3)]
for thread in threads:
    thread.start()
ready.wait()
while not os.path.exists(os.environ["CALLS"]):
    pass
child = os.fork()  # which has no thread that could give a lock back
if not child:
    os._exit(cpu_compiler.library() is None)
print("child", os.waitpid(child, 0)[1])
for thread in threads:
    thread.join()
print("threads", found[0] is not None and found == found[:1] * 3)
"""


def test_threads_that_want_the_kernels_at_once_wait_for_one_compiler(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    slow = script(tmp_path / "slow", f'echo x >>{calls}; sleep 0.3; exec {shutil.which("cc")} "$@"')
    said = in_a_new_process(THREADS, CC=slow, CALLS=str(calls))
    assert "child 0" in said and "threads True" in said
    assert len(calls.read_text().splitlines()) == 4, "it compiles and links, once in each process"


def test_a_folder_that_nothing_may_be_run_from(monkeypatch: pytest.MonkeyPatch) -> None:
    load = ctypes.CDLL

    def refuses(name: str) -> ctypes.CDLL:
        if not name.startswith("/proc/self/fd/"):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", refuses)
    kernels = cpu_compiler._library.__wrapped__()
    assert kernels is not None and kernels.start


@pytest.mark.parametrize("to", [1, 2])
def test_a_compiler_that_writes_without_end_is_ended(to: int, tmp_path: Path) -> None:
    endless = script(tmp_path / "endless", f"exec yes >&{to}")
    began = time.monotonic()
    with pytest.raises(subprocess.SubprocessError, match="writes without end"):
        cpu_compiler.output_of([endless], seconds=60)
    assert time.monotonic() - began < 30
    much = cpu_compiler.output_of(["/bin/sh", "-c", "yes | head -c 1000000"], seconds=60)
    assert len(much) == 1_000_000


def test_a_compiler_that_hangs_with_its_output_closed_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cpu_compiler.output_of(["/bin/sh", "-c", "exec >&- 2>&-; sleep 60"], seconds=1)


def test_files_in_memory_may_have_names_in_any_encoding(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/images \xe9\x85.bin"
    with open(name, "wb") as file:
        file.write(b"numbers")
    code = f"import mmap, os; m = mmap.mmap(os.open({name!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ)\n{STEP}"
    assert "sum 128.0 True" in in_a_new_process(code)


def test_torch_behind_a_link_has_kernels_too(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.symlink_to(Path(torch.__file__).parents[1])
    another = "import sklearn.cluster"  # brings an OpenMP library of its own
    code = f"import sys; sys.path.insert(0, {str(packages)!r}); {another}; import torch; print(torch.__file__)\n{STEP}"
    said = in_a_new_process(code)
    assert str(packages) in said and "sum 128.0 True" in said, said


def test_a_compiler_that_names_itself_in_another_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("#!/bin/sh\nprintf 'cc (Distribution \\251) 13\\n'\n")
    (tmp_path / "old").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "old"))
    assert cpu_compiler.describe_compiler() == "cc (Distribution \ufffd) 13"


def test_the_compiler_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = cpu_compiler.describe_compiler()
    assert told and any(character.isdigit() for character in told)
    (tmp_path / "mute").write_text("#!/bin/sh\n")
    (tmp_path / "mute").chmod(0o755)
    for compiler in (str(tmp_path / "mute"), "/usr/bin/false"):
        monkeypatch.setenv("CC", compiler)
        assert cpu_compiler.describe_compiler() is None
    monkeypatch.setattr(cpu_compiler, "is_supported", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_compiler.describe_compiler() is None and cpu_compiler._library.__wrapped__() is None


# it starts another program, says its id, and waits for it
SCRIPT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
child.wait()
"""


def test_a_compiler_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        cpu_compiler.output_of([sys.executable, "-c", SCRIPT, tmp_path / "pid"], seconds=3)
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(100):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":  # dead, and nobody has asked for it yet
                return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("its child goes on")


def test_a_compiler_that_fails_says_why() -> None:
    code = "import sys; print('x'); sys.stderr.write('because'); sys.exit(sys.stdin.read() == '')"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        cpu_compiler.output_of([sys.executable, "-c", code], seconds=60)
    assert caught.value.stderr == b"because"
    assert cpu_compiler.output_of([sys.executable, "-c", "print('x')"], seconds=60) == b"x\n"
