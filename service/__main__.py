"""`python -m service`: load, check, warm up and serve a bundle; also runs `classify` (`command`) and `plan` (`plan`).

Exit codes: 0 stopped by a signal, 1 something failed, 2 wrong settings or an unusable bundle.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

# Everything else is imported when needed, so that `--help`, a wrong setting and Ctrl-C take effect at once.
if TYPE_CHECKING:
    from service.budget.target import Target, Targets
    from service.settings import Settings

logger = logging.getLogger("service")
T = TypeVar("T")


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped by a signal, or classify, or plan; return the exit code."""
    if list(arguments[:1]) == ["classify"]:
        from service import command

        return _printing(command.main, arguments[1:])
    if list(arguments[:1]) == ["plan"]:
        from service.plan import command as plan

        return _printing(plan.main, arguments[1:])
    from service.command_line import load_settings, mistaken_variables
    from service.settings import SettingsError

    try:
        settings = _printing(load_settings, arguments)  # or help, or the version
    except SettingsError as error:
        return _refuse(error)
    from models.bundle import BundleError
    from service.compiled import staleness
    from service.logs import set_up_logs
    from service.server import ListenError, listen, use_one_heap

    set_up_logs(settings.log_level, as_json=settings.access_log == "json")
    for message in mistaken_variables(os.environ):
        logger.warning(message)
    if stale := staleness():
        logger.warning(stale)
    use_one_heap()
    try:
        listener = listen(settings.host, settings.port)
    except ListenError as error:
        return _refuse(error, code=1)
    with listener:
        try:
            return _serve(settings, listener)
        except (SettingsError, BundleError) as error:
            return _refuse(error)


def _printing(command: Callable[[Sequence[str]], T], arguments: Sequence[str]) -> T:
    """Run `command`; exit with 1 if standard output cannot be written, silently if its reader is gone (`| head`)."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files and classes that it cannot encode
    try:
        try:
            return command(arguments)
        finally:
            sys.stdout.flush()  # the first write may be this one, also for `--help`
    except BrokenPipeError:
        _discard_standard_output()
    except OSError as error:
        if error.filename is not None:  # an error of a file, not of standard output
            raise
        _discard_standard_output()
        sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
    raise SystemExit(1)


def _discard_standard_output() -> None:
    """Redirect standard output to /dev/null: Python flushes its buffer at exit, which would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _serve(settings: "Settings", listener: socket.socket) -> int:
    from models.bundle import load_bundle
    from models.onnx_weights import StageLoadError
    from service import compiled
    from service.assembly import build_engine
    from service.budget.target import Keeper, Targets
    from service.front.supervisor import Front
    from service.metrics import Metrics
    from service.runners.base import FatalRunnerError, RunnerError
    from service.runners.precision import at_precision
    from service.server import ServerFailed
    from service.single import serve

    admin_token = settings.read_admin_token()
    try:
        loaded = load_bundle(settings.bundle)
        bundle = at_precision(loaded, settings.precision, settings.runner, settings.device)
    except (StageLoadError, RunnerError) as error:
        return _refuse(error)
    manifest = bundle.manifest
    targets = Targets(bundle.frontier(), bundle.costs_mflops)
    target = _target(settings, targets)
    front = Front(bundle, targets, settings, admin_token, listener) if settings.http_workers else None
    metrics = Metrics(manifest, front.tallies if front else ())
    try:
        engine = build_engine(
            bundle,
            target.average_mflops,
            runner_name=settings.runner,
            device=settings.device,
            compile_stages=settings.compile_stages,
            resize=settings.resize,
            n_lanes=settings.lanes or None,
            max_rows=settings.max_batch_rows,
            policy=settings.scheduling_policy,
            burst_images=settings.burst_images,
            max_in_flight_rows=settings.max_in_flight,
            max_queue_s=settings.max_queue_s,
            latency_s=settings.latency_s,
            observer=metrics,
        )
    except FatalRunnerError as error:
        _end_without_clean_up(error)
    except (StageLoadError, RunnerError) as error:
        return _refuse(error)
    bundle.check_unchanged()  # stages and weights were read after the digests were checked
    logger.info(compiled.state())
    metrics.watch(engine.stats, engine.budget_state, bundle)
    keeper = Keeper(engine, target)

    def say_ready() -> None:
        line = (
            f"ExitServe is ready on {url} with {manifest.name} {manifest.version} in {bundle.precision}: "
            f"{len(manifest.exits)} exits, {target.average_mflops:.4g} of {targets.full_mflops:.4g} MFLOPs an image"
        )
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except OSError as error:  # serve nevertheless: only the ready line is lost
            _discard_standard_output()
            logger.warning("%s; standard output cannot be written: %s", line, error.strerror)

    url = _url(listener)
    failure = None
    code = 1
    try:
        if front is None:
            code = serve(bundle, engine, metrics, targets, keeper, settings, admin_token, listener, say_ready)
        else:
            code = front.serve(engine, metrics, keeper, say_ready)
    except ServerFailed as error:
        failure = error
    stats = engine.stats()
    logger.info("stopped: %d answered, %d abandoned, %d failed", stats.answered, stats.abandoned, stats.failed)
    if engine.broken.done():
        _end_without_clean_up(engine.broken.result())
    if failure is not None and isinstance(failure.__cause__, FatalRunnerError):
        _end_without_clean_up(failure)
    return code if failure is None else _refuse(failure, code=1)


def _target(settings: "Settings", targets: "Targets") -> "Target":
    """The budget in the settings; by default the full network's cost, of which steering spends only what pays."""
    from service.budget.target import Kind, TargetError
    from service.settings import SettingsError

    asked: tuple[tuple[Kind, float | None], ...] = (
        ("average_mflops", settings.budget_mflops),
        ("fraction", settings.budget_fraction),
        ("accuracy", settings.budget_accuracy),
    )
    for kind, value in asked:
        if value is not None:
            try:
                return targets.resolve(kind, value)
            except TargetError as error:
                raise SettingsError(f"the budget for {settings.bundle}: {error}") from None
    return targets.resolve("fraction", 1.0)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refuse(error: Exception, code: int = 2) -> int:
    from service.logs import Outlet

    with suppress(OSError):  # the exit code says it, too
        Outlet(sys.stderr.fileno()).put(f"error: {error}")
    return code


def _end_without_clean_up(error: Exception) -> NoReturn:
    """Exit with 1 after the device was lost. Call it while the engine is still referenced.

    Freeing memory, events or graphs of a lost device may hang or abort the process: with torch 2.11 on an H200, exiting
    after a device-side assert printed `terminate called after throwing an instance of 'c10::AcceleratorError'`.
    """
    _refuse(error)
    logging.shutdown()
    os._exit(1)


def end_at_once_when_told() -> None:
    """Let Ctrl-C and SIGTERM end the process at once, without a traceback, until the server handles them itself.

    By default Python would raise KeyboardInterrupt while loading. PID 1 of a container needs a handler, because the
    kernel does not deliver signals that PID 1 has no handler for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end if os.getpid() == 1 else signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def hold_standard_streams() -> None:
    """Open /dev/null in place of closed standard streams (`>&-`); a socket could get their descriptors otherwise.

    Input is opened for writing and output for reading, so that using them still fails. Logs are discarded.
    """
    wrong = (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    for number, (name, mode, flags) in enumerate(wrong):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest free descriptor: `number`
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


if __name__ == "__main__":
    hold_standard_streams()
    end_at_once_when_told()
    sys.exit(main(sys.argv[1:]))
