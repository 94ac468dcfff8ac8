"""Says before anything starts whether a recipe will fit: memory, disk, time, and what is missing."""
