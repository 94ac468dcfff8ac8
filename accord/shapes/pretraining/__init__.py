"""Makes the sandbox's shipped weights from nothing (`python -m ray_jobs.pretrain_shapes`)."""
