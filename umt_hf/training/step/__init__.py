"""One step of the loop: compiled, guarded against gradients that are not finite, and without waiting."""
