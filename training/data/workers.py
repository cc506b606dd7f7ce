"""What a loader's worker does about signals that are meant for the training process, and about that process's death.

Whoever stops a job may signal the whole process group: a terminal (Ctrl-C), `timeout`, SLURM. A forked worker has
inherited the run's handlers, which would note the signal in a copy that nobody looks at, and torch's own handler ends a
worker on SIGTERM, so that the training process could not finish its step and save. Workers therefore stay: only their
parent ends them.

A parent that is killed ends nobody. torch's workers look now and then whether they still have the parent that they had
when they began to look: one whose parent died before that, while it was starting, would stay for ever, with the
run's files and pipes open. So each looks for the process that made it, from the start.
"""

import multiprocessing
import os
import signal
import threading
import time

SECONDS_BETWEEN_LOOKS = 1.0


def leave_signals_to_the_run(_worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: stop signals do nothing; a SIGTERM of the parent, or its death, ends the
    worker.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, where a worker goes on ending by SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        threading.Thread(target=_end_with_the_parent, args=(parent.pid,), name="signals", daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    """Takes each SIGTERM and looks who sent it; torch ends workers so that do not end by themselves."""
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        elif (taken := signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)) and taken.si_pid == parent:
            break
    os._exit(0)
