"""Corrections of the cut student in closed form."""
