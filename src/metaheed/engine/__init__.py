"""The engine: computes a batch's meta-gradients on a machine and makes outer steps of them."""
