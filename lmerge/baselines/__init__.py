"""Published ways to make a model shallower, each as its paper states it, for comparison."""
