"""The page when things are slow, stopped, refused or gone: what was written is never lost."""

from collections.abc import Callable
from typing import Any

from web_site import Site, Visit, eventually

Begin = Callable[..., Visit]
CHAT = "**/v1/chat/completions"


def test_a_reply_appears_as_it_is_written_and_screen_readers_hear_it_once(visit: Begin, slow_site: Site) -> None:
    person = visit(at=slow_site)
    page = person.with_character("Smoulder")
    page.evaluate("""() => {
        window.grew = []; window.heard = [];
        new MutationObserver(() => window.heard.push(document.getElementById("live").textContent))
            .observe(document.getElementById("live"), {childList: true, characterData: true, subtree: true});
        new MutationObserver(() => window.grew.push(document.querySelector(".turn.last .words").textContent.length))
            .observe(document.querySelector(".turns"), {childList: true, characterData: true, subtree: true});
    }""")
    turn = person.say("Good evening")
    lengths = sorted(set(page.evaluate("window.grew")))
    assert len(lengths) >= 4  # it is checked and shown sentence by sentence
    assert lengths[-1] == len(turn.locator(".words").inner_text())
    assert [heard for heard in page.evaluate("window.heard") if heard] == [
        f"Smoulder: {turn.locator('.words').inner_text()}"
    ]
    assert person.troubles == []


def test_stopping_keeps_what_was_written(visit: Begin, slow_site: Site) -> None:
    person = visit(at=slow_site)
    page = person.with_character("Smoulder")
    page.fill("#words", "Tell me everything")
    page.keyboard.press("Enter")
    eventually(lambda: page.locator(".turn.last .words").inner_text().count(" ") > 3)  # a sentence
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    shown = page.locator(".turn.last .words").inner_text()
    query = "SELECT content, finish FROM messages WHERE conversation_id = ? AND finish = 'cancelled'"
    stored = eventually(lambda: slow_site.rows(query, person.id))
    assert stored[0][0].startswith(shown.rstrip())
    turn = person.say("Go on")
    assert turn.locator(".words").inner_text()
    assert person.troubles == []


def test_too_much_asked_says_when_to_come_back(visit: Begin) -> None:
    person = visit(width=390, height=844)
    page = person.with_character("Smoulder")
    body = {"error": {"message": "busy", "code": "queue_full"}}
    refusals = iter([{"status": 429, "headers": {"Retry-After": "2"}, "json": body}])

    def busy_once(route: Any) -> None:
        answer = next(refusals, None)
        route.fulfill(**answer) if answer else route.continue_()

    page.route(CHAT, busy_once)
    page.fill("#words", "patience")
    page.keyboard.press("Enter")
    alert = page.get_by_role("alert")
    alert.get_by_text("Many people are talking at once.").wait_for()
    assert alert.get_by_text("You can try again in").is_visible()
    again = page.get_by_role("button", name="Try again")
    assert again.get_attribute("aria-disabled") == "true"
    assert page.locator(".turn.last .said").text_content() == "You: patience"
    eventually(lambda: again.get_attribute("aria-disabled") == "false")
    again.click()
    page.locator(".turn.last .again").wait_for()
    assert page.locator(".turn.last .words").inner_text() == "patience"
    assert page.locator(".turn").count() == 2
    assert not alert.is_visible()
    assert all("429" in trouble for trouble in person.troubles)


def test_a_reply_that_breaks_off_can_be_asked_for_again(visit: Begin, site: Site) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    person.say("first")
    broken = 'data: {"id":"x","choices":[{"index":0,"delta":{"content":"half"}}],"flywheel_message":"m"}\n\n'
    page.route(CHAT, lambda route: route.fulfill(status=200, content_type="text/event-stream", body=broken))
    page.fill("#words", "second")
    page.keyboard.press("Enter")
    page.get_by_text("The reply broke off.").wait_for()
    page.unroute(CHAT)
    page.get_by_role("button", name="Try again").click()
    page.locator(".turn.last .again").wait_for()
    assert page.locator(".turn.last .words").inner_text() == "second"
    said = site.rows("SELECT content FROM messages WHERE conversation_id = ? AND role = 'user'", person.id)
    assert said == [("first",), ("second",)]
    assert person.troubles == []


def test_what_was_said_but_never_answered_is_answered_after_a_reload(visit: Begin, slow_site: Site) -> None:
    person = visit(at=slow_site)
    page = person.with_character("Smoulder")
    person.say("first")
    page.fill("#words", "second")
    page.keyboard.press("Enter")
    stored = "SELECT id FROM messages WHERE conversation_id = ? AND content = 'second'"
    eventually(lambda: slow_site.rows(stored, person.id))
    page.reload()  # before the model has said a word
    page.get_by_text("This was not answered yet.").wait_for()
    assert page.input_value("#words") == ""
    page.get_by_role("button", name="Try again").click()
    page.locator(".turn.last .again").wait_for()
    assert page.locator(".turn").count() == 3
    assert len(slow_site.rows(stored, person.id)) == 1


def test_offline_is_told_and_the_text_is_kept_over_a_reload(visit: Begin) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    person.say("here")
    person.context.set_offline(True)
    page.get_by_text("You are offline. What you write").wait_for()
    page.fill("#words", "are you there?")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("You are offline.").wait_for()
    assert page.locator(".turn.last .said").text_content() == "You: are you there?"
    person.context.set_offline(False)
    page.locator("#offline").wait_for(state="hidden")
    page.reload()
    page.wait_for_selector(".turn >> nth=1")
    assert page.input_value("#words") == "are you there?"
    page.keyboard.press("Enter")
    page.locator(".turn >> nth=2").locator(".again").wait_for()
    assert page.locator(".turn.last .words").inner_text() == "are you there?"


def test_a_failed_reaction_is_taken_back_and_told(visit: Begin) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    turn = person.say("hello")
    page.route("**/v1/feedback", lambda route: route.fulfill(status=503, json={"error": {"message": "no"}}))
    turn.get_by_role("button", name="Love it").click()
    page.locator(".toast", has_text="did not work").wait_for()
    assert turn.get_by_role("button", name="Love it").get_attribute("aria-pressed") == "false"


def test_an_expired_session_begins_anew(visit: Begin) -> None:
    person = visit()
    person.with_character("Smoulder")
    person.context.clear_cookies()
    assert person.say("still here?").locator(".words").inner_text() == "still here?"
    assert all("401" in trouble for trouble in person.troubles)


def test_a_service_that_is_gone_is_told_on_a_phone_too(visit: Begin) -> None:
    person = visit(width=390, height=844)
    person.page.route("**/v1/session", lambda route: route.abort())
    person.page.goto(person.site.url)
    person.page.get_by_text("The service cannot be reached.").wait_for()
    person.page.unroute("**/v1/session")
    person.page.get_by_role("button", name="Try again").click()
    person.page.wait_for_selector("#character-list a")
