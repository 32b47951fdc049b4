"""The derivatives of Conv4 without autograd: on a CPU, and on CUDA."""
