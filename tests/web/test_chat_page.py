"""Talking on the page, against a really started service: what is seen, and what the store holds afterwards."""

import re
from collections.abc import Callable
from typing import Any

from web_site import Site, Visit, eventually

Begin = Callable[..., Visit]


def words(turn: Any) -> str:
    return str(turn.locator(".words").inner_text())


def test_a_first_visit_talks_and_a_reload_keeps_the_conversation(visit: Begin, site: Site) -> None:
    person = visit(width=390, height=844)
    page = person.with_character("Captain Isolde Brack")
    assert "Ahoy there!" in words(page.locator(".turn").first)
    assert site.rows("SELECT count(*) FROM conversations WHERE character_id = 'pirate'") == [(0,)]
    turn = person.say("Where do we sail?\nTell me.")
    assert words(turn) == "Where do we sail?\nTell me."
    assert page.locator("#live").text_content() == "Captain Isolde Brack: Where do we sail?\nTell me."
    page.reload()
    page.wait_for_selector(".turn >> nth=1")
    assert page.locator(".turn").count() == 2
    assert words(page.locator(".turn").last) == "Where do we sail?\nTell me."
    assert page.locator("#recent-list a").count() == 1
    stored = site.rows("SELECT role, content, finish FROM messages WHERE conversation_id = ? ORDER BY rowid", person.id)
    assert [row[0] for row in stored] == ["assistant", "user", "assistant"]
    assert stored[2][1:] == ("Where do we sail?\nTell me.", "stop")
    assert (person.troubles, person.outside()) == ([], [])


def test_nobody_else_can_read_it(visit: Begin) -> None:
    ann, bob = visit(), visit()
    ann.with_character("Smoulder")
    ann.say("the password is xyzzy")
    bob.page.goto(ann.page.url)
    bob.page.get_by_text("not yours to read").wait_for()
    assert "xyzzy" not in bob.page.inner_text("body")
    assert bob.page.locator("#recent-list a").count() == 0
    answer = bob.page.request.get(f"{bob.site.url}/v1/conversations/{ann.id}")
    assert answer.status == 404
    assert all("404" in trouble for trouble in bob.troubles)


def test_reactions_land_in_the_store_and_survive_a_reload(visit: Begin, site: Site) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    turn = person.say("hello")
    for label in ("Good reply", "Love it", "Funny", "Bad reply"):
        with page.expect_response(lambda response: response.url.endswith("/v1/feedback")) as answer:
            turn.get_by_role("button", name=label).click()
        assert answer.value.status == 200
    pressed = turn.locator("[aria-pressed=true]")
    assert {one.get_attribute("aria-label") for one in pressed.all()} == {"Bad reply", "Love it", "Funny"}
    query = "SELECT s.kind, s.text FROM signals s JOIN messages m ON m.id = s.message_id WHERE m.conversation_id = ?"
    kinds = site.rows(f"{query} ORDER BY s.rowid", person.id)
    assert kinds == [("thumb_up", None), ("love", None), ("reaction", "😂"), ("thumb_down", None)]
    page.reload()
    page.locator(".turn.last [aria-label='Love it'][aria-pressed=true]").wait_for()
    page.locator(".turn.last [aria-label='Bad reply'][aria-pressed=true]").wait_for()
    assert page.locator(".turn.last [aria-label='Good reply'][aria-pressed=true]").count() == 0
    assert person.troubles == []


def test_regenerate_keeps_the_old_reply_and_going_on_from_it_is_a_pick(visit: Begin, site: Site) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    turn = person.say("say it")
    count = turn.locator(".count")
    assert not count.is_visible()
    for number in (2, 3):
        turn.get_by_role("button", name="Another reply").click()
        page.locator(".last .count", has_text=f"{number}/{number}").wait_for()
        turn.locator(".again:not([aria-disabled=true])").wait_for()
    turn.get_by_role("button", name="Earlier reply").click()
    assert count.inner_text() == "2/3"
    page.locator("#words").focus()
    page.keyboard.press("ArrowLeft")
    assert count.inner_text() == "1/3"
    assert page.locator("#live").text_content() == "Reply 1 of 3: say it"
    person.say("and on")
    replies = site.rows(
        "SELECT id FROM messages WHERE conversation_id = ? AND role = 'assistant' ORDER BY rowid", person.id
    )
    signals = site.rows(
        "SELECT s.kind, s.message_id FROM signals s JOIN messages m ON m.id = s.message_id WHERE m.conversation_id = ?"
        " ORDER BY s.rowid", person.id,
    )  # fmt: skip
    assert [kind for kind, _ in signals] == ["regenerate", "regenerate", "pick"]
    assert signals[-1][1] == replies[1][0]  # after the greeting, the first reply
    went_on = site.rows("SELECT parent_id FROM messages WHERE conversation_id = ? AND content = 'and on'", person.id)
    assert went_on[0][0] == replies[1][0]
    page.reload()
    page.wait_for_selector(".turn >> nth=2")
    assert [one.inner_text() for one in page.locator(".count:visible").all()] == ["1/3"]
    assert person.troubles == []


def test_arrows_leave_text_that_is_being_written_alone(visit: Begin) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    turn = person.say("one")
    turn.get_by_role("button", name="Another reply").click()
    turn.locator(".count", has_text="2/2").wait_for()
    page.fill("#words", "half a thought")
    page.keyboard.press("ArrowLeft")
    assert turn.locator(".count").inner_text() == "2/2"


def test_edit_rating_feedback_and_report_by_keyboard_alone(visit: Begin, site: Site) -> None:
    person = visit(width=390, height=844)
    page = person.with_character("Smoulder")
    turn = person.say("a teapot")
    turn.get_by_role("button", name="Write it better").press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Two teapots.")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    turn.get_by_text("Your wording").wait_for()
    assert words(turn) == "Two teapots."

    report = turn.get_by_role("button", name="Report this reply")
    report.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Report this reply")
    dialog.wait_for()
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Report this reply"
    page.keyboard.press("Enter")
    dialog.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.type("it called me a kettle")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    dialog.wait_for(state="detached")

    page.get_by_role("button", name="Rate this conversation").press("Enter")
    page.keyboard.press("Space")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator(".chosen").inner_text() == "Very good"
    page.keyboard.press("Tab")
    page.keyboard.type("More teapots, please")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("dialog").wait_for(state="detached")

    query = "SELECT s.kind, s.value, s.text FROM signals s JOIN messages m ON m.id = s.message_id"
    assert site.rows(f"{query} WHERE m.conversation_id = ? ORDER BY s.rowid", person.id) == [
        ("edit", 1.0, "Two teapots."),
        ("report", 1.0, "It is hateful or cruel: it called me a kettle"),
        ("rating", 4.0, None),
        ("feedback", 1.0, "More teapots, please"),
    ]
    assert person.troubles == []


def test_an_empty_opinion_is_not_sent(visit: Begin) -> None:
    person = visit()
    page = person.with_character("Smoulder")
    person.say("hm")
    page.get_by_role("button", name="Rate this conversation").click()
    page.get_by_role("button", name="Send", exact=True).last.click()
    assert "Choose a number of stars" in page.locator("dialog [role=alert]").inner_text()


def test_consent_is_kept(visit: Begin, site: Site) -> None:
    person = visit()
    page = person.home()
    switch = page.get_by_role("switch")
    page.wait_for_selector("#consent:enabled")
    assert switch.is_checked()
    with page.expect_response(re.compile("/v1/me$")) as answer:
        switch.click()
    user = answer.value.json()["id"]
    page.reload()
    page.wait_for_selector("#consent:enabled")
    assert not switch.is_checked()
    assert site.rows("SELECT consent FROM users WHERE id = ?", user) == [(0,)]
    assert person.troubles == []


def test_search_finds_by_name_kind_and_trait(visit: Begin) -> None:
    page = visit().home()
    everybody = page.locator("#character-list a").count()
    for wanted, name in (("smoul", "Smoulder"), ("FANTASY", "Smoulder"), ("teapots sleepy", "Smoulder")):
        page.fill("#search", wanted)
        assert page.locator("#character-list b").all_inner_texts() == [name]
    page.fill("#search", "zzz")
    assert page.locator("#none").inner_text() == "Nobody here fits these words."
    page.fill("#search", "")
    assert page.locator("#character-list a").count() == everybody == 13


def test_what_people_wrote_is_text_and_runs_nothing(visit: Begin) -> None:
    person = visit()
    page = person.with_character("<script>")
    markup = "<img src=x onerror='window.ran = 3'><script>window.ran = 4</script>*<b>bold</b>*"
    turn = person.say(markup)
    assert words(turn) == markup.replace("*", "")
    assert turn.locator(".said").text_content() == f"You: {markup}"
    turn.get_by_role("button", name="Write it better").click()
    turn.locator("textarea").fill(f"{markup}!")
    turn.get_by_role("button", name="Keep my wording").click()
    turn.get_by_text("Your wording").wait_for()
    page.reload()
    page.wait_for_selector(".turn >> nth=1")
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.locator(".words b, .said b").count() == 0
    assert (person.troubles, person.outside()) == ([], [])


def test_a_greeting_is_chosen_among_alternates(visit: Begin, site: Site) -> None:
    person = visit(width=390, height=844)
    data = {
        "name": "Juniper", "description": "A kind herbalist.", "first_mes": "Hello, traveller.",
        "alternate_greetings": ["*looks up* {{char}} is glad to see you.", "Mind the nettles."], "personality": "",
        "scenario": "", "mes_example": "", "creator_notes": "", "system_prompt": "", "post_history_instructions": "",
        "creator": "", "character_version": "", "tags": [], "extensions": {},
    }  # fmt: skip
    made = person.page.request.post(
        f"{site.url}/v1/characters",
        data={"spec": "chara_card_v2", "spec_version": "2.0", "data": data},
        headers={"Authorization": f"Bearer {site.keys['characters']}"},
    )
    assert made.json()["state"] == "approved", made.text()
    page = person.with_character("Juniper")
    first = page.locator(".turn").first
    assert first.locator(".count").inner_text() == "1/3"
    first.get_by_role("button", name="Later reply").click()
    assert words(first) == "looks up Juniper is glad to see you."
    assert first.locator("em").inner_text() == "looks up"
    person.say("Good day")
    stored = site.rows("SELECT content FROM messages WHERE conversation_id = ? ORDER BY rowid", person.id)
    assert stored[0] == ("*looks up* Juniper is glad to see you.",)
    assert page.locator(".turn").first.locator(".count").is_hidden()
    assert person.troubles == []


def test_a_picture_is_shown_where_the_service_names_one(visit: Begin) -> None:
    person = visit()
    view = {"version": 1, "category": "", "traits": [], "greetings": []}
    listed = [
        view | {"id": "a", "name": "Has One", "picture": "/static/favicon.svg"},
        view | {"id": "b", "name": "Has None"},
        view | {"id": "c", "name": "Lost It", "picture": "/static/lost.svg"},
    ]
    person.page.route("**/v1/characters", lambda route: route.fulfill(json={"data": listed}))
    page = person.home()
    eventually(lambda: page.locator("#character-list img").count() == 1)
    assert page.locator("#character-list .portrait").all_inner_texts() == ["HO", "HN", "LI"]


def test_a_place_that_is_not_there_says_so(visit: Begin) -> None:
    person = visit(width=390, height=844)
    for place in ("#with/nobody", "#talk/%", "#%E0%A4%A"):
        person.page.goto(f"{person.site.url}/{place}")
        person.page.get_by_role("link", name="All characters").wait_for()
    person.page.get_by_role("link", name="All characters").click()
    person.page.wait_for_selector("#character-list a")
    assert all("404" in trouble for trouble in person.troubles)
