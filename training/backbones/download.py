"""Asks for the hub of pretrained weights before timm downloads from it: the only door to huggingface_hub.

Where there is no connection, the hub's library tries for a minute, file by file, before it says so, and takes no
setting for that. One question tells at once. What it cached before is had without a connection.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import constants, get_session, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from torch import Tensor

from models.backbones import BackboneUnavailable, fetch_pretrained


def fetch_where_reachable(
    name: str,
    *,
    host: str = constants.ENDPOINT,
    cache: Path = Path(constants.HF_HUB_CACHE),
    fetch: Callable[[str], Mapping[str, Tensor]] = fetch_pretrained,
) -> Mapping[str, Tensor]:
    """Download timm's pretrained weights of a backbone, or say at once that nothing can be downloaded.

    Args:
        name: timm's, tagged or not.
        host: of the hub.
        cache: where its library keeps what it downloaded.
        fetch: downloads.

    Raises:
        BackboneUnavailable: if the hub can't be reached, or timm has no such weights.
    """
    try:
        get_session().head(host, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whichever HTTP library the hub's own stands on
        if not _may_be_cached(name, cache):
            raise BackboneUnavailable(f"{host} can't be reached ({type(error).__name__})") from error
    return fetch(name)


def _may_be_cached(name: str, cache: Path) -> bool:
    """Tell whether weights of the architecture were downloaded before, by whatever tag."""
    try:
        kept = scan_cache_dir(cache).repos
    except CacheNotFound:
        return False
    return any(_architecture(repository.repo_id.rpartition("/")[2]) == _architecture(name) for repository in kept)


def _architecture(name: str) -> str:
    return name.partition(".")[0]
