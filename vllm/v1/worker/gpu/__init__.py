"""The model runner's CUDA side: device-side batch, input preparation, CUDA graphs, sampling."""
