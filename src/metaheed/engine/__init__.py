"""How the meta-gradients of a batch are computed on a machine: estimated, executed, and made into outer steps."""
