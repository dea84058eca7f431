"""Two acceptors on one listening socket, like those of two workers, but in this process: connections are balanced."""

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.front.accepting import Acceptor
from service.front.memory import Layout, SharedMemory
from service.server import listen
from tests.waiting import LIMIT_S

N_CLIENTS = 24


class Connection(asyncio.Protocol):
    """Sends the number of its worker, and stays until the client leaves."""

    def __init__(self, worker: int, on_lost: Callable[[], object]) -> None:
        self._worker, self._on_lost = worker, on_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(b"%d" % self._worker)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory.create(Layout(n_workers=2, n_slots=1, height_px=8, width_px=8, n_exits=1))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with listen("127.0.0.1", 0) as listener:
        yield listener


@pytest.fixture
def ends(listener: socket.socket) -> Iterator[list[socket.socket]]:
    """The listening socket, as shared by two workers."""
    with listener.dup() as one, listener.dup() as other:
        yield [one, other]


def acceptors(ends: list[socket.socket], memory: SharedMemory) -> list[Acceptor]:
    def make(worker: int, end: socket.socket) -> Acceptor:
        return Acceptor(end, lambda on_lost: Connection(worker, on_lost), memory, worker)

    return [make(worker, end) for worker, end in enumerate(ends)]


async def clients_of(listener: socket.socket) -> tuple[list[int], list[asyncio.StreamWriter]]:
    """Connect many at once; returns how many each worker took, and their ends."""

    async def client() -> tuple[int, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        return int(await reader.readexactly(1)), writer

    clients = await asyncio.wait_for(asyncio.gather(*(client() for _ in range(N_CLIENTS))), LIMIT_S)
    whose = [worker for worker, _ in clients]
    return [whose.count(worker) for worker in range(2)], [writer for _, writer in clients]


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not what():
            await asyncio.sleep(0.001)


def test_concurrent_clients_are_balanced_between_workers(
    listener: socket.socket, ends: list[socket.socket], memory: SharedMemory
) -> None:
    async def serve() -> None:
        both = acceptors(ends, memory)
        counts, writers = await clients_of(listener)
        assert sum(counts) == N_CLIENTS
        assert min(counts) >= N_CLIENTS // 2 - 2
        for writer in writers:
            writer.close()
        await until(lambda: [memory.least_connections_beside(worker) for worker in range(2)] == [0, 0])
        for acceptor in both:
            acceptor.close()
        assert memory.least_connections_beside(0) is None

    asyncio.run(serve())


@pytest.mark.parametrize("other", [None, 0], ids=["takes none", "is stuck"])
def test_no_client_waits_for_a_worker_that_does_not_accept(
    listener: socket.socket, ends: list[socket.socket], memory: SharedMemory, other: int | None
) -> None:
    async def serve() -> None:
        [acceptor] = acceptors(ends[:1], memory)
        memory.set_connections(1, other)
        counts, writers = await clients_of(listener)
        assert counts == [N_CLIENTS, 0]
        for writer in writers:
            writer.close()
        await until(lambda: memory.least_connections_beside(1) == 0)
        acceptor.close()

    asyncio.run(serve())


class OutOfDescriptors:
    """A socket whose first connections cannot be accepted."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self.n_refused = listener, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def accept(self) -> tuple[socket.socket, Any]:
        self.n_refused += 1
        if self.n_refused == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()


def test_without_file_descriptors_it_retries_after_a_while(
    ends: list[socket.socket], memory: SharedMemory, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.front.accepting.OUT_OF_ORDER_S", 0.01)

    async def serve() -> None:
        short: Any = OutOfDescriptors(ends[0])
        acceptor = Acceptor(short, lambda on_lost: Connection(0, on_lost), memory, 0)
        counts, writers = await clients_of(ends[1])
        assert counts == [N_CLIENTS, 0]
        for writer in writers:
            writer.close()
        acceptor.close()

    asyncio.run(serve())
    assert [record.message for record in caplog.records if "accepted" in record.message] == [
        "connections cannot be accepted: [Errno 24] Too many open files"
    ]
