"""Images of a form that wait for one another: none is left waiting."""

import asyncio
from math import inf
from time import perf_counter

from service.api.siblings import Siblings
from tests.waiting import LIMIT_S


def test_an_image_that_ends_wakes_the_first_that_still_waits() -> None:
    async def form() -> None:
        siblings = Siblings()
        assert not await siblings.wait(perf_counter())  # its deadline has passed
        waiting = [asyncio.create_task(siblings.wait(inf)) for _ in range(2)]
        for first, *others in (waiting, waiting[1:]):
            siblings.begin_one()
            await asyncio.sleep(0)
            siblings.end_one()
            assert await asyncio.wait_for(first, LIMIT_S)
            assert not any(other.done() for other in others)
        assert siblings.n_in_work == 0

    asyncio.run(form())
