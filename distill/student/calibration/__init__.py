"""One pass of the teacher over a sample: everything that scores, policies and allocations read."""
