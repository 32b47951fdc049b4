"""Conv4's loss, gradient and Hessian products in closed form: on a CPU, and by CUDA kernels."""
