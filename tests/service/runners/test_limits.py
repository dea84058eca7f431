"""Which batches become smaller when memory is short, and when they grow again."""

import pytest

from service.runners.base import RunnerError
from service.runners.limits import RAISE_AFTER_BATCHES, RowLimits, is_out_of_memory, words_of


def caused_by(cause: Exception) -> Exception:
    try:
        raise RunnerError("stage 1 failed on a batch of 8") from cause
    except RunnerError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        caused_by(MemoryError("no room")),
        RuntimeError("[ONNXRuntimeError] : 1 : FAIL : std::bad_alloc"),
        RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 1048576"),
        caused_by(RuntimeError("CUDA error 2: out of memory")),
        RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_errors_for_lack_of_memory_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA error: out of memory\nSearch for it.\nCompile with `TORCH_USE_CUDA_DSA`.\n"), None),
        (RuntimeError("\nCUDA error: out of memory"), None),
        (MemoryError(), "MemoryError"),
    ],
)
def test_error_messages_are_shortened_to_one_line(error: Exception, words: str | None) -> None:
    assert words_of(error) == (words or "CUDA error: out of memory")


@pytest.mark.parametrize("error", [None, RuntimeError("device lost"), caused_by(ValueError("a shape")), KeyError("x")])
def test_other_errors_are_not_taken_for_lack_of_memory(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


def test_lack_of_memory_halves_a_stages_batches_for_a_time() -> None:
    limits = RowLimits(n_stages=2, max_rows=32)
    limits.failed(0, 32, RuntimeError("device lost"))
    assert limits.rows == [32, 32]
    limits.failed(0, 20, MemoryError())
    assert limits.rows == [10, 32]
    limits.failed(0, 32, MemoryError())  # of another lane, formed before
    assert limits.rows == [10, 32]
    limits.failed(0, 1, MemoryError())  # there is nothing smaller
    assert limits.rows == [10, 32]
    for _ in range(RAISE_AFTER_BATCHES):
        limits.ran(0, 9)  # smaller batches prove nothing
        limits.ran(1, 32)
    assert limits.rows == [10, 32]
    for _ in range(RAISE_AFTER_BATCHES):
        limits.ran(0, 10)
    assert limits.rows == [20, 32]
    for _ in range(RAISE_AFTER_BATCHES):
        limits.ran(0, 20)
    assert limits.rows == [32, 32]


def test_a_limit_by_total_memory_is_permanent() -> None:
    limits = RowLimits(n_stages=2, max_rows=32)
    limits.failed(0, 8, MemoryError())
    limits.limit(6)
    assert (limits.rows, limits.max_rows) == ([4, 6], 6)
    for _ in range(RAISE_AFTER_BATCHES):
        limits.ran(0, 4)
    assert limits.rows == [6, 6]
    limits.limit(16)  # not above the requested maximum
    assert (limits.rows, limits.max_rows) == ([6, 6], 6)
