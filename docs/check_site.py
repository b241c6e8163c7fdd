"""A hook of mkdocs: the built site asks for nothing from elsewhere when it is viewed."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# What a browser fetches by itself; a link that a reader may follow is none.
_FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "link": "href",
}
_NOT_FETCHED = {"canonical", "alternate", "next", "prev", "author", "license"}


class _Requests(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(_FETCHED.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and not (tag == "link" and values.get("rel") in _NOT_FETCHED):
            self.found.append(f"<{tag}> {address}")


def requests_of(site: Path) -> list[str]:
    """FILE: what it would fetch from another host, of all pages and style sheets."""
    found = []
    for page in sorted(site.rglob("*.html")):
        parser = _Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.relative_to(site)}: {each}" for each in parser.found]
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8")
        outside = re.findall(r"(?:url\(|@import\s+)['\"]?((?:https?:)?//[^'\")\s]+)", text)
        found += [f"{sheet.relative_to(site)}: {each}" for each in outside]
    return found


def on_post_build(config: Any) -> None:
    """mkdocs calls this when the site is written."""
    found = requests_of(Path(config["site_dir"]))
    if found:
        raise SystemExit("the site would ask other hosts:\n" + "\n".join(found))
