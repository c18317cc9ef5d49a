"""What a search found as HTML: a self-contained page, and a strip for notebooks."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence

from embedkit.errors import EmbedkitError
from embedkit.images import Data, Region, read_bytes, read_image, thumbnail
from embedkit.index.pictures import read_picture
from embedkit.index.results import SCORE_NAMES, Hit, SearchResult
from embedkit.store import Store
from embedkit.text import counted, printable

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8889; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }
header p { margin: .2rem 0 2rem; opacity: .7; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; display: grid; gap: 1.5rem;
  grid-template-columns: 200px 1fr; }
ol { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); list-style: none;
  margin: 0; padding: 0; }
figure { margin: 0; }
img, .missing { width: 100%; aspect-ratio: 1; object-fit: contain; background: #8881; border-radius: 6px; }
.missing { display: grid; place-items: center; font-size: .8rem; opacity: .7; text-align: center; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
figcaption b { font-variant-numeric: tabular-nums; }
figcaption small { display: block; opacity: .7; }
@media (max-width: 40rem) { section { grid-template-columns: 1fr; } }
"""

STRIP_QUERIES, STRIP_HITS, STRIP_PIXELS = 4, 8, 96
_STRIP = "display: flex; flex-wrap: wrap; gap: 8px; margin: 4px 0 12px; align-items: flex-start"
_FRAME = (
    f"height: {STRIP_PIXELS}px; overflow: hidden; display: flex; align-items: center; justify-content: center; "
    "background: #8882; border-radius: 4px; white-space: normal"
)


def search_page(
    result: SearchResult, queries: Sequence[tuple[str, bool]], *, size: int = 224, facts: str | None = None
) -> str:
    """Return a page with each query's picture beside the pictures it found, with their scores.

    Parameters
    ----------
    result : SearchResult
        What `Index.search` returned for `queries`.
    queries : sequence of (str, bool)
        The path of each query, or its id and that it is a row of the store.
    size : int, default 224
        Longest side of a thumbnail, in pixels.
    facts : str, optional
        How was searched, such as "cosine similarity, HNSW32"; by default the metric, and that it was exact.

    Returns
    -------
    str
        HTML that needs no other file and asks no network. An image that has gone since is shown as missing.
    """
    store = result.store
    sections = "".join(
        f"<section><figure>{_query(store, name, is_row, size)}"
        f"<figcaption><b>query</b> {_text(name)}</figcaption></figure>"
        f"{_hits(store, result.hits(number), size)}</section>\n"
        for number, (name, is_row) in enumerate(queries)
    )
    title = f"{len(queries)} {'query' if len(queries) == 1 else 'queries'} in {_text(store.path.name)}"
    searched = f"{SCORE_NAMES[result.metric]}, exact" if facts is None else facts
    name = store.spec.name_of(store.recipe)
    about = f"{counted(len(store), 'image')}, {_text(name)}, {store.dim} wide, {_text(searched)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n'
        f"<header><h1>{title}</h1><p>{about}</p></header>\n{sections}</html>\n"
    )


def result_strip(result: SearchResult) -> str:
    """Return the first hits of the first queries as rows of thumbnails with scores, for a notebook.

    Styles stand at the elements, because those of a notebook's cell would reach all others; its colours are the
    notebook's own.
    """
    store, shown = result.store, result.rows[:STRIP_QUERIES]
    lines = []
    for number in range(len(shown)):
        hits, left = result.hits(number, STRIP_HITS), int((shown[number] >= 0).sum()) - STRIP_HITS
        head = "" if result.single else f"<div>query {number}</div>"
        more = f'<div style="line-height: {STRIP_PIXELS}px">and {left:,} more</div>' if left > 0 else ""
        tiles = "".join(_tile(store, hit) for hit in hits)
        lines.append(f'{head}<div style="{_STRIP}">{tiles or "nothing found"}{more}</div>')
    if left := len(result.rows) - len(shown):
        lines.append(f"<div>and {left:,} more {'query' if left == 1 else 'queries'}</div>")
    return f'<div style="font-size: 12px">{"".join(lines) or "no queries"}</div>'


def picture_tag(read: Callable[[], Data], size: int) -> str:
    """Return an image as an HTML element that holds all of it; of one that cannot be had, the reason.

    Parameters
    ----------
    read : callable
        Returns what the image is decoded from, as `read_picture` does.
    size : int
        Longest side of its thumbnail, in pixels.
    """
    try:
        data = read()
        whole, box = data if isinstance(data, Region) else (data, None)
        image = read_image(whole)
        data64 = base64.b64encode(thumbnail(image if box is None else image.crop(box), size)).decode()
    except (EmbedkitError, OSError) as error:  # Of the image, or of the archive that it was in.
        return f'<div class="missing">{_text(getattr(error, "reason", "") or str(error))}</div>'
    return f'<img alt="" src="data:image/jpeg;base64,{data64}">'


def _hits(store: Store, hits: Sequence[Hit], size: int) -> str:
    if not hits:
        return "<p>nothing found</p>"
    return f"<ol>{''.join(_hit(store, hit, size) for hit in hits)}</ol>"


def _hit(store: Store, hit: Hit, size: int) -> str:
    label = f" {_text(hit.label)}" if hit.label is not None else ""
    caption = f"<b>{hit.score:.4f}</b>{label}<small>{_text(hit.id)}</small>"
    picture = picture_tag(lambda: read_picture(store, hit.id), size)
    return f"<li><figure>{picture}<figcaption>{caption}</figcaption></figure></li>"


def _query(store: Store, name: str, is_row: bool, size: int) -> str:
    return picture_tag(lambda: read_picture(store, name) if is_row else read_bytes(name), size)


def _tile(store: Store, hit: Hit) -> str:
    picture = picture_tag(lambda: read_picture(store, hit.id), STRIP_PIXELS)
    caption = f"{hit.score:.3f}{'' if hit.label is None else f' {_text(hit.label)}'}"
    return (
        f'<div style="width: {STRIP_PIXELS}px; overflow-wrap: anywhere" title="{_text(hit.id)}">'
        f'<div style="{_FRAME}">{picture}</div>{caption}</div>'
    )


def _text(text: str) -> str:
    return html.escape(printable(text))
