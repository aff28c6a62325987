"""How smollm2_128k was made: synthetic long-context data, a training script and an evaluation. See docs/smollm2_128k.md."""

import os
from time import monotonic

STARTED = monotonic()  # the first thing that a script of this package does
# Lengths differ from step to step: without this the allocator's blocks would not fit the next one. Read when CUDA is first used.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes fork
