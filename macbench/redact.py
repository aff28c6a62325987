"""Keys that lie in the environment stay out of everything that a run writes."""

import os
import re

# Words of a variable's name that say that its value is nobody's business.
_SECRET = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "CREDENTIAL", "CREDENTIALS"}
_SHORTEST = 8  # characters; anything shorter would turn up in innocent text


def redact(text: str) -> str:
    """``text`` with every secret replaced by the name of its variable."""
    found = [(name, value) for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET & set(re.split(r"[^A-Z]+", name.upper()))]
    for name, value in sorted(found, key=lambda pair: -len(pair[1])):
        text = text.replace(value, f"<{name}>")
    return text
