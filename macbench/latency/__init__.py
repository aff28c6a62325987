"""task=decode: what a decoded token costs end to end, by the engine that also produces the accuracy."""
