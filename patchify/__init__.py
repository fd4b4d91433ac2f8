"""Find the same object in other images, patch by patch."""
from importlib import import_module

__version__ = "0.1.0"
__distribution__ = "patchify-retrieval"  # an unrelated `patchify` has no such line

# Names load their module when they are first used, so that `import patchify` takes no time.
_HOMES = {
    "Regions": "boxes", "RetrievalSet": "retrieval_set", "open_image": "images", "load": "data.registry",
    "make_mini": "synthetic.mini", "Encoder": "encoder", "load_encoder": "encoder", "Store": "store", "extract": "extraction",
    "SearchResult": "search", "ExactIndex": "search", "describe": "evaluate", "rank": "evaluate",
    "summarize": "metrics", "paired_bootstrap": "metrics", "explore": "pages.widget",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'patchify' has no attribute {name!r}")
    return getattr(import_module(f"patchify.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
