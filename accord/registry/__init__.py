"""Which models there are, which one serves, and who said so: on MLflow's model registry.

`settings` and `gate` say what a model must show before it serves, `runs` reads what a run has made,
`registry`
keeps versions, aliases and their history, `lineage` walks from a model to the votes that shaped it, and back.
"""
