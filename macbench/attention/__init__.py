"""task=attention: what one attention call of a decode step costs, next to full attention on the same cache in the same process."""

from macbench.attention.bench import measure

__all__ = ["measure"]
