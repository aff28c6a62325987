"""macbench: what a KV-cache attention method costs, and what it loses, on real long-context tasks."""

__version__ = "0.1.0"
