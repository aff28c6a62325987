"""Fidelity: how near methods stay to full attention along the text that it writes after real long prompts, whatever the text is worth."""

from dataclasses import replace

import pandas as pd

from macbench.errors import ConfigError
from macbench.tasks.base import Example
from macbench.tasks.ruler import Ruler

METHOD = ["method", "variant"]


class Fidelity(Ruler):
    """RULER's prompts and scores. Every method sees full attention's text token by token (teacher forcing), for ``steps`` decode steps at
    most, and writes its own text, of which the first token that differs is noted.

    ``ignore_eos``: texts go on to RULER's limit of new tokens, end-of-sequence tokens or not. The other settings are those of ``Ruler``.
    """

    def __init__(self, *args, steps: int = 128, ignore_eos: bool = False, **settings):
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError("task.steps", steps, "must be an integer of at least 1")
        if not isinstance(ignore_eos, bool):
            raise ConfigError("task.ignore_eos", ignore_eos, "must be true or false")
        super().__init__(*args, **settings, name="fidelity")
        self.follow, self.ignore_eos = steps, ignore_eos

    def example(self, subtask: str, index: int) -> Example:
        return replace(super().example(subtask, index), ignore_eos=self.ignore_eos)

    def protocol(self) -> dict:
        return super().protocol() | {"steps": self.follow, "ignore_eos": self.ignore_eos}

    @staticmethod
    def tables(samples: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """A row per method variant, over all examples: means along full attention's text, and how far its own texts agree with that."""
        full = samples[(samples.method == "full") & samples.error.isna()].set_index(["subtask", "example_id"]).new_tokens.rename("full_tokens")
        rows = []
        for (method, variant), mine in samples[samples.error.isna() & (samples.method != "full")].groupby(METHOD, sort=False):
            mine = mine.join(full, on=["subtask", "example_id"], how="inner")
            differ = mine.first_divergence.dropna()
            rows.append(
                {"method": method, "variant": variant, "texts": len(mine), "followed": int(mine.top1_agreement.notna().sum())}
                | {name: mine[name].astype(float).mean() for name in ("top1_agreement", "kl_mean", "output_error")}
                | {"same_text": 100 * (1 - len(differ) / len(mine)) if len(mine) else None}
                | {"first_divergence": differ.astype(float).median(), "full_tokens": mine.full_tokens.mean()}
            )
        title = "along full attention's text (means over texts); own texts: the same in percent, median index of the first token that differs"
        return [(title, pd.DataFrame(rows))] if rows else []

    @staticmethod
    def layer_tables(layers: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Where the errors of attention outputs are: over layers, of their means over examples."""
        rows = []
        for (method, variant), mine in layers.dropna(subset="output_error").groupby(METHOD, sort=False):
            error = mine.groupby("layer").output_error.mean()
            ends = {name: f"{error[layer]:.4f} (layer {layer})" for name, layer in (("least", error.idxmin()), ("most", error.idxmax()))}
            quantiles = {name: f"{error.quantile(q):.4f}" for name, q in (("lower quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75))}
            rows.append(
                {"method": method, "variant": variant, "mean": f"{error.mean():.4f}", "least": ends["least"]} | quantiles | {"most": ends["most"]}
            )
        return [("relative error of attention outputs, by layer", pd.DataFrame(rows))] if rows else []
