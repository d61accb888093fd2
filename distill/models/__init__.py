"""Models: the layout of each family, its axes, loading, the plan, forward passes and their captures."""
