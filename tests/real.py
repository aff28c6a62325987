"""The real model for tests: loaded once per session."""

from functools import cache

from omegaconf import OmegaConf

from macbench.cli import CONF
from macbench.models.weights import LoadedModel, load, load_chat


@cache
def spec():
    return OmegaConf.load(CONF / "model" / "smollm2.yaml")


@cache
def chat():
    return load_chat(spec())


@cache
def model() -> LoadedModel:
    return load(spec(), "cpu", chat())
