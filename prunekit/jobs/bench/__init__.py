"""`prunekit bench`: time a model's pruned denoisers beside the dense one."""
