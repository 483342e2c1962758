"""`prunekit bench`: time a model's pruned UNets beside the dense one."""
