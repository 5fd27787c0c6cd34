"""Vectors of videos by an engine that spreads work over processes and machines, and from its rows into an index.

`VideoEmbedder` is what Ray Data's `map_batches` and the `map` of `datasets` call with batches of paths. `write_rows`
puts what comes out into an index, which is that of `umt-hf embed`.

    rows = ray.data.from_items([{"path": path} for path in paths]).map_batches(
        VideoEmbedder,
        fn_constructor_kwargs={"model": "outputs/retrieval"},
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    write_rows(rows, "index")
"""

from .embedder import VideoEmbedder, choose_device
from .rows import list_new_videos, write_rows

__all__ = ["VideoEmbedder", "choose_device", "list_new_videos", "write_rows"]
