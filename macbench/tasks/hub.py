"""Data sets from where they are published: the Hugging Face hub, or a file at a fixed address. Imports what it needs only when called."""

import contextlib
import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from macbench import untrusted
from macbench.files import write_whole
from macbench.models.smollm2 import cache_root

_TIMEOUT = 5  # seconds to answer, after which the hub counts as unreachable and only the local cache is asked
_DOWNLOAD_TIMEOUT = 60  # seconds without a byte
_MOST = 128 << 20  # bytes of a file at a fixed address


class Unreachable(Exception):
    """The data is neither within reach nor in the local cache; ``str`` says so in one line."""


def rows(repo: str, config: str | None, split: str, revision: str | None = None):
    """A split of a data set, random access, not in memory."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise Unreachable(f"fetching {repo} needs the package {error.name}") from None
    pinned = {"revision": revision} if revision else {}
    with contextlib.ExitStack() as stack:
        try:
            huggingface_hub.HfApi().dataset_info(repo, timeout=_TIMEOUT, **pinned)
        except Exception:  # whatever keeps the hub out of reach, the cache may still have the data set
            # The client would retry for half a minute before it looks into its cache; offline it looks at once.
            stack.enter_context(_set(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_set(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            return datasets.load_dataset(repo, config, split=split, **pinned)
        except Exception as error:
            raise Unreachable(f"{repo} cannot be fetched from the Hugging Face hub ({type(error).__name__})") from None


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within it the hub, if it does not answer now, is not asked again: the client would retry for half a minute per model. The cache is read."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    with contextlib.ExitStack() as stack:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
        except Exception:  # as in ``rows``
            stack.enter_context(_set(constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_set(datasets.config, "HF_HUB_OFFLINE", True))
        yield


def download(url: str, sha256: str) -> Path:
    """The file at ``url``, fetched once into the user's cache directory; its content is what ``sha256`` says or it is not used."""
    cache = cache_root() / "downloads"
    target = cache / f"{sha256[:16]}-{url.rsplit('/', 1)[-1]}"
    if target.is_file() and hashlib.sha256(untrusted.content("task.data_path", target)).hexdigest() == sha256:
        return target
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as reply:
            content = reply.read(_MOST)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{url} cannot be fetched ({reason})") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise Unreachable(f"{url} has sha256 {found}, must be {sha256}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(target, lambda file: file.write(content))
    except OSError as error:
        raise Unreachable(f"{cache} cannot be written ({error.strerror})") from None
    return target


@contextlib.contextmanager
def _set(module: object, name: str, value: object):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
