"""One file per method, one idea per file. A YAML of ``conf/method`` names its class in ``_target_``; there is no registry to extend."""
