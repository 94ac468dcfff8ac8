"""Generated from protos/accord/v1 by `make protos`; the comments are there."""
