"""The routes of the pages, and the promises their files make by what they do not hold."""

import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from characterflywheel import web

FILES = sorted(path for path in web.FOLDER.iterdir() if path.suffix in {".html", ".js", ".css", ".svg"})


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=web.routes()))


def test_pages_and_files_are_served_and_revalidated(client: TestClient) -> None:
    for path in ("/", "/review", *(f"/static/{one.name}" for one in FILES if one.suffix != ".html")):
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["etag"]
    again = client.get("/static/main.js", headers={"If-None-Match": client.get("/static/main.js").headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["__init__.py", "__pycache__", "..%2fcli.py", "../cli.py", "", "missing.js", "index.html"]
)
def test_nothing_else_of_the_folder_is_served(client: TestClient, path: str) -> None:
    assert client.get(f"/static/{path}").status_code == 404


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_inline_script_or_style_nothing_from_elsewhere_no_markup_from_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(inner|outer|insertAdjacent)HTML|document\.write|DOMParser|\beval\(|new Function", text)
    assert not re.search(r"(?<!xmlns=\")https?://(?!www\.w3\.org/2000/svg)", text)
    if path.suffix == ".html":
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text)
        assert all('src="/static/' in tag for tag in re.findall(r"<script[^>]*>", text))


def test_every_file_that_is_named_is_there() -> None:
    names = {path.name for path in FILES}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"/static/([\w.-]+)", text) + re.findall(r'from "\./([\w.]+)"', text)
        assert set(named) <= names, path.name
    icons = set(re.findall(r'id="(\w+)"', (web.FOLDER / "icons.svg").read_text(encoding="utf-8")))
    for path in FILES:
        used = re.findall(r'icon(?:Button)?\("(\w+)"|icon: "(\w+)"|icons\.svg#(\w+)"', path.read_text(encoding="utf-8"))
        assert {name for names in used for name in names if name} <= icons
