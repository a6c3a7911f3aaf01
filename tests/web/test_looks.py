"""The pages by eye, by ear and by keyboard: contrast in every colour, names, headings, widths, focus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from web_site import Visit

Begin = Callable[..., Visit]
LOOKING = (Path(__file__).parent / "looking.js").read_text(encoding="utf-8")
NAMED = {"button", "link", "textbox", "searchbox", "checkbox", "switch", "radio", "dialog", "group", "navigation"}
LONG = "Donaudampfschifffahrtsgesellschaftskapitän" * 4


def unnamed(page: Any) -> list[str]:
    """Roles of what the browser's accessibility tree has no name for."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    roles = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]
    assert any(role in {"button", "link"} for role, _ in roles)
    return [role for role, name in roles if role in NAMED and not name.strip()]


def look(page: Any) -> list[str]:
    found: list[str] = page.evaluate(LOOKING)
    return found + [f"a {role} has no name" for role in unnamed(page)]


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1280, "light")])
def test_every_view_can_be_read_named_and_hit(visit: Begin, width: int, scheme: str) -> None:
    person = visit(width=width, height=844, color_scheme=scheme)
    page = person.home()
    assert look(page) == []
    page = person.with_character("Captain Isolde Brack")
    assert look(page) == []
    turn = person.say(f"{LONG} and a good evening")
    turn.get_by_role("button", name="Another reply").click()
    turn.locator(".count", has_text="2/2").wait_for()
    turn.get_by_role("button", name="Love it").click()
    assert look(page) == []
    turn.get_by_role("button", name="Write it better").click()
    assert look(page) == []
    page.keyboard.press("Escape")
    for opens in ("Report this reply", "Rate this conversation"):
        page.get_by_role("button", name=opens).last.click()
        page.locator("dialog").wait_for()
        assert look(page) == []
        page.keyboard.press("Escape")
        page.locator("dialog").wait_for(state="detached")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=503, json={}))
    page.fill("#words", "no")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    assert look(page) == []
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_holds_in_the_colour_of_every_character(visit: Begin, scheme: str) -> None:
    person = visit(color_scheme=scheme)
    page = person.with_character("Smoulder")
    person.say("hello").get_by_role("button", name="Good reply").click()
    for hue in range(0, 360, 18):
        page.evaluate(
            "hue => { for (const node of [document.documentElement, ...document.querySelectorAll('.portrait')])"
            " node.style.setProperty('--hue', hue) }",
            hue,
        )
        assert page.evaluate(LOOKING) == [], f"hue {hue}"


def test_the_order_of_focus_is_the_order_of_reading(visit: Begin) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    person.say("hello").get_by_role("button", name="Another reply").click()
    page.locator(".count", has_text="2/2").wait_for()
    page.locator(".turn.last .again:not([aria-disabled=true])").wait_for()
    page.locator("#skip").focus()
    seen = ["skip"]
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(n => n.getAttribute('aria-label') ?? n.id ?? '')(document.activeElement)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"nothing shows that {seen[-1]} has the focus"
        if seen[-1] == "Send":
            break
    expected = [
        "skip",
        "search",
        "consent",
        "Rate this conversation",
        "New conversation",
        "Good reply",
        "Report this reply",
    ]
    places = [seen.index(one) for one in [*expected, "Earlier reply", "Another reply", "words", "Send"]]
    assert places == sorted(places)


def test_the_skip_link_leads_to_the_field(visit: Begin) -> None:
    page = visit().with_character("Smoulder")
    page.locator("#search").focus()
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    assert page.locator("#skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "words"
    assert page.evaluate("location.hash").startswith("#with/")


def test_a_phone_shows_one_pane_and_the_way_back(visit: Begin) -> None:
    person = visit(width=390, height=844)
    page = person.with_character("Smoulder")
    assert not page.locator("#people").is_visible()
    page.get_by_role("link", name="All characters").click()
    page.locator("#people").wait_for()
    assert not page.locator("#talk").is_visible()
    page.go_back()
    page.locator(".composer").wait_for()


def test_motion_stops_for_those_who_ask(visit: Begin) -> None:
    moving = "document.getAnimations().length + Number(getComputedStyle(document.body).transitionDuration !== '0s')"
    assert visit().with_character("Smoulder").evaluate(moving) == 0
    assert visit(reduced_motion="no-preference").with_character("Smoulder").evaluate(moving) > 0
