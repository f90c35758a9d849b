"""From the engine's thread to the event loop: what handles give, and the client that may go away meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from typing import TypeVar

from starlette.types import Receive

from jaxgen.engine.handle import Handle, Tokens

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def follow(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, Tokens | None], None]:
    """What several handles give, as it comes, with the place of each; None at the end of one.

    Raises what ended a request.
    """
    loop, more = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and so has whoever waited
            loop.call_soon_threadsafe(more.set)

    for handle in handles:
        handle.listen(tell)
    left = dict.fromkeys(range(len(handles)), 0)
    while left:
        await more.wait()
        more.clear()
        for place, start in [*left.items()]:
            parts, done = handles[place].read(start)
            left[place] += len(parts)
            if parts:
                yield place, Tokens.joined(parts)
            if done:
                handles[place].read(left[place])  # raises what ended it
                del left[place]
                yield place, None


async def finished(handles: Sequence[Handle]) -> None:
    """Wait until all have ended. Raises what ended one of them."""
    async for _ in follow(handles):
        pass


@contextlib.contextmanager
def held(handles: Sequence[Handle]) -> Iterator[None]:
    """Cancel what has not ended, at the end: nobody reads it any more."""
    try:
        yield
    finally:
        for handle in handles:
            if not handle.done:
                handle.cancel()


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of some work, which ends when the client goes away. Raises `ClientGoneError` then."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
