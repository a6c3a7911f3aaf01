"""The review page: what safety doubted is shown whole, decided about, and only for a key that may."""

from collections.abc import Callable

from test_looks import look
from web_site import EVIL, Site, Visit

Begin = Callable[..., Visit]
THREAT = "I will kill you, I will stab you tonight."
ENTRY = {"keys": ["a"], "content": EVIL, "extensions": {}, "enabled": True, "insertion_order": 1}
BOOK = {"extensions": {}, "entries": [ENTRY]}


def doubtful(site: Site, person: Visit, name: str) -> None:
    """Submit a character that safety is in doubt about."""
    data = {
        "name": f"{name} {EVIL}", "description": f"Where do I buy cocaine? {EVIL}", "first_mes": THREAT,
        "alternate_greetings": [EVIL], "extensions": {"deep": {"deeper": [EVIL]}}, "character_book": BOOK,
        "personality": "", "scenario": "", "mes_example": "", "creator_notes": "", "system_prompt": "",
        "post_history_instructions": "", "creator": "", "character_version": "", "tags": [],
    }  # fmt: skip
    card = {"spec": "chara_card_v2", "spec_version": "2.0", "data": data}
    answer = person.page.request.post(
        f"{site.url}/v1/characters", data=card, headers={"Authorization": f"Bearer {site.keys['characters']}"}
    )
    assert answer.status == 201, answer.text()
    assert answer.json()["state"] == "review", answer.text()


def test_a_person_decides_about_doubtful_characters(visit: Begin, site: Site) -> None:
    person = visit()
    doubtful(site, person, "First")
    doubtful(site, person, "Second")
    page = person.page
    page.goto(f"{site.url}/review")
    assert look(page) == []
    page.fill("#key", "fw_wrong")
    page.keyboard.press("Enter")
    page.get_by_role("alert").wait_for()
    page.fill("#key", site.keys["characters"])
    page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="review").wait_for()
    page.fill("#key", site.keys["review"])
    page.keyboard.press("Enter")
    page.locator(".dossier").nth(1).wait_for()
    first = page.locator(".dossier").first
    text = first.inner_text()
    assert text.count(EVIL) >= 5
    assert "What safety found" in text
    assert "I will kill you" in text
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        assert look(page) == []
    first.get_by_label("Your reason").fill("meant as a joke")
    first.get_by_role("button", name="Approve").click()
    page.locator(".dossier").nth(1).wait_for(state="detached")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.reload()  # the key is kept in this tab
    last = page.locator(".dossier").first
    last.get_by_label("Your reason").fill("it threatens")
    last.get_by_role("button", name="Refuse").click()
    page.get_by_text("Nothing waits for you").wait_for()
    assert look(page) == []
    decided = site.rows("SELECT state, reason FROM publications WHERE reviewer != 'safety' ORDER BY rowid")
    assert decided == [("approved", "meant as a joke"), ("refused", "it threatens")]
    assert page.evaluate("window.ran") is None
    assert page.locator("img").count() == 0
    assert page.evaluate("localStorage.length") == 0
    page.get_by_role("button", name="Forget the key").click()
    page.locator("#key").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    assert all("401" in trouble or "403" in trouble for trouble in person.troubles)
    assert person.outside() == []


def test_approving_needs_a_reason(visit: Begin, site: Site) -> None:
    person = visit()
    doubtful(site, person, "Third")
    page = person.page
    page.goto(f"{site.url}/review")
    page.fill("#key", site.keys["review"])
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Approve").first.click()
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    assert not [url for url in person.requests if "/v1/reviews/" in url]
