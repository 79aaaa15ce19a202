"""Ending a command by a signal: one exception, which unwinds it; then no process that it started is left."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 5
RETRY_SECONDS = 0.05


class Interrupted(SystemExit):
    """The process received SIGINT, SIGTERM or SIGHUP; the exit code is 128 + its number, as in a shell.

    Its notes (`add_note`) say how to resume.
    """


def raise_on_signals(signals: Iterable[signal.Signals] = SIGNALS) -> None:
    """Let `signals` raise `Interrupted` in the main thread; those that the process was started to ignore stay so.

    While the exception propagates, further signals are ignored: they must not cut the cleanup short. Where Python
    could only report it (in a destructor, say), it is raised again.
    """
    raised: weakref.ref[Interrupted] | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised is not None and raised() is not None:
            return
        interrupted = Interrupted(128 + number)
        raised = weakref.ref(interrupted)
        try:
            raise interrupted
        finally:
            del interrupted  # the traceback refers to this frame: together they would never be freed

    report = sys.unraisablehook

    def raise_again(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            number = int(unraisable.exc_value.code or 0) - 128
            retry = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
            retry.daemon = True
            retry.start()
        else:
            report(unraisable)

    sys.unraisablehook = raise_again
    for number in signals:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)


def interruption(error: BaseException | None) -> Interrupted | None:
    """The `Interrupted` that `error` is, or that it came in the way of: writing to a closed terminal fails, say."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Run a command within it: a signal ends the process with one line, its code, and no child left.

    Threads that still compute are not waited for.
    """
    raise_on_signals()
    try:
        yield
    except BaseException as error:
        interrupted = interruption(error)
        if interrupted is None:
            raise
        end(children())
        with contextlib.suppress(OSError):  # a terminal that has hung up
            print(": ".join(["interrupted", *getattr(interrupted, "__notes__", ())]), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(int(interrupted.code or 0))
    finally:
        for number in SIGNALS:  # the interpreter's own end is not worth a traceback
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def end(leaders: Iterable[psutil.Process]) -> None:
    """Terminate processes and all their descendants; kill those that still run after `STOP_SECONDS`.

    Each gets the signal by itself: some begin sessions of their own, and would outlive their parent.
    """
    import psutil

    everyone = []
    for leader in leaders:
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone += [leader, *leader.children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(everyone, timeout=STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def children() -> list[psutil.Process]:
    """The children of this process, but for multiprocessing's tracker, which ignores signals and ends with it."""
    import psutil

    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if not any("multiprocessing.resource_tracker" in part for part in child.cmdline()):
                found.append(child)
    return found
