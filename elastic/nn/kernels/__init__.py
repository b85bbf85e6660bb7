"""Triton kernels, for what torch.compile does in more passes over memory; imported on GPUs only."""
