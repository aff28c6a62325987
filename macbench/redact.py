"""Keys that lie in the environment stay out of everything that a run writes."""

import json
import os
import re
from urllib.parse import quote

# What a variable's name says of a value that is nobody's business: OPENAI_API_KEY, HFTOKEN, GITHUB_PAT, but not KEYBOARD or TOKENIZERS.
_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIAL|AUTH)S?(?![A-Z])|(?<![A-Z])(PAT|PW)(?![A-Z])|_PWD$")
_IN_URL = re.compile(r"://[^/@\s:]*:([^/@\s]+)@")  # a proxy's or a database's password
_SHORTEST = 8  # characters; anything shorter would turn up in innocent text


def secrets() -> list[tuple[str, str]]:
    """(name, value) of the variables that hold one, longest value first. Where a key lies is no secret: what is a path stays readable."""
    found = []
    for name, value in os.environ.items():
        if _NAME.search(name.upper()) and not (os.sep in value and os.path.exists(value)):
            found.append((name, value))
        found += [(name, password) for password in _IN_URL.findall(value)]
    return sorted({(name, value) for name, value in found if len(value) >= _SHORTEST}, key=lambda pair: (-len(pair[1]), pair))


def redact(text: str) -> str:
    """``text`` with every secret, also as JSON and URLs spell it, replaced by the name of its variable."""
    for name, value in secrets():
        for spelled in (value, json.dumps(value)[1:-1], quote(value, safe="")):
            text = text.replace(spelled, f"<{name}>")
    return text


def within(value: object) -> object:
    """Lists and dictionaries with every text in them redacted: before a format that breaks lines or doubles quotes makes secrets look otherwise."""
    if isinstance(value, dict):
        return {key: within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [within(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def by_name(override: str) -> str:
    """An override of the command line with every secret replaced by a reference to its variable, so that files of a sweep hold no value."""
    key, equals, rest = override.partition("=")
    for name, value in secrets():
        if os.environ.get(name) == value and not re.fullmatch(r"[\d.]+", value):  # a number that is referred to would become a text
            for spelled in (value, value.replace("'", "\\'"), value.replace('"', '\\"')):  # also as quotes stand within quotes
                rest = rest.replace(spelled, f"${{oc.env:{name}}}")
    return key + equals + rest
