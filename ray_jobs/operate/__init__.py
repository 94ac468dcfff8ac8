"""What operators do from their own machine: submit, list, follow and stop jobs, and see what runs.

`jobs` says what a job is; `ray_api` runs jobs by a Ray cluster's Jobs API, `kubernetes` as RayJobs, built by
`rayjob`; `status` looks at everything at once; `commands` is the command line.
"""
