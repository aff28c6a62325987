"""Which files belong to a collection of records: a list beside them, in sha256sum's own format.

python -m analysis.manifest DIR    writes DIR/SHA256SUMS; ``sha256sum -c SHA256SUMS`` in DIR checks it, as every drawing of figures does
"""

import hashlib
import re
import sys
from pathlib import Path

from macbench.errors import ConfigError, ending, one_line
from macbench.files import write_whole

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text(root: Path) -> str:
    """A line per file below ``root`` but the list itself and hidden ones, in the order of their names."""
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    kept = sorted(path.as_posix() for path in files if path.name != NAME and not any(part.startswith(".") for part in path.parts))
    return "".join(f"{_digest(root / name)}  {name}\n" for name in kept)


def lacks(root: Path) -> list[str]:
    """A line per file that a list at or below ``root`` names and that is not there or is another one; of a folder that is not there, one line."""
    return [line for path in sorted(root.rglob(NAME)) for line in _check(path)]


def _check(path: Path) -> list[str]:
    try:
        entries = [_LINE.fullmatch(line) for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path} cannot be read ({one_line(error)})"]
    found = [f"{path} has a line {i + 1} that is not one of sha256sum" for i, entry in enumerate(entries) if entry is None]
    gone: dict[Path, int] = {}
    for digest, name in (entry.groups() for entry in entries if entry):
        file = path.parent / name
        if not file.exists():
            first = next(p for p in reversed([file, *file.parents]) if not p.exists())
            gone[first] = gone.get(first, 0) + 1
            continue
        try:
            if _digest(file) != digest:
                found.append(f"{file} is not the file that {path} lists")
        except OSError as error:
            found.append(f"{file} cannot be read ({one_line(error)})")
    for place, files in gone.items():
        listed = place.relative_to(path.parent).as_posix() in {entry[2] for entry in entries if entry}
        found.append(f"{place} is not there; {path} lists " + ("it" if listed else f"{files} files in it" if files > 1 else "a file in it"))
    return found


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        raise ConfigError("DIR", " ".join(arguments), "must be one folder: python -m analysis.manifest runs/reference")
    target = Path(arguments[0]) / NAME
    content = text(target.parent)
    try:
        write_whole(target, lambda file: file.write(content.encode()))
        target.chmod(0o644)
    except OSError as error:
        raise ConfigError("DIR", arguments[0], f"cannot be written ({error.strerror})") from error
    print(f"{target}: {len(content.splitlines())} files")


if __name__ == "__main__":
    with ending():
        main(sys.argv[1:])
