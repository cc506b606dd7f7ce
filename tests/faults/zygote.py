"""Starts runs for the tests of faults: a process that has imported everything once and forks a real process for each run.

Reads a line of JSON per request and answers with one; what a request holds, `Zygote` in parts.py says.
"""

import ctypes
import json
import os
import resource
import sys
import traceback
from typing import Any

import torch.utils.tensorboard.writer  # noqa: F401

import train  # all that a run imports, once
from training.report import page

exits: dict[int, int] = {}


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        become(request)
        if not request["report"]:
            page.write_report = lambda _: None  # type: ignore[assignment]
        names: dict[str, Any] = {"__name__": "hook", "__file__": request["out"]}
        exec(compile(request["hook"], "hook", "exec"), names)
        code = int(names["main"]()) if "main" in names else train.main(request["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (s for s in (sys.stdout, sys.stderr) if s is not None):
            try:
                stream.flush()
            except Exception:
                code = code or 120
        os._exit(code)


def become(request: dict[str, Any]) -> None:
    """Makes this process what the run is to find: files, folder, environment, limits, rights."""
    os.chdir(request["cwd"])
    os.environ.update({k: v for k, v in request["env"].items() if v is not None})
    for name in (k for k, v in request["env"].items() if v is None):
        os.environ.pop(name, None)
    for number, name in ((1, request["out"]), (2, request["err"])):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["train.py", *request["arguments"]]
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["obeys"] and os.getuid() == 0:
        obey_permissions()


def obey_permissions() -> None:
    """Gives up what lets root read and write what the permissions forbid; Linux only."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice 32 bits
    assert libc.capget(header, sets) == 0
    for i in range(3):
        sets[i] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


def reap(pid: int) -> int | None:
    """The exit code of a child, None while it runs."""
    if pid not in exits:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        exits[pid] = os.waitstatus_to_exitcode(status)
    return exits[pid]


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed here goes to where pytest shows it
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if request["what"] == "start" else reap(request["pid"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
