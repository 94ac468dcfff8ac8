"""`python -m ray_jobs.operate job|status ...`, which is what `accord job` and `accord status` become."""

from ray_jobs.operate.commands import app

app(prog_name="accord")
