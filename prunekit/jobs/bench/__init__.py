"""`prunekit bench`: time a model's pruned denoisers and its dense denoiser, interleaved."""
