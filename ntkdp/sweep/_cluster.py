"""Work on a cluster: tasks go to the workers of a dask scheduler and come back as they finish."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from distributed import Client

Result = TypeVar("Result")

#: The name of a cluster on this machine; any other one is an address.
LOCAL = "local"
#: The longest wait for the answer of a scheduler.
_SECONDS_TO_CONNECT = 5
#: The longest wait for the first worker.
_SECONDS_TO_A_WORKER = 60


class TaskFailed(RuntimeError):
    """A task that raised, or whose workers died; the message names it."""


@contextmanager
def connected(scheduler: str, n_workers: int | None = None) -> "Iterator[Client]":
    """A client of the scheduler at an address, or of a local cluster that is started for it.

    Parameters
    ----------
    scheduler : str
        An address such as ``"tcp://host:8786"``, or ``"local"`` for worker processes of one thread
        each, which end with the body.
    n_workers : int, optional
        Workers of a local cluster, by default one for each core.

    Raises
    ------
    ImportError
        If the package dask.distributed is not installed.
    ConnectionError
        If no scheduler answers at the address within five seconds, or it is no address.

    Notes
    -----
    The scheduler is asked in a new event loop, which notebooks do not allow; there, make a
    ``distributed.Client``.
    """
    distributed = _distributed()
    if scheduler == LOCAL:
        with (
            distributed.LocalCluster(
                n_workers=n_workers, threads_per_worker=1, dashboard_address="localhost:0"
            ) as cluster,
            distributed.Client(cluster, set_as_default=False) as client,
        ):
            yield client
        return
    asyncio.run(_check_scheduler(scheduler))
    with distributed.Client(scheduler, timeout=_SECONDS_TO_CONNECT, set_as_default=False) as client:
        yield client


async def _check_scheduler(address: str) -> None:
    """Raise unless a scheduler answers. A client would wait long if something else did."""
    distributed = _distributed()
    arguments = distributed.Security().get_connection_args("client")
    try:
        if not address:
            raise ValueError("no address")
        async with distributed.rpc(address, connection_args=arguments) as remote:
            identity = await asyncio.wait_for(remote.identity(), _SECONDS_TO_CONNECT)
        if identity["type"] != "Scheduler":
            raise ValueError(f"a {identity['type'].lower()} is there")
    # Bytes of another program may read as the length of an enormous message.
    except (OSError, TypeError, ValueError, MemoryError) as error:
        raise ConnectionError(
            f"no scheduler at {address!r} ({_reason(error)}); start one with `dask scheduler`, "
            f"which prints its address, or use {LOCAL!r} for workers on this machine"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing answers within {_SECONDS_TO_CONNECT} s"
    return "another program answers" if isinstance(error, MemoryError) else str(error)


def check_client(client: "Client") -> None:
    """Raise unless tasks can be given to the client.

    Raises
    ------
    TypeError
        If it is not one of dask.distributed, or asynchronous.
    ConnectionError
        If it is closed.
    """
    if not isinstance(client, _distributed().Client) or client.asynchronous:
        raise TypeError(
            f"client must be a distributed.Client that is not asynchronous, got {client!r}"
        )
    if client.status in ("closing", "closed"):
        raise ConnectionError(
            f"client must be connected, got {client!r}; its scheduler is lost, or it was closed"
        )


def results(
    client: "Client", function: Callable[..., Result], tasks: Mapping[str, tuple[object, ...]]
) -> Iterator[tuple[str, Result]]:
    """Results of ``function(*arguments)`` for every task, with its name, as they finish.

    The scheduler gives the tasks of a lost worker to another one, until a task has been lost as
    often as the scheduler's setting ``allowed-failures`` says; results that had not come back are
    computed again. If the iteration ends early, tasks that have not begun are cancelled, and the
    others run on.

    Raises
    ------
    TypeError
        If the client is not one of dask.distributed, or asynchronous.
    ConnectionError
        If there is no worker within a minute, or the scheduler is lost.
    TaskFailed
        The first failure, with the name of the task.
    """
    check_client(client)
    if not tasks:
        return
    assert client.scheduler is not None  # Only a closed client has none.
    address = client.scheduler.address
    try:
        client.wait_for_workers(1, timeout=_SECONDS_TO_A_WORKER)
    except TimeoutError as error:
        raise ConnectionError(
            f"the scheduler at {address} has no worker; start some with `dask worker {address} "
            "--nthreads 1`"
        ) from error
    names = {
        client.submit(function, *arguments, pure=False): name for name, arguments in tasks.items()
    }
    coming = _distributed().as_completed(names, loop=client.loop)
    try:
        for future in coming:
            if future.status in ("lost", "pending"):
                # The result went with its worker, and is computed again.
                coming.add(future)
                continue
            name = names[future]
            try:
                result = future.result()
            except Exception as error:
                if future.status == "error":
                    raise _failure(name, error) from error
                raise ConnectionError(
                    f"the scheduler at {address} was lost during {name}"
                ) from error
            # While somebody holds a future, its result is computed again if it is lost.
            del names[future]
            future.release()
            yield name, result
    finally:
        if client.status == "running":
            client.cancel(list(names))


def _failure(name: str, error: BaseException) -> TaskFailed:
    if isinstance(error, _distributed().KilledWorker):
        return TaskFailed(
            f"{name}: {error.allowed_failures + 1} workers died while it ran there or was next in "
            f"line, the last of them {error.last_worker.address}; it, or what ran before it, may "
            "need more memory than they have"
        )
    return TaskFailed(f"{name}: {type(error).__name__}: {error}")


def _distributed() -> ModuleType:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            'work on a cluster needs dask.distributed: pip install "ntkdp[cluster]"'
        ) from error
    return distributed
