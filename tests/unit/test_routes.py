"""Traffic goes where the routes say, by chance alone; two who change them at once do not overwrite each other."""

from __future__ import annotations

import pytest

from fmops.deployment.serving.routes import Routes, RoutesFile, RoutesMoved, Target, draw
from fmops.errors import FmopsError

OLD, NEW = Target(release="release-old", url="http://a"), Target(release="release-new", url="http://b")


def routes(**changes) -> Routes:
    return Routes(**{"champion": OLD, "challenger": NEW, **changes})


def test_a_share_of_the_requests_goes_to_the_canary():
    found = [draw(routes(canary_share=0.1), f"id-{i}").arm for i in range(20_000)]
    # Five standard errors of a share of 0.1 in 20,000 draws.
    assert abs(found.count("canary") / 20_000 - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5


def test_a_canary_at_one_percent_stays_one_at_ten():
    few, many = routes(canary_share=0.01), routes(canary_share=0.1)
    early = {i for i in range(20_000) if draw(few, f"id-{i}").arm == "canary"}
    assert early
    assert all(draw(many, f"id-{i}").arm == "canary" for i in early)


def test_another_challenger_draws_anew():
    other = routes(challenger=Target(release="release-newer", url="http://c"), canary_share=0.5)
    same = sum(draw(routes(canary_share=0.5), f"id-{i}").arm == draw(other, f"id-{i}").arm for i in range(4_000))
    assert 1_800 < same < 2_200


def test_a_mirrored_request_is_answered_by_the_champion():
    found = [draw(routes(canary_share=0.5, shadow_share=1.0), f"id-{i}") for i in range(200)]
    assert {(one.arm, one.shadow) for one in found} == {("champion", True), ("canary", False)}


def test_a_challenger_that_is_not_up_yet_gets_nothing():
    waiting = routes(challenger=Target(release="release-new"), canary_share=1.0, shadow_share=1.0)
    assert draw(waiting, "id") == draw(Routes(champion=OLD), "id")


def test_a_change_holds_from_the_next_request_on(tmp_path):
    reader, writer = (RoutesFile(tmp_path / "routes.json") for _ in range(2))
    assert reader.current() == Routes()
    for version in range(20):
        written = writer.compare_and_swap(routes(canary_share=version / 20), expected=version)
        assert (reader.current(), written.version) == (written, version + 1)


def test_of_two_changes_from_one_view_the_second_is_refused(tmp_path):
    file = RoutesFile(tmp_path / "routes.json")
    seen = file.compare_and_swap(routes(), expected=0)
    first = file.compare_and_swap(routes(canary_share=0.5), expected=seen.version)
    with pytest.raises(RoutesMoved, match="at version 2, expected 1: somebody changed them meanwhile"):
        file.compare_and_swap(routes(canary_share=0.9), expected=seen.version)
    assert file.current() == first


def test_a_share_without_a_challenger_is_refused():
    with pytest.raises(ValueError, match="need a challenger"):
        Routes(champion=OLD, canary_share=0.1)


def test_what_is_no_routes_file_is_named(tmp_path):
    (tmp_path / "routes.json").write_text('{"champion": 3}')
    with pytest.raises(FmopsError, match=r"routes\.json is no routes file: .*`fmops up`"):
        RoutesFile(tmp_path / "routes.json").current()
