"""`python -m service classify IMAGE...`: classifies image files, by a running server or by a bundle in this process.

Exit codes: 0 every image was answered, 1 some were not, 2 the command could not be carried out or completed.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from time import perf_counter, sleep
from urllib.parse import urlencode

from service.api.answers import Classification

WISHES = ("top_k", "exit", "min_confidence", "max_mflops", "deadline_ms")
AT_ONCE = 256  # images in flight when a bundle is run in this process
STDIN = "-"


class CommandError(Exception):
    """The command cannot be carried out; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result for one image: an answer, or the reason why there is none."""

    path: str
    answer: Classification | None
    why_not: str = ""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service classify",
        description="Classify image files, by a running server (--url) or, without one, by a bundle in this process.",
        epilog="Example:\n  python -m service classify examples/images/*.png --top-k 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="PNG, JPEG, WebP, BMP or GIF files; - is standard input"
    )
    where = parser.add_argument_group("where").add_mutually_exclusive_group()
    where.add_argument("--url", help="address of a running server, such as http://127.0.0.1:8000")
    where.add_argument("--bundle", type=Path, default=Path("models/zoo/cifar100-msdnet"), help="(default: %(default)s)")
    how = parser.add_argument_group("how (explained in docs/http.md)")
    how.add_argument("--top-k", metavar="N", help="classes to show per image (default: 1)")
    how.add_argument("--exit", metavar="N", help="answer at this exit")
    how.add_argument("--min-confidence", metavar="SHARE", help="answer at the first exit with this confidence")
    how.add_argument("--max-mflops", metavar="MFLOPS", help="run no stage that would cost more than this in total")
    how.add_argument("--deadline-ms", metavar="MS", help="answer by then with the best result so far")
    how.add_argument(
        "--budget-fraction", type=float, metavar="F", help="average compute, as a fraction; not with --url (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Classify, print, and return the exit code."""
    parser = command_line()
    given = parser.parse_args(arguments)
    wishes = {name: value for name in WISHES if (value := getattr(given, name)) is not None}
    wishes.setdefault("top_k", "1")
    try:
        if given.images.count(STDIN) > 1:
            raise CommandError("- is standard input, which holds one image: give it once.")
        if given.url is not None and given.budget_fraction is not None:
            raise CommandError("--budget-fraction does not go with --url: a server has its own budget (PUT /budget).")
        if given.url is not None:
            rows = _ask(given.url, given.images, wishes)
        else:
            rows = _classify_here(given.bundle, given.budget_fraction, given.images, wishes)
        failed = _print_lines(rows) if given.json else _print_table(_counted(rows, len(given.images)))
    except CommandError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 1 if failed else 0


def _ask(url: str, paths: Sequence[str], wishes: dict[str, str]) -> Iterator[Row]:
    """Have a server classify the images one by one; requests that it asks to repeat later are retried."""
    try:
        from service import client
        from service.client.patience import Patience
    except ImportError as error:
        raise CommandError(f"{error}, or leave --url out to classify here.") from None

    def answer(server: client.Client, contents: bytes, patience: Patience) -> Classification:
        while True:
            try:
                return server.classify(contents, **wishes)  # type: ignore[arg-type]
            except client.Later as refused:
                sleep(patience.wait_s(refused))

    try:
        with client.Client(url) as server:
            patience = Patience(inf, client.DEFAULT_TIMEOUT_S)
            for path in paths:
                try:
                    yield Row(path, answer(server, _contents(path), patience))
                    # Renewed by an answer only: if there are none, not every image is to wait as long again.
                    patience = Patience(inf, client.DEFAULT_TIMEOUT_S)
                except OSError as error:
                    yield Row(path, None, _unreadable(error))
                except client.Refused as refused:
                    if refused.kind in ("bad-parameter", "not-found"):  # the same for every image
                        raise CommandError(str(refused)) from None
                    yield Row(path, None, str(refused))
    except client.ServerError as error:
        raise CommandError(f"{error} Leave --url out to classify here.") from None


def _classify_here(
    bundle_path: Path, budget_fraction: float | None, paths: Sequence[str], wishes: dict[str, str]
) -> Iterator[Row]:
    """Load a bundle and run its engine in this process."""
    from models.bundle import BundleError, load_bundle
    from models.onnx_weights import StageLoadError
    from service.api.documents import Documents
    from service.api.options import OptionReader
    from service.api.problems import Problem
    from service.assembly import build_engine
    from service.budget.target import TargetError, Targets
    from service.errors import EngineError
    from service.images.decoder import ImageDecoder, ImageError
    from service.runners.base import RunnerError
    from service.settings import Settings

    try:
        bundle = load_bundle(bundle_path)
        target = Targets(bundle.frontier(), bundle.costs_mflops).resolve(
            "fraction", 1.0 if budget_fraction is None else budget_fraction
        )
        asked = OptionReader(len(bundle.manifest.class_names), bundle.costs_mflops).read(urlencode(wishes).encode())
        engine = build_engine(bundle, target.average_mflops)
        engine.start()
    except (BundleError, StageLoadError, RunnerError, TargetError) as error:
        raise CommandError(str(error)) from None
    except Problem as problem:
        raise CommandError(problem.detail) from None
    max_pixels: int = Settings.model_fields["max_pixels"].default
    size = bundle.manifest.input
    documents = Documents(bundle.manifest)

    def begin(path: str) -> Callable[[], Row]:
        started = perf_counter()
        image = decoder.decode_now(_contents(path))
        decoded = perf_counter()
        future = engine.submit(image, asked.at(started))

        def end() -> Row:
            try:
                answer = future.result()
            except EngineError as error:
                return Row(path, None, f"No answer: {error}.")
            total_s = decoded - started + (answer.queue_ms + answer.compute_ms) / 1e3
            document = documents.answer(answer, decoded - started, total_s, "")
            return Row(path, Classification.model_validate(document))

        return end

    with closing(ImageDecoder(size.height_px, size.width_px, max_pixels)) as decoder:
        try:
            for start in range(0, len(paths), AT_ONCE):
                ends: list[Callable[[], Row]] = []
                for path in paths[start : start + AT_ONCE]:
                    try:
                        ends.append(begin(path))
                    except OSError as error:
                        ends.append(_failed(path, _unreadable(error)))
                    except ImageError as error:
                        ends.append(_failed(path, str(error)))
                    except EngineError as error:  # the stages cannot be run any more
                        ends.append(_failed(path, f"No answer: {error}."))
                yield from (end() for end in ends)
        finally:
            engine.drain(1.0)


def _contents(path: str) -> bytes:
    return sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()


def _failed(path: str, why: str) -> Callable[[], Row]:
    return lambda: Row(path, None, why)


def _unreadable(error: OSError) -> str:
    if isinstance(error, IsADirectoryError):
        return "This is a folder: give the images in it, as in FOLDER/*."
    return f"The file cannot be read: {error.strerror}."


def _counted(rows: Iterable[Row], n_rows: int) -> Iterator[Row]:
    """Show progress on a terminal, as the table is printed only at the end, when its column widths are known."""
    is_terminal = sys.stderr.isatty()
    try:
        for done, row in enumerate(rows, start=1):
            if is_terminal and done < n_rows:
                sys.stderr.write(f"\r{done} of {n_rows} images")
            yield row
    finally:
        if is_terminal:
            sys.stderr.write("\r\033[K")


def _print_lines(rows: Iterable[Row]) -> int:
    """Print each row as soon as it is there; return the number without an answer."""
    import orjson

    failed = 0
    for row in rows:
        failed += row.answer is None
        answer = row.answer.model_dump() if row.answer else None
        path = row.path.encode(errors="backslashreplace").decode()  # a file name need not be UTF-8; JSON must be
        document = {"image": path, "answer": answer, "error": row.why_not or None}
        sys.stdout.write(orjson.dumps(document).decode() + "\n")
        sys.stdout.flush()
    return failed


def _print_table(rows: Iterable[Row]) -> int:
    """Print a table, the average cost and the failures; return the number of images without an answer.

    If `rows` raises an error, the rows before it are printed first.
    """
    found: list[Row] = []
    try:
        found.extend(rows)  # keeps the rows before an error
    finally:
        failed = _print_found(found)
    return failed


def _print_found(rows: Sequence[Row]) -> int:
    answered = [(row.path, row.answer) for row in rows if row.answer is not None]
    lines = [("image", "label", "confidence", "exit", "reason", "MFLOPs", "ms")]
    for path, answer in answered:
        first = (
            f"{answer.exit}/{answer.exits}",
            answer.reason,
            f"{answer.mflops:.1f}",
            f"{answer.timings.total_ms:.1f}",
        )
        for i, ranked in enumerate(answer.top_k):
            rest = first if i == 0 else ("", "", "", "")
            lines.append((path if i == 0 else "", ranked.label, f"{ranked.confidence:.1%}", *rest))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numbers = {2, 5, 6}
    for line in lines if answered else []:
        cells = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    if answered:
        mean = sum(answer.mflops for _, answer in answered) / len(answered)
        one = answered[0][1]
        images = "1 image" if len(answered) == 1 else f"{len(answered)} images"
        sys.stdout.write(
            f"\n{images} by {one.model} {one.version}: {mean:.1f} MFLOPs on average, "
            f"{mean / one.full_mflops:.0%} of the full network's {one.full_mflops:.1f}\n"
        )
    sys.stdout.flush()
    failed = [row for row in rows if row.answer is None]
    for row in failed:
        sys.stderr.write(f"{row.path}: {row.why_not}\n")
    return len(failed)
