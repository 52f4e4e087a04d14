"""Reader of a report's HTML, for tests."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Parser of the elements of a page.

    Attributes:
        elements: tag, attributes and own text of every element, in order.
        unclosed: tags that are closed in the wrong order or never.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.unclosed: list[str] = []
        self.feed(text)
        self.close()
        self.unclosed += [self.elements[i][0] for i in self._open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        if self._open and self.elements[self._open[-1]][0] == tag:
            self._open.pop()
        else:
            self.unclosed.append(tag)

    def handle_data(self, data):
        for i in self._open:
            self.elements[i][2].append(data)

    def text(self, tag: str, **attributes: str) -> list[str]:
        """Return the texts of all elements of a tag with these attributes, white space joined."""
        wanted = attributes.items()
        return [
            " ".join("".join(text).split())
            for name, given, text in self.elements
            if name == tag and all(given.get(key) == value for key, value in wanted)
        ]

    def values(self, attribute: str) -> list[str]:
        """Return all values of an attribute."""
        return [given[attribute] or "" for _, given, _ in self.elements if attribute in given]

    @property
    def charts(self) -> set[str]:
        """Return the names of the charts."""
        return {name.removeprefix("chart-") for name in self.values("id") if name.startswith("chart-")}

    @property
    def words(self) -> str:
        """Return all text of the page's body."""
        (body,) = [i for i, (name, _, _) in enumerate(self.elements) if name == "body"]
        return re.sub(r"\s+", " ", "".join(self.elements[body][2]))
