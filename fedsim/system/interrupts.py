"""Stop a command on a signal: `Interrupted` unwinds it, and then all processes that it started are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RETRY_SECONDS = 0.05


class Interrupted(SystemExit):
    """The process received SIGINT, SIGTERM or SIGHUP; its exit code is 128 + the signal's number, as in a shell.

    Its notes (`add_note`) say how to resume.
    """


def raise_on_signals() -> None:
    """Let `SIGNALS` raise `Interrupted` in the main thread, except those that the process was started to ignore.

    While the exception propagates, further signals are ignored, so that cleanup is not interrupted. Where Python can
    only report an exception, for instance in a destructor, it is raised again.
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
            del interrupted  # avoids a reference cycle with the traceback

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
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # for instance SIGHUP by nohup
            signal.signal(number, interrupt)


@contextlib.contextmanager
def resumable(how: Callable[[], str]) -> Iterator[None]:
    """Context manager: what ends a command early, a signal or a closed pipe, has `how` to resume it as its note."""
    try:
        yield
    except (Interrupted, BrokenPipeError) as ended:
        if not getattr(ended, "__notes__", ()):
            ended.add_note(how())
        raise


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Context manager: `SIGNALS` that arrive within it are handled at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def interruption(error: BaseException | None) -> Interrupted | None:
    """`error` if it is `Interrupted`, or else the `Interrupted` in whose handling it was raised, if any."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Context manager for a command: on a signal, end all processes it started, print one line, exit with its code.

    It does not wait for threads that still compute.
    """
    from fedsim.system.processes import end_marked, new_mark  # with psutil, which the clients of Flower do not need

    raise_on_signals()
    os.environ.update(mark := new_mark())
    try:
        yield
    except BaseException as error:
        interrupted = interruption(error)
        if interrupted is None:
            raise
        end_marked(mark)
        with contextlib.suppress(OSError):  # the terminal may be closed
            print(": ".join(["interrupted", *getattr(interrupted, "__notes__", ())]), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if sys.stdout is not None:  # the process was started with it closed
                sys.stdout.flush()
        os._exit(int(interrupted.code or 0))
    finally:
        for number in SIGNALS:  # a signal during the interpreter's shutdown would print a traceback
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
