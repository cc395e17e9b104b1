"""The sampler's arithmetic, one module a step; each is a function of tensors."""
