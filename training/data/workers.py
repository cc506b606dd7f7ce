"""What a loader's worker does about signals that are meant for the training process.

Whoever stops a job may signal the whole process group: a terminal (Ctrl-C), `timeout`, SLURM. A forked worker has
inherited the run's handlers, which would note the signal in a copy that nobody looks at, and torch's own handler ends a
worker on SIGTERM, so that the training process could not finish its step and save. Workers therefore stay: only their
parent ends them.
"""

import os
import signal
import threading


def leave_signals_to_the_run(_worker: int) -> None:
    """For `DataLoader(worker_init_fn=...)`: stop signals do nothing, but a SIGTERM of the parent ends the worker."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where a worker goes on ending by SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, name="signals", daemon=True).start()


def _end_with_the_parent() -> None:
    """Takes each SIGTERM and looks who sent it; torch ends workers so that do not end by themselves."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
