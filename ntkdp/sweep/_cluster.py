"""Work on a cluster: tasks go to the workers of a dask scheduler and come back as they finish."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

#: The name that stands for a cluster on this machine, where else is an address.
LOCAL = "local"
#: Seconds until a scheduler has answered, and until it has a worker.
_SECONDS_TO_CONNECT = 5
_SECONDS_TO_A_WORKER = 60


class TaskFailed(RuntimeError):
    """A task that raised, or whose workers died; the message names it."""


@contextmanager
def connected(scheduler: str, n_workers: int | None = None) -> "Iterator[Client]":
    """A client of the scheduler at an address, or of a local cluster that is started for it.

    Parameters
    ----------
    scheduler : str
        Such as ``"tcp://host:8786"``, or ``"local"``: worker processes of one thread each, which
        end with the body.
    n_workers : int, optional
        Of a local cluster, by default as many as there are cores.

    Raises
    ------
    ImportError
        Without the package dask.distributed.
    ConnectionError
        If no scheduler answers at the address within five seconds, or it is no address.

    Notes
    -----
    Asks the scheduler in an event loop of its own, so that it is not for notebooks: there, make a
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
    """Raise unless a scheduler answers. A client would wait long for what is something else."""
    distributed = _distributed()
    arguments = distributed.Security().get_connection_args("client")
    try:
        if not address:
            raise ValueError("no address")
        async with distributed.rpc(address, connection_args=arguments) as remote:
            found = await asyncio.wait_for(remote.identity(), _SECONDS_TO_CONNECT)
        if found["type"] != "Scheduler":
            raise ValueError(f"a {found['type'].lower()} is there")
    # What is no scheduler may send what reads as the length of an enormous message.
    except (OSError, TypeError, ValueError, MemoryError) as error:
        raise ConnectionError(
            f"no scheduler at {address!r} ({_reason(error)}); start one with `dask scheduler`, "
            f"which prints its address, or use {LOCAL!r} for workers on this machine"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing answers within {_SECONDS_TO_CONNECT} s"
    return "what answers is something else" if isinstance(error, MemoryError) else str(error)


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
    client: "Client", function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]]
) -> Iterator[tuple[str, Any]]:
    """Results of ``function(*arguments)`` of every task, with its name, as they finish.

    What a lost worker had is given to another by the scheduler, until it is lost as often as the
    scheduler's setting ``allowed-failures`` says; results that had not come back are computed
    again. When the iteration ends early, what has not begun is cancelled, and what has begun runs
    on.

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
    assert client.scheduler is not None  # But of a closed client.
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
            # As long as somebody holds a future, its result is computed again when it is lost.
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


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            'work on a cluster needs dask.distributed: pip install "ntkdp[cluster]"'
        ) from error
    return distributed
