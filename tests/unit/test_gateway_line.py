"""The line before an engine: who is next, who is turned away, and what happens to a place nobody takes."""

from __future__ import annotations

import asyncio

import pytest

from fmops.deployment.serving.gateway.circuit import EngineDown
from fmops.deployment.serving.gateway.line import LEAST_ENDS, PER_SLOT, Line


def queue_up(line: Line, served: list[str], *tenants: str, wait_s: float = 60.0) -> list[asyncio.Task]:
    """Requests in this order; `served` gets their tenants as they are let in."""

    async def one(tenant: str) -> None:
        await line.enter(tenant, wait_s=wait_s)
        served.append(tenant)

    return [asyncio.ensure_future(one(tenant)) for tenant in tenants]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def full(slots: int = 1, clock=lambda: 0.0) -> Line:
    line = Line(clock)
    line.slots, line.inside = slots, PER_SLOT * slots
    return line


def test_until_the_engine_has_said_how_much_it_takes_nobody_waits():
    async def story():
        line, served = Line(), []
        queue_up(line, served, *"abcdefghij")
        await settle()
        assert len(served) == line.inside == 10

    asyncio.run(story())


def test_tenants_take_turns_and_one_tenants_requests_keep_their_order():
    async def story():
        line, served = full(), []
        queue_up(line, served, "greedy", "greedy", "greedy", "modest")
        await settle()
        assert (served, line.waiting) == ([], 4)
        for _ in range(4):
            line.leave()
            await settle()
        assert served == ["greedy", "modest", "greedy", "greedy"]
        assert (line.waiting, line.inside) == (0, PER_SLOT)

    asyncio.run(story())


def test_who_comes_while_others_wait_does_not_overtake_them():
    async def story():
        line, served = full(), []
        queue_up(line, served, "a", "a")
        await settle()
        line.leave()
        queue_up(line, served, "b")
        await settle()
        assert served == ["a"]

    asyncio.run(story())


def test_the_wait_has_an_end_and_leaves_nothing_behind():
    async def story():
        line = full()
        with pytest.raises(EngineDown, match="the engine is full") as refused:
            await line.enter("a", wait_s=0.01)
        assert (refused.value.status, refused.value.sent, refused.value.retry_after_s) == (429, False, 1)
        assert (line.waiting, line.inside) == (0, PER_SLOT)

    asyncio.run(story())


def test_a_client_that_leaves_the_line_takes_no_place_even_when_it_was_his_turn():
    async def story():
        line, served = full(), []
        left, next_one = queue_up(line, served, "a", "a")
        await settle()
        line.leave()
        left.cancel()
        await settle()
        assert served == ["a"]
        assert next_one.done()
        assert line.inside == PER_SLOT
        line.leave()
        assert line.inside == PER_SLOT - 1

    asyncio.run(story())


def test_a_line_too_long_for_the_wait_refuses_at_once_and_says_when_to_come_back():
    now = 0.0

    async def story():
        nonlocal now
        line, served = full(slots=4, clock=lambda: now), []
        queue_up(line, served, *["a"] * 30)
        await settle()
        for _ in range(LEAST_ENDS):
            now += 1.0
            line.leave()
            await settle()
        # One answer ends about every second and 22 wait: 19 s.
        with pytest.raises(EngineDown) as refused:
            await line.enter("a", wait_s=10.0)
        assert 5 <= refused.value.retry_after_s <= 15
        # Another tenant is second in turn.
        [other] = queue_up(line, served, "b", wait_s=10.0)
        await settle()
        assert not other.done()
        assert line.waiting == 23
        for _ in range(2):
            line.leave()
            await settle()
        assert "b" in served

    asyncio.run(story())


def test_one_stall_is_not_taken_for_the_pace():
    now = 0.0

    async def story():
        nonlocal now
        line, served = full(clock=lambda: now), []
        queue_up(line, served, *["a"] * 80)
        await settle()
        for _ in range(40):
            now += 0.05
            line.leave()
        now += 3.0
        line.leave()
        [waits] = queue_up(line, served, "a", wait_s=10.0)
        await settle()
        assert not waits.done()

    asyncio.run(story())
