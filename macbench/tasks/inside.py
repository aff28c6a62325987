"""Files of a data folder, which stay in it: a link may not lead a benchmark to somebody's other files."""

from pathlib import Path

from macbench.errors import ConfigError


def find(key: str, folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these files that there is; a ConfigError for ``key`` if it is a link out of the folder.

    A snapshot in the hub's cache is made of links to its own blobs; those are inside.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    root = folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder
    if path is not None and not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(key, path, "is a link to a file outside of its folder; copy the file, or name the folder it is in")
    return path
