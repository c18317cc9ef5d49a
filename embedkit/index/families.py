"""Families: the kinds of FAISS indexes that are tried when a recall is asked for."""

from __future__ import annotations

EXACT = "Flat"
REFINEMENTS = (1, 2, 3, 5, 10, 20, 40)
EFFORTS = (
    1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024,
)  # fmt: skip
WIDEST_CODE = 512  # Of four bits a coordinate.


def list_factories(n: int, dim: int, metric: str) -> list[str]:
    """Return FAISS factory strings that may suit a gallery, one or more of each family.

    Candidates are compared exactly with the store's own rows afterwards, so that an index may be coarse: it is what
    FAISS calls a refine, without a second copy of the embeddings.

    Parameters
    ----------
    n, dim : int
        Rows and their width.
    metric : str
        "cosine", "l2" or "ip". Inner products do not survive a PCA, which moves the origin.

    Returns
    -------
    list of str
        Graphs (HNSW), inverted files of whole vectors (IVF-Flat), of products of quantisers four bits wide (IVF-PQ), of
        scalar and of RaBitQ quantisers.

    Examples
    --------
    >>> from embedkit.index.families import list_factories
    >>> list_factories(100_000, 1280, "cosine")[-1]
    'PCAR256,IVF1024,RaBitQfs'
    """
    lists = count_lists(n)
    found = ["HNSW32", f"IVF{lists},Flat", f"IVF{lists},SQ8"]
    if dim <= WIDEST_CODE:
        found.append(f"IVF{lists},PQ{dim}x4fs")
    narrow = max((width for width in (32, 64, 128) if width < dim), default=0) if metric != "ip" else 0
    if narrow:
        found += [f"PCA{narrow},HNSW32", f"PCA{narrow},IVF{lists},PQ{narrow}x4fs"]
    turned = f"RR{dim}"
    if dim > 256 and metric != "ip":
        found.append(f"PCA256,IVF{lists},PQ128x4fs")
        turned = "PCAR256"
    return [*found, f"{turned},IVF{lists},RaBitQfs"]


def count_lists(n: int) -> int:
    """Return how many inverted lists suit a gallery: about four times the root of its rows, a power of two.

    Examples
    --------
    >>> from embedkit.index.families import count_lists
    >>> count_lists(100_000), count_lists(1_000_000)
    (1024, 4096)
    """
    lists = 1
    while lists * lists < 8 * n and lists * 2 * 40 <= n:  # Up to the power of two nearest to it, of 40 rows a list.
        lists *= 2
    return lists
