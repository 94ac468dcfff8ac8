"""What runs and ends: the stages of the loop as Ray programs, each runnable as `python -m ray_jobs.NAME`."""
