"""Where and how a step takes its gradient, if not by differentiation at the weights."""
