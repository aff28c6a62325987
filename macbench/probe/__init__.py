"""How smollm2_128k was made: synthetic long-context data, a training script and an evaluation. See docs/smollm2_128k.md."""
