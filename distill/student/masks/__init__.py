"""Zeros in the MLPs that stay zero through training, as the recipe's `student.mask` asks for them."""
