"""What the outputs of runs and predictions say: margins of classes, and numbers by subgroup."""
