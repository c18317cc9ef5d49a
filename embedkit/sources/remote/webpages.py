"""The index pages of web servers, as folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin, urlsplit

from embedkit.errors import ImageError
from embedkit.sources.entries import require_inside
from embedkit.sources.failing import harmless
from embedkit.sources.remote.transfers import Place, public_url, split_secrets

# A server may make up links for ever.
MAX_DEPTH = 64
MAX_PAGES = 100_000
MAX_LINKS = 10_000_000
MAX_PAGE_BYTES = 16 << 20


@dataclass(frozen=True)
class WebFolder:
    """A folder of a web server.

    Attributes
    ----------
    origin, query : str
        What stands before and after the path in a request; both may hold secrets, and neither is shown.
    path : str
        Percent-encoded; with a slash at its end.
    """

    origin: str = field(repr=False)
    path: str
    query: str = field(repr=False)

    def request(self, id: str) -> str:
        """Return the URL that an id is asked for with."""
        return f"{self.origin}{self.path}{quote(id, errors='surrogateescape')}{self.query}"


def split_image_url(url: str) -> tuple[WebFolder, str]:
    """Return the folder that a file lies in, and its id."""
    origin, path, query = split_secrets(url)
    folder, _, name = path.rpartition("/")
    return WebFolder(origin, _encoded(folder) + "/", query), _decoded(name)


def web_folder(url: str) -> WebFolder:
    """Return the folder at a URL."""
    origin, path, query = split_secrets(url)
    return WebFolder(origin, _encoded(path).rstrip("/") + "/", query)


class IndexWalk:
    """A walk over index pages and those they link to, never above the first."""

    def __init__(self, place: Place, folder: WebFolder) -> None:
        self.place, self.folder = place, folder
        self.failures: list[ImageError] = []
        self._seen: set[str] = set()

    def run(self) -> Iterator[str]:
        """Yield the ids of the files linked to, and of hidden folders; what cannot be read goes to the failures."""
        root = public_url(self.folder.origin + self.folder.path)
        stack, pages = [""], 0
        while stack:
            below = stack.pop()
            pages += 1
            if pages > MAX_PAGES or len(self._seen) > MAX_LINKS:
                raise ImageError(root, f"more than {MAX_PAGES:,} index pages or {MAX_LINKS:,} links", "too-large")
            for id in self._page(below, root):
                if not id.endswith("/") or id.rpartition("/")[0].rpartition("/")[2].startswith("."):
                    yield id
                elif id.count("/") <= MAX_DEPTH:
                    stack.append(id)
                else:
                    self.failures.append(ImageError(id, f"folders deeper than {MAX_DEPTH} are left out", "refused"))

    def _page(self, below: str, root: str) -> Iterator[str]:
        """Yield what an index page links to and was not seen before."""
        url = self.folder.request(below)
        try:
            page = self.place.fetch(url, below or root, None, MAX_PAGE_BYTES)
        except ImageError as error:
            if not below:
                raise
            self.failures.append(ImageError(below, f"the folder cannot be read: {error.reason}", error.kind))
            return
        links = _Links()
        links.feed(page.decode("utf-8", "replace"))
        for link in links.found:
            path = _path_below(public_url(url), link)
            if path and below + path not in self._seen:
                self._seen.add(below + path)
                # A slash within a name stays encoded, for without it this may be another image's id.
                id = below + "/".join(_decoded(piece).replace("/", "%2F") for piece in path.split("/"))
                try:
                    if id != below + _decoded(path):
                        raise ImageError(id, "a slash within a name", "refused")
                    yield require_inside(id)
                except ImageError as error:
                    self.failures.append(ImageError(harmless(id), error.reason, error.kind))


class _Links(HTMLParser):
    """What a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attributes if name == "href" and value]


def _path_below(page: str, link: str) -> str:
    """Return where a link leads as seen from the folder of its page; empty when that is elsewhere, or a sorted view."""
    try:
        here, there = urlsplit(page), urlsplit(urljoin(page, link))
    except ValueError:
        return ""
    if (there.scheme, there.netloc, there.query) != (here.scheme, here.netloc, ""):
        return ""
    path = _encoded(there.path)
    return path[len(here.path) :] if path.startswith(here.path) else ""


def path_within(folder: WebFolder, path: str) -> str | None:
    """Return what a percent-encoded path has below a folder, as an id; nothing when it lies elsewhere."""
    encoded = _encoded(path)
    below = encoded.removeprefix(folder.path)
    if not encoded.startswith(folder.path) or _decoded(below).count("/") != below.count("/"):
        return None
    return _decoded(below)


def _decoded(path: str) -> str:
    """Return a percent-encoded path as an id; bytes that are not UTF-8 are kept as in the names of files."""
    return unquote(path, errors="surrogateescape")


def _encoded(path: str) -> str:
    """Return a path percent-encoded in one and the same way, however it was; an encoded slash stays one."""
    return "/".join(quote(_decoded(piece), safe="", errors="surrogateescape") for piece in path.split("/"))
