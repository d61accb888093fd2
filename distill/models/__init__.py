"""Models: where the parts of each family live, loading, the plan, and what a forward pass hands on."""
