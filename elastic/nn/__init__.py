"""What models are made of: layers and their kernels, precision, recomputation, the loss."""
